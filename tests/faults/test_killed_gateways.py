"""P7: a gateway that is killed costs its clients no event and less than a second."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.conftest import Report
from tests.faults.load import keep_publishing
from tests.faults.scene import under_load
from tests.faults.sizes import one_size, sized
from tests.support.fleet import EventStreamClient, percentile


@dataclass(frozen=True)
class Size:
    users: int
    clients_per_user: int
    published_per_s: float
    seconds: float
    kill_every_s: float
    p99_limit_ms: float


@sized(
    small=Size(10, 2, published_per_s=100, seconds=7, kill_every_s=2, p99_limit_ms=5_000),
    full=Size(100, 2, published_per_s=1_000, seconds=60, kill_every_s=3, p99_limit_ms=1_000),
)
async def test_gateways_killed_in_turn_cost_no_event(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with under_load(tmp_path, server.url) as (stack, load, fleet):
        users = [f"user-{number}" for number in range(size.users)]
        for user_id in users:
            for _ in range(size.clients_per_user):
                fleet.add(user_id)
        fleet.add(users[0], kind=EventStreamClient)
        await fleet.connect()
        runs = [await load.open(user_id) for user_id in users]
        end_s = time.monotonic() + size.seconds
        publishing = asyncio.create_task(
            keep_publishing(runs, size.published_per_s, lambda: time.monotonic() > end_s)
        )
        kills = 0
        due_s = time.monotonic() + size.kill_every_s
        while due_s < end_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            due_s += size.kill_every_s
            gateway = stack.gateways[kills % 2]
            await gateway.kill()
            kills += 1
            # The other one is killed only when this one is back: two are not none.
            await stack.restart(gateway)
        steps = await publishing
        await load.complete_all()
        await arrive(load.runs, fleet.clients)
        verify(load.runs, fleet.clients)
        durations = [outage.duration_ms for outage in fleet.outages()]
        assert durations
        report(
            clients=len(fleet.clients),
            published=steps,
            kills=kills,
            outages=len(durations),
            p50_ms=percentile(durations, 0.5),
            p99_ms=percentile(durations, 0.99),
            max_ms=max(durations),
        )
        assert percentile(durations, 0.99) < size.p99_limit_ms
        stack.assert_no_defects()


@one_size
async def test_a_paused_gateway_is_given_up_by_its_clients(
    own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with under_load(tmp_path, server.url, settings={"HEARTBEAT_MS": 400}) as (
        stack,
        load,
        fleet,
    ):
        paused, other = stack.gateways
        client = fleet.add("alice", urls=[paused.url, other.url])
        await fleet.connect()
        run = await load.open("alice")
        await client.until(lambda one: len(one.events) == 2)
        paused.pause()
        began_s = time.monotonic()
        await run.think()
        await client.until(lambda one: len(one.events) == 3)
        silent_s = time.monotonic() - began_s
        # What it had for the client is not delivered a second time when it wakes up.
        paused.resume()
        await run.complete()
        await arrive(load.runs, fleet.clients)
        await paused.wait_ready()
        verify(load.runs, fleet.clients)
        assert len(client.outages) == 1
        report(back_after_ms=silent_s * 1_000)
