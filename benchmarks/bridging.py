"""A process that publishes through ``AgentWebSocketBridge``: runs of five events for many users.

    python -m benchmarks.bridging REDIS_URL USERS ROUNDS INTERVAL_S

It prints one JSON line when it is ready, waits for a line on stdin, and prints its figures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time

import structlog
import uvloop

from agent_worker import AgentWebSocketBridge
from benchmarks.figures import distribution_of
from benchmarks.load import user_name
from benchmarks.publishing import wait_for_go
from relay.config import load_settings

EVENTS = 5


async def _run(bridge: AgentWebSocketBridge, user: int, due_ns: int, number: int) -> None:
    """Publish a run: five events, each with a mark; the first one counts from when it was due."""
    numbers = itertools.count(number * EVENTS)

    def mark(at_ns: int | None = None) -> str:
        return f"bench:{user}:{next(numbers)}:{at_ns or time.monotonic_ns()};"

    emitter = bridge.emitter(user_name(user))
    async with emitter.run(thread_id="t", agent="bench", model=mark(due_ns)) as run:
        await run.thinking(mark())
        async with run.tool("search", {"mark": mark()}) as tool:
            tool.result = mark()
        run.result = mark()


async def _publish(
    bridge: AgentWebSocketBridge, user: int, begin_ns: int, rounds: int, interval_s: float
) -> list[float]:
    """Publish one user's runs, each when it is due; give how long each took, acknowledged."""
    times_ms = []
    for number in range(rounds):
        due_ns = begin_ns + int(number * interval_s * 1e9)
        await asyncio.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
        await _run(bridge, user, due_ns, number)
        times_ms.append((time.monotonic_ns() - due_ns) / 1e6)
    return times_ms


async def _main(url: str, users: int, rounds: int, interval_s: float) -> None:
    # Answers go to stdout, so nothing else may.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    settings = load_settings(env_file=None, redis_url=url)
    async with AgentWebSocketBridge(settings, name="bench") as bridge:
        print(json.dumps({"ready": 1}), flush=True)
        await wait_for_go()
        began_ns = time.monotonic_ns()
        spread_ns = int(interval_s / users * 1e9)
        work = (
            _publish(bridge, user, began_ns + user * spread_ns, rounds, interval_s)
            for user in range(users)
        )
        runs = distribution_of(list(itertools.chain(*await asyncio.gather(*work))))
    figures = {
        "samples": runs.samples,
        "p50_ms": runs.p50_ms,
        "p99_ms": runs.p99_ms,
        "p999_ms": runs.p999_ms,
        "max_ms": runs.max_ms,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
