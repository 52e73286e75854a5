"""``relay runs``, ``relay cancel`` and ``relay answer``: one request in a user's name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table
from rich.text import Text

from relay.cli import console
from relay.cli.answers import Answer, Question, choose_question, open_questions
from relay.cli.asking import send_answer
from relay.cli.follow import Token, Url, User, answer_options, client_for, connected
from relay.cli.story import printable
from relay.client import RelayClient
from relay.errors import ConfigurationError

_STYLES = {"completed": "good", "error": "bad", "cancelled": "care", "waiting": "care"}


def runs(
    user: User = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each run as one JSON object a line.")
    ] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List a user's runs: those at work and those of the last five minutes."""
    listed = asyncio.run(_list(client_for(url, user, token, since="now")))
    if as_json:
        for run in listed:
            typer.echo(orjson.dumps(run))
        return
    if not listed:
        console.err.print(Text("No run is at work, and none has just ended.", style="quiet"))
        return
    console.out.print(_table(listed))
    for question in open_questions(listed):
        console.out.print(Text.assemble(("? ", "care"), printable(question.prompt)))
        command = question.command(answer_options(url, user))
        console.out.print(Text(f"  {command}", style="quiet"), soft_wrap=True)


def cancel(
    run: Annotated[
        str,
        typer.Option("--run", metavar="ID", help="Which run; relay runs lists them."),
    ],
    user: User = None,
    reason: Annotated[
        str | None,
        typer.Option("--reason", metavar="TEXT", help="Why, for the agent.", show_default=False),
    ] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Ask a run to stop."""
    status = asyncio.run(_cancel(client_for(url, user, token, since="now"), run, reason))
    typer.echo(status)


def answer(
    user: User = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="ID",
            help="Which run asks. Not needed where only one does.",
            show_default=False,
        ),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            "--request",
            metavar="ID",
            help="Which question. Not needed where the run has only one.",
            show_default=False,
        ),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(
            "--value",
            metavar="JSON",
            help="What you say: true or false to an approval, one of the choices, or a text.",
            show_default=False,
        ),
    ] = None,
    deny: Annotated[bool, typer.Option("--deny", help="Refuse to answer.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Answer what an agent asks its user. The first answer, from wherever it comes, counts."""
    if deny == (value is not None):
        raise ConfigurationError("Give either --value JSON or --deny.")
    client = client_for(url, user, token, since="now")
    question, given = asyncio.run(_answer(client, run, request, value))
    said = "denied" if given.is_denied else orjson.dumps(given.value).decode()
    console.out.print(printable(f"{question.prompt} {said}"), markup=False, soft_wrap=True)


async def _list(client: RelayClient) -> Sequence[Mapping[str, Any]]:
    async with connected(client):
        return client.connection.runs if client.connection else ()


async def _cancel(client: RelayClient, run_id: str, reason: str | None) -> str:
    async with connected(client):
        return await client.cancel(run_id, reason)


async def _answer(
    client: RelayClient, run_id: str | None, request_id: str | None, value: str | None
) -> tuple[Question, Answer]:
    async with connected(client):
        known = client.connection.runs if client.connection else ()
        question = choose_question(open_questions(known), run_id, request_id)
        try:
            given = Answer(is_denied=True) if value is None else question.read_value(value)
        except ValueError as error:
            raise ConfigurationError(f"--value {value!r} is no answer: {error}") from error
        await send_answer(client, question, given)
        return question, given


def _table(listed: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="quiet")
    for name in ("run", "status", "agent", "thread", "try", "created", "waits for"):
        # Only what is short by nature may not wrap; a thread's id gives way first.
        table.add_column(name, no_wrap=name not in ("thread", "waits for"), overflow="fold")
    for run in listed:
        status = "stopping" if _is_stopping(run) else str(run["status"])
        waits = [tool["tool_name"] for tool in run["open_tools"]]
        waits += ["an answer" for _ in run["open_inputs"]]
        table.add_row(
            str(run["run_id"]),
            Text(status, style=_STYLES.get(status, "")),
            str(run["agent"]),
            Text(printable(str(run["thread_id"]))),
            str(run["attempt"]),
            str(run["created_at"])[5:16].replace("T", " "),
            Text(printable(", ".join(waits))),
        )
    return table


def _is_stopping(run: Mapping[str, Any]) -> bool:
    return bool(run["cancel_requested"]) and run["ended_at"] is None
