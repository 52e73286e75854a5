"""Another user, in a process of its own: how long do its events take while others do much?

Run as ``python -m tests.faults.bystander``; until SIGTERM it publishes a hundred events a second
and receives them. It prints the delays in ms as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from relay.testing.processes import ManagedProcess
from tests.faults.accounts import arrive, verify
from tests.faults.load import Load, keep_publishing
from tests.support.fleet import Fleet
from tests.support.stack import GatewayProcess, Stack

EVENTS_PER_S = 100
READY = "watching"
START_DEADLINE_S = 20.0
ROOT = Path(__file__).parents[2]


class Bystander:
    """Seen from the test: ``delays_ms`` is filled at the end of the block."""

    def __init__(self) -> None:
        self.delays_ms: list[float] = []


@contextlib.asynccontextmanager
async def bystander(
    stack: Stack, gateway: GatewayProcess, folder: Path, user_id: str = "bob"
) -> AsyncIterator[Bystander]:
    """Watch what another user of a gateway gets while the block runs.

    Where it is used more than once, each needs a user of its own: what an earlier one received
    would be replayed, and count as late.
    """
    command = [sys.executable, "-m", "tests.faults.bystander", stack.redis_url, stack.key_prefix]
    process = ManagedProcess(
        [*command, gateway.url, user_id, stack.token(user_id)],
        environment=dict(os.environ),
        folder=ROOT,
        log_path=folder / f"{user_id}.log",
    )
    process.start()
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            while READY not in process.log:
                assert process.is_running, process.log
                await asyncio.sleep(0.02)
        watched = Bystander()
        yield watched
        assert await process.terminate() == 0, process.log
        watched.delays_ms = json.loads(process.log.splitlines()[-1])
    finally:
        process.end_blocking()


async def watch(redis_url: str, key_prefix: str, url: str, user_id: str, token: str) -> list[float]:
    """Publish and receive until SIGTERM; gives the delays of all events in ms."""
    is_over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_over.set)
    async with Load(redis_url, key_prefix) as load, Fleet([url], lambda _: token) as fleet:
        client = fleet.add(user_id)
        await fleet.connect()
        run = await load.open(user_id)
        print(READY, flush=True)
        await keep_publishing([run], EVENTS_PER_S, is_over.is_set, lifecycle_share=2)
        await run.complete()
        await arrive(load.runs, [client])
        verify(load.runs, [client])
        return [client.delay_s(index) * 1_000 for index in range(len(client.events))]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(watch(*sys.argv[1:]))))
