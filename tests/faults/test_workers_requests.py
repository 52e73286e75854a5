"""Requests of several tabs about the same runs: answers, one thread's messages, cancellations."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay.client import RequestFailed
from tests.conftest import OwnRedis
from tests.faults.conftest import Report
from tests.faults.crew import (
    GRACE_MS,
    SETTINGS,
    Runs,
    add_tabs,
    all_ended,
    ask,
    contact,
    event_of,
    now_s,
    seconds_until,
    seen,
    settings_for,
    start_worker,
    start_workers,
    types_of,
    verify,
)
from tests.faults.scene import user_with_tabs
from tests.faults.sizes import sized
from tests.integration.worker_support import Client
from tests.support.fleet import Fleet, FleetClient, percentile
from tests.support.stack import Stack

SETTLED_S = 1.1


async def outcome_of(request: Awaitable[object]) -> str:
    """Give ``ok`` or the code of the refusal."""
    try:
        await request
    except RequestFailed as failure:
        return failure.code
    return "ok"


async def question(tab: FleetClient, run_id: str, number: int) -> str:
    """Wait for a run's question, counted from 0; give its request id."""

    def asked(one: FleetClient) -> list[str]:
        return [
            event["data"]["request_id"]
            for event in one.events
            if event["type"] == "input_requested" and event["run_id"] == run_id
        ]

    await tab.until(lambda one: len(asked(one)) > number)
    return asked(tab)[number]


@dataclass(frozen=True)
class Answers:
    runs: int
    questions: int
    restarts: int


@sized(
    small=Answers(runs=1, questions=10, restarts=1),
    full=Answers(runs=10, questions=50, restarts=10),
)
async def test_of_two_tabs_that_answer_at_the_same_instant_one_wins(
    size: Answers, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    restart_every = size.runs * size.questions // size.restarts
    wins = [0, 0]
    restarts = 0
    count = itertools.count(1)
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(2), start_worker(stack))
        async with user_with_tabs(stack, "alice") as (client, tabs):
            winners: dict[str, list[str]] = {}
            for _ in range(size.runs):
                run_id = await ask(tabs[0], "ask", size.questions)
                winners[run_id] = []
                for number in range(size.questions):
                    request_id = await question(tabs[0], run_id, number)
                    await question(tabs[1], run_id, number)
                    if next(count) % restart_every == 0:
                        gateway = stack.gateways[restarts % 2]
                        # A client waits longer each time for a relay that does not last.
                        await asyncio.sleep(SETTLED_S)
                        await gateway.kill()
                        await stack.restart(gateway)
                        restarts += 1
                        # Until both tabs have a connection of their own again.
                        for tab in tabs:
                            await tab.until(lambda one: one.is_connected)
                    outcomes = await asyncio.gather(
                        *(
                            outcome_of(tab.client.respond(run_id, request_id, tab.name))
                            for tab in tabs
                        )
                    )
                    assert sorted(outcomes) == ["ok", "unknown_request"]
                    winner = outcomes.index("ok")
                    wins[winner] += 1
                    winners[run_id].append(tabs[winner].name)
                await all_ended(tabs, [run_id])
            runs = await verify(client, tabs, list(winners))
            for run_id, names in winners.items():
                events = runs[run_id]
                assert events[-1]["data"]["result"] == names
                resolved = [event for event in events if event["type"] == "input_resolved"]
                assert [event["data"]["value"] for event in resolved] == names
    assert restarts == size.restarts
    report(answers=sum(wins), first_tab_won=wins[0], second_tab_won=wins[1], restarts=restarts)


@dataclass(frozen=True)
class Requests:
    requests: int


