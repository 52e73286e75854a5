"""Everybody comes back at once, as after a lost data centre: all are complete, soon."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import OwnRedis
from tests.faults.accounts import verify
from tests.faults.conftest import Report
from tests.faults.load import LoadRun
from tests.faults.scene import under_load
from tests.faults.sizes import sized
from tests.support.fleet import FleetClient, for_each, percentile

LOST_EVENTS = 50
COMPLETE_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Size:
    clients: int


@sized(small=Size(clients=60), full=Size(clients=2_000))
async def test_clients_that_all_come_back_at_once_are_all_complete(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with under_load(tmp_path, server.url) as (stack, load, fleet):
        runs: dict[str, LoadRun] = {}
        for number in range(size.clients):
            client = fleet.add(f"user-{number}")
            runs[client.user_id] = await load.open(client.user_id)
        await fleet.connect()

        async def leave(client: FleetClient) -> None:
            await client.until(lambda one: len(one.events) == 2)
            await client.leave()

        await for_each(fleet.clients, leave)
        for run in load.runs:
            for _ in range(LOST_EVENTS):
                await run.think()
        await load.settle()

        began_s = time.monotonic()
        took: list[float] = []

        async def come_back(client: FleetClient) -> None:
            await client.start()
            run = runs[client.user_id]
            await client.until(lambda one: len(one.events) >= len(run.events), COMPLETE_DEADLINE_S)
            took.append((time.monotonic() - began_s) * 1_000)

        async with asyncio.timeout(COMPLETE_DEADLINE_S):
            await for_each(fleet.clients, come_back, at_once=size.clients)
        verify(load.runs, fleet.clients)
        report(
            clients=size.clients,
            events_each=LOST_EVENTS,
            p50_ms=percentile(took, 0.5),
            p99_ms=percentile(took, 0.99),
            all_complete_ms=max(took),
        )
        stack.assert_no_defects()
