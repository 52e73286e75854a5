"""P3 and P6: whatever happens between workers and Redis, each run completes and says all once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import OwnRedis
from tests.faults.conftest import Report
from tests.faults.crew import (
    LEASE_MS,
    SETTINGS,
    all_ended,
    ask,
    ask_many,
    contact,
    event_of,
    now_s,
    seen,
    start_worker,
    start_workers,
    types_of,
    verify,
)
from tests.faults.scene import user_with_tabs
from tests.faults.sizes import sized
from tests.faults.worker_agents import BEGUN, FINISHED, STALL_AFTER_MS, talked
from tests.support.fleet import FleetClient
from tests.support.proxy import RedisProxy
from tests.support.stack import Stack

ARRIVED_AFTER_S = 0.02
STALL_TOLD_WITHIN_MS = 900
"""Before a lease has passed: until then nothing else that is due makes the reapers look."""


def has_more(known: int, run_ids: list[str], tab: FleetClient) -> bool:
    """Say whether a tab has seen more events than these, or the end of one of the runs."""
    return len(tab.events) > known or any(map(tab.has_ended, run_ids))


@dataclass(frozen=True)
class Cuts:
    cuts: int


@sized(small=Cuts(20), full=Cuts(1_000))
async def test_publish_whose_acknowledgement_is_cut_appears_once(
    size: Cuts, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    cuts = 0
    with RedisProxy(server.port) as proxy:
        async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
            await asyncio.gather(
                stack.start_gateways(2), start_worker(stack, redis_url=proxy.redis_url)
            )
            number = 0
            while cuts < size.cuts:
                number += 1
                async with user_with_tabs(stack, f"user-{number}", seed=number) as (client, tabs):
                    run_ids = await ask_many(tabs, ["talk"] * 4, "200 0.005")
                    while cuts < size.cuts and not any(map(tabs[0].has_ended, run_ids)):
                        # The batch is carried out, and its answer lost; now and then the answer
                        # to its repetition, too.
                        armed = 1 if cuts % 10 else 2
                        proxy.lose_next_reply(b"agent_thinking", armed)
                        while proxy.replies_to_lose and not tabs[0].has_ended(run_ids[0]):
                            await asyncio.sleep(0.005)
                        cuts += armed - proxy.replies_to_lose
                        # What was on its way is here soon; more comes only after the repetition.
                        await asyncio.sleep(ARRIVED_AFTER_S)
                        await tabs[0].until(partial(has_more, len(tabs[0].events), run_ids))
                    proxy.lose_next_reply(count=0)
                    await all_ended(tabs, run_ids, 60)
                    texts = dict.fromkeys(run_ids, talked(200))
                    runs = await verify(client, tabs, run_ids, texts=texts)
                    for run_id, events in runs.items():
                        thoughts = [
                            event["data"]["thought"]
                            for event in events
                            if event["type"] == "agent_thinking"
                        ]
                        assert thoughts == [f"{run_id}.1.{step}" for step in range(0, 200, 4)]
                        assert events[-1]["type"] == "agent_completed"
            stack.assert_no_defects()
    report(cut_acknowledgements=cuts, runs=4 * number)


@dataclass(frozen=True)
class Outage:
    runs: int
    steps: int
    step_s: float


@pytest.mark.parametrize("fault", ["restarted", "killed", "paused"])
@sized(small=Outage(12, steps=24, step_s=0.1), full=Outage(100, steps=50, step_s=0.2))
async def test_runs_go_on_when_redis_is_back(
    size: Outage, fault: str, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis(append_only=True)
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(2), start_workers(stack, 2))
        async with user_with_tabs(stack, "alice") as (client, tabs):
            await contact(client, 2)
            content = f"{size.steps} {size.step_s}"
            run_ids = await ask_many(tabs, ["talk"] * size.runs, content)
            await seen(tabs[0], run_ids, "agent_thinking")
            began_s = time.monotonic()
            if fault == "paused":
                server.pause()
                await asyncio.sleep(2 * LEASE_MS / 1_000)
                server.resume()
            elif fault == "killed":
                await server.kill()
                await server.start()
            else:
                await server.restart()
            away_s = time.monotonic() - began_s
            await all_ended(tabs, run_ids)
            runs = await verify(
                client, tabs, run_ids, texts=dict.fromkeys(run_ids, talked(size.steps))
            )
            for events in runs.values():
                assert events[-1]["type"] == "agent_completed"
                assert events[-1]["attempt"] == 1
                assert types_of(events).count("agent_started") == 1
            report(runs=size.runs, away_s=away_s)


@dataclass(frozen=True)
class Blocks:
    blocks: int


@sized(small=Blocks(1), full=Blocks(5))
async def test_agent_that_blocks_its_event_loop_is_stalled_and_goes_on(
    size: Blocks, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    told_after_s: list[float] = []
    idle_ms: list[int] = []
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        # Every one of these processes has a reaper that would take the run.
        await asyncio.gather(stack.start_gateways(2), start_workers(stack, 2))
        async with user_with_tabs(stack, "alice") as (client, tabs):
            await contact(client, 2)
            run_ids = []
            for _ in range(size.blocks):
                asked_s = now_s()
                run_id = await ask(tabs[0], "block", 3 * LEASE_MS / 1_000)
                run_ids.append(run_id)
                await seen(tabs[0], [run_id], "agent_stalled")
                told_after_s.append(now_s() - asked_s)
                assert not tabs[0].has_ended(run_id)
                await all_ended(tabs, [run_id])
            texts = dict.fromkeys(run_ids, BEGUN + FINISHED)
            runs = await verify(client, tabs, run_ids, texts=texts)
            for events in runs.values():
                assert events[-1]["type"] == "agent_completed"
                assert event_of(events, "agent_started")["attempt"] == 1
                stalls = [event for event in events if event["type"] == "agent_stalled"]
                idle_ms += [stall["data"]["idle_ms"] for stall in stalls]
        stack.assert_no_defects()
    assert min(idle_ms) >= STALL_AFTER_MS
    assert max(idle_ms) < STALL_AFTER_MS + STALL_TOLD_WITHIN_MS
    report(
        blocks=size.blocks,
        stalled_told_after_s=max(told_after_s),
        idle_when_told_max_ms=max(idle_ms),
    )
