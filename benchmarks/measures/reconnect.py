"""How soon a client is back after its connection was lost, and has what it missed."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.figures import DISTRIBUTION_COLUMNS, Check, Section, Table, distribution_of
from benchmarks.load import token_for
from benchmarks.processes import BenchmarkFailed
from benchmarks.stage import Plan, Stage
from relay.client import Connected, Event, RelayClient, Reset, Update

NAME = "reconnect"
USERS = 20
RATE = 10
SECONDS = 6.0
DROPS = 2
"""Lost connections of each user within its flow."""

LIMIT_MS = 5_000
TIMEOUT_S = 60.0

_MARK = re.compile(r"bench:\d+:(\d+):(\d+);")

_METHOD = """\
{users} users, each with a run that publishes {rate} events a second for {seconds:g} s, and one
`relay.client.RelayClient`, which knows two gateways. Each connection is broken {drops} times on
the way, as a lost network does it, one user after the other. *back* is from then until the
client is connected again, *complete* until it has received an event published after it was
back, and so everything before it. The client waits up to 300 ms, at random, before it tries, so
that those that are lost together do not come together. Every event arrived once and in order,
without a `reset`, or there would be no figures here."""


class _Client(RelayClient):
    """The client, with a connection that can be broken."""

    def drop(self) -> None:
        """Break the connection as a lost network does."""
        self._link.drop()


@dataclass
class _Seen:
    """What one client has experienced; times in milliseconds."""

    numbers: list[int] = field(default_factory=list)
    back_ms: list[float] = field(default_factory=list)
    complete_ms: list[float] = field(default_factory=list)
    lost_s: float | None = None
    back_ns: int | None = None


def measure(plan: Plan) -> Section:
    seconds = plan.size(SECONDS, 3.0)
    plan.say(f"{USERS} clients, each cut off {DROPS} times")
    with Stage(plan, is_pinned=False) as stage:
        server = stage.redis()
        gateways = [stage.gateway(server) for _ in range(2)]
        publisher = stage.publisher(server, "paced", USERS, RATE, seconds)
        publisher.answer()
        urls = [f"http://127.0.0.1:{gateway.port}" for gateway in gateways]
        seen = asyncio.run(_clients(urls, seconds, lambda: publisher.tell("go")))
        publisher.answer()
    _judge(seen, int(RATE * seconds))
    back = distribution_of([time_ms for one in seen for time_ms in one.back_ms])
    complete = distribution_of([time_ms for one in seen for time_ms in one.complete_ms])
    table = Table(["after the loss", *DISTRIBUTION_COLUMNS])
    table.rows.append(["back", *back.cells()])
    table.rows.append(["complete", *complete.cells()])
    method = _METHOD.format(users=USERS, rate=RATE, seconds=seconds, drops=DROPS)
    section = Section(NAME, "Lost connections within a flow", method, tables=[table])
    section.checks.append(Check("longest until back", back.max_ms, LIMIT_MS, "ms"))
    section.checks.append(Check("longest until complete", complete.max_ms, LIMIT_MS, "ms"))
    return section


def _judge(seen: list[_Seen], expected: int) -> None:
    for user, one in enumerate(seen):
        if one.numbers != list(range(expected)):
            raise BenchmarkFailed(f"user {user} got {len(one.numbers)} of {expected}, or repeated")
        if len(one.back_ms) != DROPS or len(one.complete_ms) != DROPS:
            raise BenchmarkFailed(f"user {user} came back {len(one.back_ms)} of {DROPS} times")


async def _clients(urls: list[str], seconds: float, go: Callable[[], None]) -> list[_Seen]:
    seen = [_Seen() for _ in range(USERS)]
    expected = int(RATE * seconds)
    ready = asyncio.Barrier(USERS + 1)
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        for user, one in enumerate(seen):
            group.create_task(_client(user, urls, one, expected, ready, seconds))
        await ready.wait()
        go()
    return seen


async def _client(
    user: int, urls: list[str], one: _Seen, expected: int, ready: asyncio.Barrier, seconds: float
) -> None:
    ordered = [*urls[user % len(urls) :], *urls[: user % len(urls)]]
    async with _Client(ordered, token_for(user), since="now") as client:
        await ready.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(_drop(client, one, user, seconds))
            async for update in client.updates():
                _take(one, update)
                if len(one.numbers) == expected:
                    break


def _take(one: _Seen, update: Update) -> None:
    match update:
        case Connected() if one.lost_s is not None and one.back_ns is None:
            one.back_ns = time.monotonic_ns()
            one.back_ms.append((time.perf_counter() - one.lost_s) * 1e3)
        case Reset():
            raise BenchmarkFailed(f"a client was told to start over: {update}")
        case Event() if mark := _MARK.search(str(update.data)):
            one.numbers.append(int(mark[1]))
            _note_complete(one, int(mark[2]))


def _note_complete(one: _Seen, published_ns: int) -> None:
    if one.lost_s is not None and one.back_ns is not None and published_ns > one.back_ns:
        one.complete_ms.append((time.perf_counter() - one.lost_s) * 1e3)
        one.lost_s = one.back_ns = None


async def _drop(client: _Client, one: _Seen, user: int, seconds: float) -> None:
    """Break the connection at even distances, the users one after the other."""
    pause_s = seconds / (DROPS + 2)
    await asyncio.sleep(pause_s * (0.5 + user / USERS / 2))
    for number in range(DROPS):
        if number:
            await asyncio.sleep(pause_s)
        one.lost_s = time.perf_counter()
        client.drop()
