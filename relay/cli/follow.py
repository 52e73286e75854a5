"""``relay send`` and ``relay tail``: a user's side of the relay, in the terminal."""

from __future__ import annotations

import asyncio
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import orjson
import typer
from rich.text import Text

from relay.cli import console
from relay.cli.asking import Asker, terminal_lines
from relay.cli.local import gateway_addresses, token_source
from relay.cli.story import RunStory, Say, summarize
from relay.cli.view import View, view_for
from relay.client import (
    Connected,
    Degraded,
    Disconnected,
    Event,
    RelayClient,
    Reset,
    SequenceHole,
    Update,
)
from relay.client.link import OPEN_TIMEOUT_S
from relay.config import load_settings
from relay.errors import ConfigurationError, RelayError

COMPLETED, AGENT_ERROR, INTERRUPTED = 0, 2, 130
TOKEN_TTL_S = 3_600
CANCEL_TIMEOUT_S = 20.0
CONNECT_PATIENCE_S = 1.0
"""A terminal that says nothing for longer than this looks broken."""

User = Annotated[
    str | None,
    typer.Option("--user", metavar="ID", help="Who asks or listens.", show_default=False),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="A gateway's address. By default that of relay up in this folder, or "
        "http://127.0.0.1:8080.",
        show_default=False,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="JWT",
        help="The user's token, where you do not have the secret to make one.",
        show_default=False,
    ),
]


def send(
    content: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="What to ask; - reads it from stdin."),
    ],
    user: User = None,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent",
            metavar="NAME",
            help="Which agent. Not needed where there is only one, or a default.",
            show_default=False,
        ),
    ] = None,
    thread: Annotated[
        str | None,
        typer.Option(
            "--thread",
            metavar="ID",
            help="Thread to ask in; a new one by default.",
            show_default=False,
        ),
    ] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Ask an agent and watch it work; answer what it asks.

    The answer goes to stdout as it is written. Ctrl-C stops the run. Exit code 0: completed,
    2: the agent failed, 130: stopped.
    """
    text = sys.stdin.read() if content == "-" else content
    client = client_for(url, user, token, since="now")
    thread_id = thread or f"terminal-{uuid.uuid4().hex[:12]}"
    sending = _Sending(client, text, thread_id, agent, answer_options(url, user))
    raise typer.Exit(asyncio.run(interruptible(sending.run, sending.interrupt)))


def tail(
    user: User = None,
    since: Annotated[
        str,
        typer.Option(
            "--since",
            metavar="WHERE",
            help="[bold]active[/bold] (from the start of the runs at work), [bold]now[/bold], "
            "[bold]0[/bold] (all that is kept) or a position.",
        ),
    ] = "active",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as it came, one JSON object a line.")
    ] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Print a user's events as they come, one line each, until Ctrl-C."""
    client = client_for(url, user, token, since=since)
    raise typer.Exit(asyncio.run(interruptible(lambda: _tail(client, as_json=as_json), None)))


def client_for(url: str | None, user: str | None, token: str | None, *, since: str) -> RelayClient:
    """Make the client of a command's user.

    Raises:
        ConfigurationError: Nobody is named, or no token can be made for them.
    """
    settings = load_settings()
    if token is None and user is None:
        raise ConfigurationError("Say who you are: --user ID, or --token JWT.")
    source = token or token_source(settings, user or "", TOKEN_TTL_S)
    return RelayClient(gateway_addresses(settings, url), source, since=since)


def answer_options(url: str | None, user: str | None) -> list[str]:
    """Give the options with which another command speaks for the same user."""
    # A token is never printed.
    speaker = ["--user", user] if user is not None else ["--token", "JWT"]
    return speaker if url is None else [*speaker, "--url", url]


@asynccontextmanager
async def connected(client: RelayClient) -> AsyncIterator[RelayClient]:
    """Enter a client; where that takes its time, say what stands in the way."""
    explaining = asyncio.create_task(_explain_delay(client))
    try:
        async with client:
            explaining.cancel()
            yield client
    finally:
        explaining.cancel()


async def _explain_delay(client: RelayClient) -> None:
    await asyncio.sleep(CONNECT_PATIENCE_S)
    why = client.last_failure or "no answer yet"
    console.print_warning(f"Not connected ({why}); trying for {OPEN_TIMEOUT_S:.0f} s")


async def interruptible(
    work: Callable[[], Awaitable[int]], on_interrupt: Callable[[], bool] | None
) -> int:
    """Run ``work``; Ctrl-C ends it, unless ``on_interrupt`` says that it ends by itself."""
    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if on_interrupt is None or not on_interrupt():
            task.cancel()
        else:
            loop.call_later(CANCEL_TIMEOUT_S, task.cancel)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        return COMPLETED if on_interrupt is None else INTERRUPTED


