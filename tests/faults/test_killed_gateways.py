"""P7: a gateway that is killed costs its clients no event and less than a second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.conftest import Report
from tests.faults.load import keep_publishing
from tests.faults.scene import under_load
from tests.faults.sizes import one_size, sized
from tests.integration.gateway_support import raw_tab
from tests.support.fleet import EventStreamClient, percentile
from tests.support.stack import Stack


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
        assert steps >= 0.9 * size.published_per_s * size.seconds, "the load was not kept up"
        # A gateway that is slow to come back delays the next kill.
        assert kills >= 0.7 * size.seconds / size.kill_every_s
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


PLACES_DEADLINE_S = 10.0
"""Three seconds of its sign of life, and what a busy machine adds."""


@pytest.mark.faults_full
async def test_places_of_a_killed_gateway_are_free_within_seconds(
    own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    limit = {"MAX_CONNECTIONS_PER_USER": 2}
    async with Stack(tmp_path, server.url, settings=limit) as stack:
        dead, alive = await stack.start_gateways(2)
        bearer = {"Authorization": f"Bearer {stack.token('alice')}"}
        async with contextlib.AsyncExitStack() as tabs:
            for _ in range(2):
                opened = await tabs.enter_async_context(raw_tab(dead.url, headers=bearer))
                await opened.until("connection_established")
            await dead.kill()
            killed_s = time.monotonic()
            # Another device, which takes over nobody's place.
            answers: list[int] = []
            while True:
                try:
                    async with raw_tab(alive.url, headers=bearer) as back:
                        await back.until("connection_established")
                        break
                except InvalidStatus as error:
                    answers.append(error.response.status_code)
                assert time.monotonic() - killed_s < PLACES_DEADLINE_S
                await asyncio.sleep(0.05)
            free_after_s = time.monotonic() - killed_s
        report(refused=len(answers), free_after_ms=free_after_s * 1_000)
        assert set(answers) == {429}
        stack.assert_no_defects()
