"""Streamed text: whoever joins late gets each message once, whole, and the same as everybody."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.conftest import Report
from tests.faults.load import Load, LoadRun
from tests.faults.scene import under_load
from tests.faults.sizes import sized
from tests.support.fleet import Fleet, FleetClient

DELTAS_PER_TOOL = 100
RUN_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Size:
    deltas: int
    joins: int


@dataclass(frozen=True)
class Join:
    """A client that came in the middle, and the channel's offset when it asked."""

    client: FleetClient
    past_offset: int


async def stream(run: LoadRun, deltas: int, *, retry_at: int | None = None) -> None:
    """Publish deltas one by one, each an event of its own, with tool calls between."""
    for number in range(1, deltas + 1):
        await run.delta()
        await run.settle()
        if number == retry_at:
            await run.retry()
        if number % DELTAS_PER_TOOL == 0:
            await run.call_tool()


async def join_while(
    publishing: asyncio.Future[object], fleet: Fleet, load: Load, joins: int, deltas: int
) -> list[Join]:
    """Let clients join when certain numbers of deltas have been published, chosen at random."""
    chooser = random.Random(4)
    points = sorted(chooser.sample(range(1, deltas), joins))
    joined = []
    for point in points:
        while load.runs[-1].pieces < point and not publishing.done():
            await asyncio.sleep(0.001)
        stored = await load.redis.hget(load.keys.user("alice").channel, "offset")
        client = fleet.add("alice", name=f"join-at-{point}")
        await client.start()
        joined.append(Join(client, int(stored)))
    return joined


def assert_past_is_joined(joined: list[Join], runs: list[LoadRun]) -> None:
    """Each message of the past must have come in one frame at most."""
    for join in joined:
        for run in runs:
            past = [
                (event["attempt"], event["data"]["message_id"])
                for event in join.client.events
                if event["type"] == "text_delta"
                and event["run_id"] == run.run_id
                and event["offset"] <= join.past_offset
            ]
            assert len(past) == len(set(past)), (join.client.name, join.past_offset)


@sized(small=Size(deltas=600, joins=8), full=Size(deltas=20_000, joins=50))
async def test_joining_anywhere_gives_each_message_once_and_identical(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    settings = {"MAX_CONNECTIONS_PER_USER": size.joins + 5}
    async with under_load(tmp_path, server.url, settings=settings) as (_, load, fleet):
        witness = fleet.add("alice", name="witness")
        await fleet.connect()
        finished = await load.open("alice")
        await finished.think()
        await finished.call_tool()
        await finished.complete()
        run = await load.open("alice")
        publishing = asyncio.ensure_future(stream(run, size.deltas))
        joined = await join_while(publishing, fleet, load, size.joins, size.deltas)
        await publishing
        await run.complete()
        # The finished run's events are still there, behind all that text.
        everything = fleet.add("alice", since="0", name="everything")
        await everything.start()
        await arrive(load.runs, fleet.clients, RUN_DEADLINE_S)
        verify(load.runs, fleet.clients)
        assert_past_is_joined(joined, [run])
        live = sum(event["type"] == "text_delta" for event in witness.events)
        late = sum(event["type"] == "text_delta" for event in everything.events)
        assert late == len(run.texts)
        report(deltas=size.deltas, text_frames_live=live, text_frames_late=late, joins=size.joins)


@sized(small=Size(deltas=400, joins=6), full=Size(deltas=20_000, joins=50))
async def test_two_runs_side_by_side_do_not_disturb_each_other(
    size: Size, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    settings = {"MAX_CONNECTIONS_PER_USER": size.joins + 5}
    async with under_load(tmp_path, server.url, settings=settings) as (_, load, fleet):
        fleet.add("alice", name="witness")
        await fleet.connect()
        runs = [await load.open("alice"), await load.open("alice")]
        publishing = asyncio.gather(*(stream(run, size.deltas) for run in runs))
        joined = await join_while(publishing, fleet, load, size.joins, size.deltas)
        await publishing
        await load.complete_all()
        await arrive(load.runs, fleet.clients, RUN_DEADLINE_S)
        verify(load.runs, fleet.clients)
        assert_past_is_joined(joined, runs)


@sized(small=Size(deltas=300, joins=6), full=Size(deltas=20_000, joins=50))
async def test_a_retried_attempt_replaces_the_text_of_the_first(
    size: Size, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    settings = {"MAX_CONNECTIONS_PER_USER": size.joins + 5}
    async with under_load(tmp_path, server.url, settings=settings) as (_, load, fleet):
        fleet.add("alice", name="witness")
        await fleet.connect()
        run = await load.open("alice")
        publishing = asyncio.ensure_future(stream(run, size.deltas, retry_at=size.deltas // 2))
        joined = await join_while(publishing, fleet, load, size.joins, size.deltas)
        await publishing
        await run.complete()
        await arrive(load.runs, fleet.clients, RUN_DEADLINE_S)
        verify(load.runs, fleet.clients)
        assert_past_is_joined(joined, [run])
        # Who came after the retry is not shown what it superseded.
        for join in joined:
            attempts = {key[0] for key in join.client.texts(run.run_id).pieces}
            retried = next(e for e in join.client.events if e["type"] == "agent_retrying")
            if retried["offset"] <= join.past_offset:
                assert attempts == {2}
