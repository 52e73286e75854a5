"""``relay workers`` and ``relay dead-letters``: what operators look at and put right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import orjson
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from relay import clock
from relay.cli import console
from relay.cli.follow import interruptible
from relay.cli.local import operator_settings
from relay.cli.serve import RedisUrl
from relay.cli.story import printable
from relay.config import Settings
from relay.dead_letters import DeadLetter, DeadLetterPage, DeadLetters
from relay.errors import ConfigurationError, RedisUnavailable, RequestRefused
from relay.keys import Keys
from relay.queues import AgentQueue, Waiting, list_queues
from relay.run_model import RunLimits
from relay.runs import RunRegistry
from relay.scripts import LogLimits, RedisLink
from relay.workers import LivingWorker, list_workers

WATCH_INTERVAL_S = 1.0
_SHOWN_RUNS = 5

dead_letters = typer.Typer(
    help="Tasks that were given up: list them, carry them out after all, or drop them.",
    no_args_is_help=True,
)


class _Operator:
    """What operators reach in one Redis."""

    def __init__(self, link: RedisLink, settings: Settings) -> None:
        self.link = link
        self.keys = Keys(settings.key_prefix)
        limits = RunLimits.of(settings)
        self.letters = DeadLetters(link, self.keys, RunRegistry(link, self.keys, limits))


@asynccontextmanager
async def _operating(redis_url: str | None) -> AsyncIterator[_Operator]:
    settings = operator_settings(redis_url)
    link = RedisLink(settings.redis_url, limits=LogLimits.of(settings), max_connections=4)
    try:
        await link.check()
        yield _Operator(link, settings)
    finally:
        await link.aclose()


# --- relay workers ---


def workers(
    redis_url: RedisUrl = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --watch one a second.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until Ctrl-C.")
    ] = False,
) -> None:
    """Show the workers that live, what they run, and what waits for them."""
    if not watch:
        asyncio.run(_show_once(redis_url, as_json=as_json))
        return
    showing = _watch_json if as_json or not console.out.is_terminal else _watch
    raise typer.Exit(asyncio.run(interruptible(lambda: showing(redis_url), None)))


class _Overview:
    """Workers, queues and the number of dead letters at one moment."""

    def __init__(
        self, living: Sequence[LivingWorker], queues: Sequence[AgentQueue], letters: int
    ) -> None:
        self._living = living
        self._queues = queues
        self._letters = letters

    def as_json(self) -> dict[str, Any]:
        return {
            "workers": [worker.as_json() for worker in self._living],
            "queues": [queue.as_json() for queue in self._queues],
            "dead_letters": self._letters,
        }

    def as_tables(self, now_ms: int) -> RenderableType:
        parts: list[RenderableType] = []
        if self._living:
            parts.append(_worker_table(self._living, now_ms))
        else:
            parts.append(Text("No worker lives. Start one: relay worker MODULE:ATTR", style="bad"))
        if self._queues:
            served = {agent for worker in self._living for agent in worker.card.agents}
            parts += [Text(), _queue_table(self._queues, served)]
        if self._letters:
            hint = f"\n{self._letters} dead letters: relay dead-letters list"
            parts.append(Text(hint, style="care"))
        return Group(*parts)


async def _look(operator: _Operator) -> _Overview:
    return _Overview(
        await list_workers(operator.link, operator.keys),
        await list_queues(operator.link, operator.keys),
        await operator.letters.count(),
    )


async def _show_once(redis_url: str | None, *, as_json: bool) -> None:
    async with _operating(redis_url) as operator:
        overview = await _look(operator)
    if as_json:
        typer.echo(orjson.dumps(overview.as_json()))
    else:
        console.out.print(overview.as_tables(clock.now_ms()))


async def _watch_json(redis_url: str | None) -> int:
    async with _operating(redis_url) as operator:
        while True:
            typer.echo(orjson.dumps((await _look(operator)).as_json()))
            await asyncio.sleep(WATCH_INTERVAL_S)


async def _watch(redis_url: str | None) -> int:
    async with _operating(redis_url) as operator:
        with Live(console=console.out, auto_refresh=False) as live:
            while True:
                try:
                    shown = (await _look(operator)).as_tables(clock.now_ms())
                except RedisUnavailable as error:
                    # Whoever watches wants to see the end of the outage as well.
                    shown = Text(str(error), style="bad")
                live.update(shown, refresh=True)
                await asyncio.sleep(WATCH_INTERVAL_S)


def _worker_table(living: Sequence[LivingWorker], now_ms: int) -> Table:
    table = _table("worker", "host", "pid", "up", "agents", "active", "runs")
    for worker in living:
        card = worker.card
        table.add_row(
            Text(worker.worker_id, style="name"),
            card.host,
            str(card.pid),
            age(now_ms - card.started_ms),
            ", ".join(card.agents) or "-",
            str(worker.active),
            _runs_text(worker, now_ms),
        )
    return table


def _runs_text(worker: LivingWorker, now_ms: int) -> Text:
    lines = [
        printable(f"{run.run_id} {run.agent} of {run.user_id}, {age(now_ms - run.since_ms)}")
        for run in worker.runs[:_SHOWN_RUNS]
    ]
    more = worker.active - len(lines)
    if more > 0:
        lines.append(f"and {more} more")
    return Text("\n".join(lines) or "-")


def _queue_table(queues: Sequence[AgentQueue], served: set[str]) -> Table:
    table = _table("agent", "waiting", "oldest", "in hand", "oldest", "")
    for queue in queues:
        is_served = queue.agent in served
        table.add_row(
            Text(queue.agent, style="name"),
            *_waiting_cells(queue.waiting),
            *_waiting_cells(queue.in_hand),
            Text("" if is_served else "no worker serves it", style="care"),
        )
    return table


def _waiting_cells(waiting: Waiting) -> tuple[str, str]:
    oldest_ms = waiting.oldest_age_ms
    return str(waiting.count), "-" if oldest_ms is None else age(oldest_ms)


def age(duration_ms: int) -> str:
    """Give a duration in its largest unit: ``8 s``, ``3 min``, ``5 h``, ``2 d``."""
    seconds = max(0, duration_ms) // 1000
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


# --- relay dead-letters ---

_Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="Which; relay dead-letters list shows the ids."),
]
_All = Annotated[bool, typer.Option("--all", help="All that are there now.")]


@dead_letters.command("list")
def list_letters(
    redis_url: RedisUrl = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=200, help="Most to show.")
    ] = 50,
    before: Annotated[
        str | None,
        typer.Option(
            "--before",
            metavar="ID",
            help="Only those before this one: the next page.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each as one JSON object a line.")
    ] = False,
) -> None:
    """List tasks that were given up, the newest first."""
    page = asyncio.run(_page(redis_url, before, limit))
    if as_json:
        for letter in page.letters:
            typer.echo(orjson.dumps(letter.as_json()))
        return
    if not page.letters:
        console.err.print(Text("There are no dead letters.", style="quiet"))
        return
    table = _table("id", "given up", "agent", "user", "run", "reason")
    for letter in page.letters:
        table.add_row(*_letter_cells(letter))
    console.out.print(table)
    if page.before is not None:
        more = f"More: relay dead-letters list --before {page.before}"
        console.err.print(Text(more, style="quiet"))


@dead_letters.command("requeue")
def requeue(ids: _Ids = None, redis_url: RedisUrl = None, is_all: _All = False) -> None:
    """Carry tasks out after all. A run that has ended is asked for again, as a new run."""
    _require_choice(ids, is_all=is_all)
    if not asyncio.run(_requeue(redis_url, ids)):
        raise typer.Exit(1)


@dead_letters.command("drop")
def drop(ids: _Ids = None, redis_url: RedisUrl = None, is_all: _All = False) -> None:
    """Forget tasks that were given up."""
    _require_choice(ids, is_all=is_all)
    if not asyncio.run(_drop(redis_url, ids)):
        raise typer.Exit(1)


def _require_choice(ids: list[str] | None, *, is_all: bool) -> None:
    if is_all == bool(ids):
        raise ConfigurationError("Name dead letters by their ids, or all of them with --all.")


async def _page(redis_url: str | None, before: str | None, limit: int) -> DeadLetterPage:
    async with _operating(redis_url) as operator:
        return await operator.letters.page(before=before, limit=limit)


async def _requeue(redis_url: str | None, ids: list[str] | None) -> bool:
    async with _operating(redis_url) as operator:
        are_all_done = True
        for letter_id in ids or await _all_ids(operator.letters):
            try:
                requeued = await operator.letters.requeue(letter_id)
            except RequestRefused as refused:
                are_all_done = False
                _print_refusal(letter_id, refused)
                continue
            what = {"run": "new run", "task": "its task is queued again,"}[requeued.how]
            typer.echo(f"{letter_id}: {what} {requeued.run_id or 'of ' + requeued.agent}")
        return are_all_done


async def _all_ids(letters: DeadLetters) -> list[str]:
    """Give the ids of those that are there now, the oldest first."""
    ids: list[str] = []
    before = None
    while True:
        page = await letters.page(before=before, limit=200)
        ids += [letter.letter_id for letter in page.letters]
        before = page.before
        if before is None:
            return ids[::-1]


async def _drop(redis_url: str | None, ids: list[str] | None) -> bool:
    async with _operating(redis_url) as operator:
        if not ids:
            typer.echo(f"{await operator.letters.drop_all()} dropped")
            return True
        are_all_done = True
        for letter_id in ids:
            try:
                await operator.letters.drop(letter_id)
            except RequestRefused as refused:
                are_all_done = False
                _print_refusal(letter_id, refused)
                continue
            typer.echo(f"{letter_id}: dropped")
        return are_all_done


def _print_refusal(letter_id: str, refused: RequestRefused) -> None:
    console.print_error(printable(f"{letter_id}: {refused.detail}"))
    console.print_advice(refused.recovery_suggestions, refused.retry_after_ms)


def _letter_cells(letter: DeadLetter) -> tuple[Text, ...]:
    shown = letter.as_json()
    texts = (
        letter.letter_id,
        str(shown["at"])[:19].replace("T", " "),
        letter.agent,
        shown["user_id"] or "-",
        shown["run_id"] or "-",
        letter.reason,
    )
    return tuple(Text(printable(text)) for text in texts)


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="quiet")
    for name in names:
        # Ids are copied: they are never broken.
        table.add_column(name, no_wrap=name in ("id", "worker", "pid", "run"), overflow="fold")
    return table
