"""How long the example agents take, from the question to the whole answer."""

from __future__ import annotations

import asyncio
import time

from benchmarks.figures import DISTRIBUTION_COLUMNS, Check, Section, Table, distribution_of
from benchmarks.load import token_for
from benchmarks.processes import ROOT
from benchmarks.stage import Plan, Stage
from benchmarks.websocket import JsonSocket

NAME = "example-run"
LIMIT_MS = 5_000
TIMEOUT_S = 120
PAUSE_S = 0.06
"""Between two requests: a gateway takes twenty frames a second from a user."""

_METHOD = """\
Redis, one gateway and a worker with the example agents as processes; one user asks again and again.
From sending `user_message` to `agent_completed`. The pause between streamed words, which lets
people watch, is switched off (`EXAMPLE_PIECE_MS=0`); the first run, which reads and indexes the
documents, is told apart."""

_RUNS = {
    "words": ("quickstart:worker", "count the words of this and of that, and of these"),
    "docs": ("demo:worker", "How does a client resume after it lost its connection?"),
    "data": ("demo:worker", "city,people\nRome,2800000\nOslo,700000\nBern,134000\n"),
}


def measure(plan: Plan) -> Section:
    plan.say("example runs")
    table = Table(["agent", "first run ms", *DISTRIBUTION_COLUMNS, "events"])
    section = Section(NAME, "A whole example run", _METHOD, tables=[table])
    with Stage(plan, is_pinned=False) as stage:
        server = stage.redis()
        port = stage.gateway(server).port
        for reference in sorted({reference for reference, _ in _RUNS.values()}):
            stage.worker(server, reference, str(ROOT / "examples"))
        for agent, (_, content) in _RUNS.items():
            first_ms, times_ms, events = asyncio.run(_ask(port, agent, content, plan.size(30, 5)))
            distribution = distribution_of(times_ms)
            table.rows.append([agent, f"{first_ms:.0f}", *distribution.cells(), str(events)])
            longest = max(first_ms, distribution.max_ms)
            section.checks.append(Check(f"longest run of `{agent}`", longest, LIMIT_MS, "ms"))
    return section


async def _ask(port: int, agent: str, content: str, runs: int) -> tuple[float, list[float], int]:
    socket = await JsonSocket.open(port, "/v1/ws?since=now", f"relay.v1, bearer.{token_for(0)}")
    await socket.receive_until("connection_established")
    times_ms: list[float] = []
    events = 0
    async with asyncio.timeout(TIMEOUT_S):
        for number in range(runs + 1):
            began_s = time.perf_counter()
            socket.send(
                {
                    "type": "user_message",
                    "id": f"{agent}-{number}",
                    "thread_id": agent,
                    "agent": agent,
                    "content": content,
                }
            )
            events = 0
            kind = ""
            while kind != "agent_completed":
                frame = await socket.receive()
                kind = frame["type"]
                events += "offset" in frame
                if kind in ("error", "agent_error", "agent_cancelled"):
                    raise RuntimeError(f"the run failed: {frame}")
            times_ms.append((time.perf_counter() - began_s) * 1e3)
            await asyncio.sleep(PAUSE_S)
    await socket.close()
    return times_ms[0], times_ms[1:], events