@sized(small=Requests(60), full=Requests(1_000))
async def test_requests_of_one_thread_are_carried_out_in_the_order_accepted(
    size: Requests, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(2), start_workers(stack, 2))
        async with (
            Fleet(stack.urls, stack.token) as fleet,
            Client(settings_for(stack), "alice") as client,
        ):
            # Two tabs on each gateway.
            tabs = [*add_tabs(fleet, client.user_id), *add_tabs(fleet, client.user_id)]
            await fleet.connect()
            began_s = now_s()

            async def send(number: int, tab: FleetClient) -> tuple[str, bool]:
                accepted = await tab.client.send_message(
                    str(number), thread_id="t", agent="echo", message_id=f"m{number}"
                )
                return accepted.run_id, accepted.duplicate

            numbers = range(size.requests)
            # Each tenth one is sent by a second tab as well, at the same instant.
            again = numbers[::10]
            answers = await asyncio.gather(
                *(send(number, tabs[number % 4]) for number in numbers),
                *(send(number, tabs[(number + 1) % 4]) for number in again),
            )
            first, second = answers[: size.requests], answers[size.requests :]
            run_ids = [run_id for run_id, _ in first]
            assert len(set(run_ids)) == size.requests
            for number, (run_id, is_duplicate) in zip(again, second, strict=True):
                assert run_id == run_ids[number]
                assert is_duplicate is not first[number][1], "one of the two was the first"
            await all_ended(tabs, run_ids, 120)
            took_s = now_s() - began_s
            runs = await verify(client, tabs, run_ids)
            offsets = {
                name: {run_id: event_of(events, name)["offset"] for run_id, events in runs.items()}
                for name in ("agent_queued", "agent_started", "agent_completed")
            }
            accepted = sorted(run_ids, key=offsets["agent_queued"].__getitem__)
            executed = sorted(run_ids, key=offsets["agent_started"].__getitem__)
            assert executed == accepted
            for before, after in itertools.pairwise(executed):
                assert offsets["agent_completed"][before] < offsets["agent_started"][after]
            for run_id, number in zip(run_ids, numbers, strict=True):
                assert runs[run_id][-1]["data"]["result"] == str(number)
        stack.assert_no_defects()
    report(requests=size.requests, per_s=size.requests / took_s)


@dataclass(frozen=True)
class Cancels:
    """How often, and how much longer than promised an end may take."""

    rounds: int
    margin_s: float