class _Sending:
    """One question and the run that answers it."""

    def __init__(
        self,
        client: RelayClient,
        content: str,
        thread_id: str,
        agent: str | None,
        options: Sequence[str],
    ) -> None:
        self._client = client
        self._content = content
        self._thread_id = thread_id
        self._agent = agent
        self._options = options
        self._run_id: str | None = None
        self._is_interrupted = False
        self._troubles = Troubles()
        self._cancelling: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Ask, follow, give the exit code."""
        with view_for(console.out) as view:
            view.wait_on("Connecting")
            async with connected(self._client) as client:
                asker = Asker(client, view, terminal_lines(), self._options)
                try:
                    accepted = await client.send_message(
                        self._content, thread_id=self._thread_id, agent=self._agent
                    )
                    self._run_id = accepted.run_id
                    asker.follow(accepted.run_id)
                    return await self._follow(RunStory(accepted.run_id), view, asker)
                finally:
                    await asker.aclose()

    def interrupt(self) -> bool:
        """Stop the run; tell whether it ends by itself now. The second time it does not."""
        if self._is_interrupted or self._run_id is None:
            return False
        self._is_interrupted = True
        self._cancelling = asyncio.create_task(self._cancel(self._run_id))
        return True

    async def _cancel(self, run_id: str) -> None:
        try:
            await self._client.cancel(run_id, reason="Ctrl-C in the terminal")
        except RelayError as error:
            # Most likely the run has just ended; its end is on its way then.
            console.print_warning(str(error))

    async def _follow(self, story: RunStory, view: View, asker: Asker) -> int:
        view.wait_on(story.status)
        updates = self._client.updates()
        while story.ended_by is None:
            update = await anext(updates)
            if isinstance(update, Event):
                for line in story.receive(update):
                    view.show(line)
                view.wait_on(story.status)
                asker.receive(update)
            else:
                self._show_trouble(update, view)
        return {"agent_completed": COMPLETED, "agent_error": AGENT_ERROR}.get(
            story.ended_by.type, INTERRUPTED
        )

    def _show_trouble(self, update: Update, view: View) -> None:
        if isinstance(update, Reset) and not any(
            run.get("run_id") == self._run_id for run in update.runs
        ):
            raise RelayError("The relay no longer knows this run: its store lost data. Ask again.")
        if (text := self._troubles.tell(update)) is not None:
            view.show(Say("!", "care", text))


class Troubles:
    """Says what stands between the user and the events, each trouble once."""

    def __init__(self) -> None:
        self._is_away = False

    def tell(self, update: Update) -> str | None:
        """Give a sentence, if there is something new to say."""
        was_away, self._is_away = self._is_away, isinstance(update, Disconnected)
        match update:
            case Disconnected() if was_away:
                return None
            case Disconnected(reason=reason):
                return f"Connection lost ({reason}); trying again"
            case Connected(node=node) if was_away:
                return f"Connected again, to {node}"
            case Reset(reason=reason):
                return f"History was cut ({reason}); what follows is what is there"
            case Degraded(reason=None):
                return "The gateway reaches its store again"
            case Degraded(reason=reason):
                return f"The gateway cannot reach its store ({reason}); events come later"
            case SequenceHole(run_id=run_id, expected=expected, seen=seen):
                return f"Events {expected} to {seen - 1} of {run_id} did not arrive"
            case _:
                return None


async def _tail(client: RelayClient, *, as_json: bool) -> int:
    troubles = Troubles()
    async with connected(client):
        async for update in client.updates():
            if isinstance(update, Event):
                _print_event(update, as_json=as_json)
            elif (text := troubles.tell(update)) is not None:
                console.print_warning(text)
    return COMPLETED


_STYLES = {
    "agent_completed": "good",
    "agent_error": "bad",
    "agent_cancelled": "care",
    "cancel_requested": "care",
    "agent_stalled": "care",
    "agent_retrying": "care",
    "text_delta": "quiet",
    "tool_progress": "quiet",
}


def _print_event(event: Event, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(orjson.dumps(event.raw).decode() + "\n")
        sys.stdout.flush()
        return
    line = Text.assemble(
        ((event.timestamp or "")[11:23], "quiet"),
        f"  {(event.run_id or '')[:16]:<16}  ",
        (f"{(event.agent or '')[:14]:<14}  ", "name"),
        (f"{event.type:<16}  ", _STYLES.get(event.type, "")),
        summarize(event),
    )
    # On a terminal one event is one line; in a pipe nothing is cut.
    if console.out.is_terminal:
        console.out.print(line, no_wrap=True, overflow="ellipsis")
    else:
        console.out.print(line, soft_wrap=True)
    sys.stdout.flush()
