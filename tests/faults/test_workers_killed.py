"""P4 and P6: killed or frozen workers cost no run its end, and say nothing afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from relay.dead_letters import DeadLetters
from relay.keys import Keys
from relay.testing.processes import ManagedProcess
from tests.conftest import OwnRedis
from tests.faults.conftest import Report
from tests.faults.crew import (
    LEASE_MS,
    SETTINGS,
    WHOLE_TEXT,
    all_ended,
    ask,
    ask_many,
    contact,
    event_of,
    now_s,
    run_of_worker,
    seconds_until,
    seen,
    start_worker,
    start_workers,
    types_of,
    verify,
)
from tests.faults.scene import user_with_tabs
from tests.faults.sizes import sized
from tests.faults.worker_agents import talked
from tests.support.fleet import percentile
from tests.support.stack import Stack

TALK_STEPS = 60


@dataclass(frozen=True)
class Kills:
    """How often, and how much longer than a lease and a second it may take until all are told."""

    rounds: int
    margin_s: float


# In a small round seven processes share the machine with whatever else is tested.
@sized(small=Kills(rounds=1, margin_s=2.5), full=Kills(rounds=50, margin_s=0))
async def test_killed_workers_runs_end_or_are_retried_on_every_tab(
    size: Kills, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    lost_after_s: list[float] = []
    lost_runs = 0
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(3), start_workers(stack, 3))
        for number in range(size.rounds):
            async with user_with_tabs(stack, f"user-{number}", seed=number) as (client, tabs):
                await contact(client, 3, is_first=number == 0)
                # Of three workers with sixty runs, one has twenty at least.
                agents = ["hold", "hold-again"] * 30
                run_ids = await ask_many(tabs, agents, LEASE_MS / 1_000 + 2.5)
                for tab in tabs:
                    await seen(tab, run_ids, "tool_executing")
                owners = await run_of_worker(client, stack, run_ids)
                victim = max(owners, key=lambda process: len(owners[process]))
                lost = owners[victim]
                assert len(lost) >= 20
                killed_s = now_s()
                await victim.kill()
                replacement = asyncio.create_task(start_worker(stack))
                await all_ended(tabs, run_ids)
                await replacement
                runs = await verify(
                    client,
                    tabs,
                    run_ids,
                    texts={
                        run_id: WHOLE_TEXT
                        for run_id, agent in zip(run_ids, agents, strict=True)
                        if agent == "hold-again" or run_id not in lost
                    },
                )
                for run_id, agent in zip(run_ids, agents, strict=True):
                    events = runs[run_id]
                    if run_id not in lost:
                        assert events[-1]["type"] == "agent_completed"
                        assert events[-1]["attempt"] == 1
                    elif agent == "hold":
                        assert events[-1]["data"]["code"] == "worker_lost"
                    else:
                        assert event_of(events, "agent_retrying")["data"]["attempt"] == 2
                        assert events[-1]["type"] == "agent_completed"
                    if run_id in lost:
                        closed = next(one for one in events if one["type"] == "tool_completed")
                        assert closed["data"]["status"] == "error"
                for tab in tabs:
                    told = ["agent_retrying", "agent_error"]
                    lost_after_s += seconds_until(tab, lost, told, killed_s)
                lost_runs += len(lost)
        stack.assert_no_defects()
    report(
        kills=size.rounds,
        lost_runs=lost_runs,
        told_after_p50_s=percentile(lost_after_s, 0.5),
        told_after_p99_s=percentile(lost_after_s, 0.99),
        told_after_max_s=max(lost_after_s),
    )
    assert max(lost_after_s) < LEASE_MS / 1_000 + 1 + size.margin_s


def told_off(process: ManagedProcess) -> int:
    """Count the runs that a worker says to have lost to another one."""
    return process.log.count('"run_refused"') + process.log.count('"run_ended_elsewhere"')


@dataclass(frozen=True)
class Size:
    rounds: int


@sized(small=Size(rounds=1), full=Size(rounds=50))
async def test_worker_that_wakes_up_after_its_lease_says_nothing_more(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    runs_taken = 0
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(2), start_workers(stack, 2))
        for number in range(size.rounds):
            async with user_with_tabs(stack, f"user-{number}", seed=number) as (client, tabs):
                await contact(client, 2, is_first=number == 0)
                agents = ["talk-again"] * 6 + ["hold-again"] * 2
                contents = [TALK_STEPS] * 6 + [60] * 2
                run_ids = [
                    await ask(tabs[0], agent, content)
                    for agent, content in zip(agents, contents, strict=True)
                ]
                await seen(tabs[0], run_ids, "agent_started")
                owners = await run_of_worker(client, stack, run_ids)
                zombie = max(owners, key=lambda process: len(owners[process]))
                before = told_off(zombie)
                zombie.pause()
                # What it had already ended, or sent to Redis by then, is not lost with it.
                await asyncio.sleep(0.05)
                frozen = [
                    run_id
                    for run_id in owners[zombie]
                    if await client.status(run_id) not in ("completed", "error", "cancelled")
                ]
                await seen(tabs[0], frozen, "agent_retrying")
                # In the middle of the second attempts, which talk on elsewhere.
                await tabs[0].until(
                    lambda one, frozen=frozen: (
                        {
                            event["run_id"]
                            for event in one.events
                            if event["type"] == "agent_started" and event["attempt"] == 2
                        }
                        >= set(frozen)
                    )
                )
                zombie.resume()
                # Those that were not frozen and hold for a minute are of no more use.
                held = set(run_ids[6:]) - set(frozen)
                for run_id in held:
                    await tabs[1].client.cancel(run_id)
                await all_ended(tabs, run_ids)
                # Long enough for whatever the woken worker might still want to say.
                await asyncio.sleep(0.5)
                texts = {run_id: talked(TALK_STEPS) for run_id in run_ids[:6]}
                texts |= dict.fromkeys(set(run_ids[6:]) - held, WHOLE_TEXT)
                runs = await verify(client, tabs, run_ids, texts=texts)
                for run_id in frozen:
                    events = runs[run_id]
                    taken = types_of(events).index("agent_retrying")
                    assert all(event["attempt"] == 1 for event in events[1:taken])
                    assert all(event["attempt"] == 2 for event in events[taken + 1 :])
                    for tab in tabs:
                        attempts = [
                            event["attempt"]
                            for event in tab.events
                            if event["run_id"] == run_id and event["attempt"]
                        ]
                        assert attempts == sorted(attempts), "text of the first attempt came late"
                runs_taken += len(frozen)

                assert told_off(zombie) - before == len(frozen), "it has not noticed"
        stack.assert_no_defects()
    report(freezes=size.rounds, runs_taken_over=runs_taken)


@dataclass(frozen=True)
class PoisonSize:
    poisons: int
    others: int


@sized(small=PoisonSize(poisons=1, others=6), full=PoisonSize(poisons=5, others=40))
async def test_poison_lies_in_the_dead_letters_and_the_others_go_on(
    size: PoisonSize, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    restarts = 0
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(2), start_workers(stack, 2))
        async with user_with_tabs(stack, "alice") as (client, tabs):
            await contact(client, 2, is_first=False)

            async def keep_alive() -> None:
                """Start whatever worker has died again, as a process supervisor does."""
                nonlocal restarts
                while True:
                    for process in stack.workers:
                        if not process.is_running:
                            process.start()
                            restarts += 1
                    await asyncio.sleep(0.1)

            supervisor = asyncio.create_task(keep_alive())
            try:
                others = await ask_many(tabs, ["echo"] * size.others, "hello")
                poisons = []
                for _ in range(size.poisons):
                    poisons.append(await ask(tabs[0], "poison", "x"))
                    others += await ask_many(tabs, ["echo", "hold-again"], 1)
                    await all_ended(tabs, poisons, 60)
                others += await ask_many(tabs, ["echo"] * size.others, "hello again")
                await all_ended(tabs, others)
            finally:
                supervisor.cancel()
                await asyncio.gather(supervisor, return_exceptions=True)
            runs = await verify(client, tabs, [*poisons, *others])
            for run_id in poisons:
                assert types_of(runs[run_id]).count("agent_started") == 2
                assert runs[run_id][-1]["data"]["code"] == "worker_lost"
            assert {runs[run_id][-1]["type"] for run_id in others} == {"agent_completed"}
            letters = DeadLetters(client.link, Keys(stack.key_prefix), client.registry)
            page = await letters.page()
            assert [letter.task.run_id for letter in page.letters if letter.task] == [
                *reversed(poisons)
            ]
            assert all("worker" in letter.reason for letter in page.letters), page.letters
            report(poisons=size.poisons, others=len(others), workers_started_again=restarts)
            assert restarts >= 2 * size.poisons