# In a small round the processes share the machine with whatever else is tested.
@sized(small=Cancels(1, margin_s=2.0), full=Cancels(10, margin_s=0))
async def test_cancelling_in_each_state_from_another_gateway(
    size: Cancels, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    at_once_s: list[float] = []
    stubborn_s: list[float] = []
    orphaned_s: list[float] = []
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        await asyncio.gather(stack.start_gateways(2), start_worker(stack))
        for number in range(size.rounds):
            async with (
                Fleet(stack.urls, stack.token, seed=number) as fleet,
                Client(settings_for(stack), f"user-{number}") as client,
            ):
                asking, stopping = tabs = add_tabs(fleet, client.user_id)
                await fleet.connect()
                await contact(client, 1, is_first=number == 0)
                running = await ask(asking, "talk", "10000 0.02")
                waiting = await ask(asking, "approve", "please")
                retrying = await ask(asking, "flaky", "please")
                in_tool = await ask(asking, "hold", 60, thread_id="t")
                queued = await ask(asking, "echo", "never", thread_id="t")
                stubborn = await ask(asking, "stubborn", "please")
                await seen(stopping, [running], "agent_thinking")
                await seen(stopping, [waiting], "input_requested")
                await seen(stopping, [retrying], "agent_retrying")
                await seen(stopping, [in_tool], "tool_executing")
                await seen(stopping, [stubborn], "agent_started")
                # The queued one before the one that it waits for.
                for run_id in (queued, running, waiting, retrying, in_tool):
                    asked_s = now_s()
                    await stopping.client.cancel(run_id, "enough")
                    await all_ended(tabs, [run_id])
                    at_once_s += [
                        seconds_until(tab, [run_id], ["agent_cancelled"], asked_s)[0]
                        for tab in tabs
                    ]
                    assert await stopping.client.cancel(run_id) == "cancelled"
                asked_s = now_s()
                # Twice, from both tabs: the second one changes nothing.
                await stopping.client.cancel(stubborn)
                await asking.client.cancel(stubborn)
                await all_ended(tabs, [stubborn])
                stubborn_s += seconds_until(asking, [stubborn], ["agent_cancelled"], asked_s)

                orphan = await ask(asking, "hold-again", 60)
                await seen(stopping, [orphan], "tool_executing")
                [worker] = [process for process in stack.workers if process.is_running]
                await worker.kill()
                asked_s = now_s()
                await stopping.client.cancel(orphan)
                await all_ended(tabs, [orphan])
                orphaned_s += seconds_until(asking, [orphan], ["agent_cancelled"], asked_s)
                worker.start()
                await stack.wait_worker_started(worker, times=number + 2)

                run_ids = [queued, running, waiting, retrying, in_tool, stubborn, orphan]
                assert_cancelled(await verify(client, tabs, run_ids), queued, waiting)
    report(
        rounds=size.rounds,
        at_once_p50_ms=percentile(at_once_s, 0.5) * 1_000,
        at_once_max_ms=max(at_once_s) * 1_000,
        ignoring_max_ms=max(stubborn_s) * 1_000,
        worker_dead_max_ms=max(orphaned_s) * 1_000,
    )
    assert max(at_once_s) < 1 + size.margin_s
    assert max(stubborn_s) < GRACE_MS / 1_000 + 1 + size.margin_s
    assert max(orphaned_s) < GRACE_MS / 1_000 + 1 + size.margin_s


def assert_cancelled(runs: Runs, queued: str, waiting: str) -> None:
    """Make sure that all ended cancelled, each as its state asks for."""
    for run_id, events in runs.items():
        types = types_of(events)
        assert types[-1] == "agent_cancelled", types
        assert types.count("cancel_requested") == 1, types
        has_started = "agent_started" in types
        assert has_started is (run_id != queued), types
    resolved = event_of(runs[waiting], "input_resolved")
    assert resolved["data"]["outcome"] == "cancelled"


@dataclass(frozen=True)
class Deploys:
    rounds: int


@pytest.mark.parametrize("grace_s", [20, 1])
@sized(small=Deploys(1), full=Deploys(10))
async def test_deploying_workers_loses_nothing_and_the_approval_still_works(
    size: Deploys, grace_s: int, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    """With time enough the old worker hears the answer, otherwise the new one asks again."""
    server = await own_redis()
    repeated = 0
    async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
        settings = {"WORKER_CONCURRENCY": 6, "WORKER_GRACE_S": grace_s}
        _, old = await asyncio.gather(stack.start_gateways(2), start_worker(stack, **settings))
        for number in range(size.rounds):
            async with user_with_tabs(stack, f"user-{number}", seed=number) as (client, tabs):
                await contact(client, 1, is_first=number == 0)
                at_work = [await ask(tabs[0], "hold-again", 2.5) for _ in range(4)]
                approvals = [await ask(tabs[0], "approve", "please") for _ in range(2)]
                await seen(tabs[1], at_work, "tool_executing")
                for run_id in approvals:
                    await question(tabs[1], run_id, 0)
                queued = [await ask(tabs[1], "echo", "later") for _ in range(6)]
                queued += [await ask(tabs[1], "echo", "later", thread_id="t") for _ in range(4)]
                old.ask_to_end()
                new = await start_worker(stack, **settings)
                await all_ended(tabs, queued)
                asks_again = grace_s == 1
                for run_id in approvals:
                    request_id = await question(tabs[1], run_id, 1 if asks_again else 0)
                    await tabs[1].client.respond(run_id, request_id, True)
                await all_ended(tabs, [*at_work, *approvals])
                assert await old.wait() == 0
                runs = await verify(client, tabs, [*at_work, *approvals, *queued])
                for run_id, events in runs.items():
                    assert events[-1]["type"] == "agent_completed"
                    is_repeated = asks_again and run_id not in queued
                    assert events[-1]["attempt"] == (2 if is_repeated else 1)
                    repeated += is_repeated
                    if run_id in approvals:
                        attempt = 2 if asks_again else 1
                        assert events[-1]["data"]["result"] == f"True in attempt {attempt}"
                old = new
        stack.assert_no_defects()
    report(deploys=size.rounds, runs=size.rounds * 16, asked_again=repeated)
