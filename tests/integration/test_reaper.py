"""The reaper on a real Redis: what becomes of runs whose worker, task or user is gone."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson
import pytest
import pytest_asyncio

from relay import reaper
from relay.amending import amend_run, error_event, look_at_run
from relay.codec import Task
from relay.columns import lifecycle_columns
from relay.deadlines import member_of, shard_key
from relay.events import EventType, format_timestamp
from relay.grammar import RunGrammar
from relay.inputs import InputAnswer
from relay.keys import Keys
from relay.lifecycle import (
    Dispatch,
    ExpireInput,
    FinishCancel,
    Forget,
    LookAgain,
    LoseRun,
    ReportStall,
    RetryAttempt,
)
from relay.orphans import sweep_orphans
from relay.publisher import Publisher
from relay.reaper import Reaper
from relay.run_model import AgentInfo, Claim, NotClaimed, RunLimits, SubmitRequest
from relay.run_stream import RunStream
from relay.runs import RunRegistry
from relay.scripts import RedisLink
from relay.tasks import GROUP, dispatch

pytestmark = pytest.mark.every_redis

LEASE_MS = 150
GRACE_MS = 100
SWEEP_S = 0.3
USER = "alice"


@dataclass
class Parts:
    link: RedisLink
    keys: Keys
    registry: RunRegistry
    reaper: Reaper

    async def submit(self, thread_id: str = "t1") -> str:
        message_id = secrets.token_hex(4)
        request = SubmitRequest(USER, thread_id, "a", "hello", message_id)
        return (await self.registry.submit(request)).run_id

    async def claim(self, run_id: str, lease_ms: int = LEASE_MS, **options: int) -> Claim:
        claim = await self.registry.claim(USER, run_id, "worker-1", lease_ms, **options)
        assert isinstance(claim, Claim)
        return claim

    async def events(self) -> list[tuple[str, dict[str, object]]]:
        entries = await self.link.client.xrange(self.keys.user(USER).log)
        decoded = [orjson.loads(fields[b"e"]) for _, fields in entries]
        return [(event["type"], event["data"]) for event in decoded]

    async def tasks(self) -> int:
        return int(await self.link.client.xlen(self.keys.tasks("a")))


@pytest_asyncio.fixture
async def parts(redis_url: str, key_prefix: str) -> AsyncIterator[Parts]:
    link, keys = RedisLink(redis_url), Keys(key_prefix)
    limits = RunLimits(dispatch_check_ms=LEASE_MS, cancel_grace_ms=GRACE_MS)
    registry = RunRegistry(link, keys, limits)
    await registry.register_agents([AgentInfo("a")])
    await link.client.xgroup_create(keys.tasks("a"), GROUP, "0", mkstream=True)
    yield Parts(
        link, keys, registry, Reaper(link, keys, lease_ms=LEASE_MS, cancel_grace_ms=GRACE_MS)
    )
    await link.aclose()


async def expire_lease(parts: Parts, run_id: str) -> None:
    """Make the lease old instead of waiting for it."""
    await parts.link.client.hset(parts.keys.user(USER).run(run_id), "lease_until_ms", 1)


async def started(parts: Parts, publisher: Publisher, claim: Claim) -> RunStream:
    stream = publisher.open(claim)
    await stream.publish(EventType.AGENT_STARTED, {})
    return stream


async def test_a_lost_run_gets_one_terminal_event_and_its_tools_are_closed(parts: Parts) -> None:
    run_id = await parts.submit()
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = await started(parts, publisher, await parts.claim(run_id))
        await stream.publish(
            EventType.TOOL_EXECUTING, {"tool_call_id": "c1", "tool_name": "s", "parameters": {}}
        )
        await stream.flush()
    await expire_lease(parts, run_id)
    assert await parts.reaper.look_at(USER, run_id) == LoseRun()
    assert await parts.reaper.look_at(USER, run_id) == Forget()
    events = await parts.events()
    assert [name for name, _ in events][-2:] == ["tool_completed", "agent_error"]
    assert events[-1][1]["code"] == "worker_lost"
    assert events[-1][1]["is_recoverable"] is True
    detail = await parts.registry.get(USER, run_id)
    assert detail is not None
    assert detail.summary.status == "error"
    assert await parts.link.client.xlen(parts.keys.dead_letters) == 1


async def test_an_attempt_that_was_lost_before_it_began_leaves_a_legal_stream(parts: Parts) -> None:
    run_id = await parts.submit()
    await parts.claim(run_id, max_attempts=2, stall_after_ms=1)
    await asyncio.sleep(0.01)
    await expire_lease(parts, run_id)
    assert isinstance(await parts.reaper.look_at(USER, run_id), RetryAttempt)
    await parts.link.client.hset(parts.keys.user(USER).run(run_id), "retry_at_ms", 1)
    second = await parts.claim(run_id, LEASE_MS * 100, max_attempts=2, stall_after_ms=1)
    await asyncio.sleep(0.01)
    assert isinstance(await parts.reaper.look_at(USER, run_id), LookAgain), "it has not begun"
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = await started(parts, publisher, second)
        await stream.finish(EventType.AGENT_COMPLETED, {"result": "ok", "duration_ms": 1})
    grammar = RunGrammar()
    for name, data in await parts.events():
        grammar.apply(EventType(name), data)
    assert (grammar.attempt, grammar.is_ended) == (2, True)


async def test_a_lost_attempt_is_tried_again_where_the_agent_allows_it(parts: Parts) -> None:
    run_id = await parts.submit()
    async with Publisher(parts.link, parts.keys) as publisher:
        zombie = await started(parts, publisher, await parts.claim(run_id, max_attempts=2))
        await zombie.flush()
        await expire_lease(parts, run_id)
        assert isinstance(await parts.reaper.look_at(USER, run_id), RetryAttempt)
        too_early = await parts.registry.claim(USER, run_id, "worker-2", LEASE_MS)
        assert too_early == NotClaimed("waiting")
        await parts.link.client.hset(parts.keys.user(USER).run(run_id), "retry_at_ms", 1)
        second = await parts.registry.claim(USER, run_id, "worker-2", LEASE_MS)
        assert isinstance(second, Claim)
        assert second.envelope.attempt == 2
        refusals: list[BaseException] = []
        await zombie.publish(EventType.AGENT_THINKING, {"thought": "from the grave"})
        try:
            await zombie.flush()
        except Exception as refused:  # noqa: BLE001 -- the type is asserted below
            refusals.append(refused)
        assert [type(refused).__name__ for refused in refusals] == ["StaleFence"]
    names = [name for name, _ in await parts.events()]
    assert names == ["agent_queued", "agent_started", "agent_retrying"]


async def test_a_renewed_lease_is_left_alone(parts: Parts) -> None:
    run_id = await parts.submit()
    claim = await parts.claim(run_id)
    await expire_lease(parts, run_id)
    [renewed] = await parts.registry.renew(parts.link, [claim], 60_000)
    assert renewed.is_held
    assert isinstance(await parts.reaper.look_at(USER, run_id), LookAgain)


async def test_a_lease_that_was_renewed_since_the_look_is_not_taken(parts: Parts) -> None:
    run_id = await parts.submit()
    claim = await parts.claim(run_id)
    await expire_lease(parts, run_id)
    found = await look_at_run(parts.link, parts.keys, USER, run_id)
    assert found is not None
    envelope, run = found
    await parts.registry.renew(parts.link, [claim], 60_000)
    lost = [error_event(envelope, run, "worker_lost", "s1")]
    assert not await amend_run(
        parts.link, parts.keys, envelope, run, lost, condition="lease", supersede=True
    )
    assert [name for name, _ in await parts.events()] == ["agent_queued"]


async def test_what_another_reaper_has_done_since_the_look_is_not_done_again(parts: Parts) -> None:
    run_id = await parts.submit()
    await parts.claim(run_id)
    await expire_lease(parts, run_id)
    looks = [await look_at_run(parts.link, parts.keys, USER, run_id) for _ in range(2)]
    is_done = []
    for found in looks:
        assert found is not None
        lost = [error_event(*found, "worker_lost", "s1")]
        is_done.append(
            await amend_run(parts.link, parts.keys, *found, lost, condition="lease", supersede=True)
        )
    assert is_done == [True, False]
    assert [name for name, _ in await parts.events()] == ["agent_queued", "agent_error"]


async def test_progress_since_the_look_is_no_stall(parts: Parts) -> None:
    run_id = await parts.submit()
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = await started(parts, publisher, await parts.claim(run_id, 60_000))
        await stream.flush()
        found = await look_at_run(parts.link, parts.keys, USER, run_id)
        assert found is not None
        await asyncio.sleep(0.002)
        await stream.delta("progress")
        await stream.flush()
        data = {"idle_ms": 9, "last_event": "agent_started"}
        event = lifecycle_columns(found[0], EventType.AGENT_STALLED, found[1].now_ms, data)
        said = await amend_run(
            parts.link, parts.keys, *found, [event], condition="stall", supersede=False
        )
        assert not said
        await stream.finish(EventType.AGENT_COMPLETED, {"result": "ok", "duration_ms": 1})


async def test_a_reaper_that_has_only_just_met_redis_takes_nothing(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage every lease may have expired although the workers live."""
    monkeypatch.setattr(reaper, "POLL_S", 0.01)
    run_id = await parts.submit()
    await parts.claim(run_id)
    await expire_lease(parts, run_id)
    index = shard_key(parts.keys, USER)
    await parts.link.client.zadd(index, {member_of(USER, run_id): 1})
    async with Reaper(parts.link, parts.keys, lease_ms=60_000, cancel_grace_ms=GRACE_MS):
        await asyncio.sleep(0.3)
    assert [name for name, _ in await parts.events()] == ["agent_queued"]
    assert await parts.link.client.zscore(index, member_of(USER, run_id)) is not None


async def test_a_reaper_that_has_only_just_met_redis_does_what_time_alone_decides(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "POLL_S", 0.01)
    index, asking_id = shard_key(parts.keys, USER), await parts.submit("asking")
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = await started(parts, publisher, await parts.claim(asking_id, 60_000))
        asked = {"request_id": "r1", "prompt": "Send?", "kind": "approval"}
        await stream.publish(
            EventType.INPUT_REQUESTED, {**asked, "expires_at": format_timestamp(1_000)}
        )
        await stream.flush()
        retrying_id = await parts.submit("retrying")
        claim = await parts.claim(retrying_id, 60_000, max_attempts=2)
        failing = await started(parts, publisher, claim)
        again = {"attempt": 2, "reason": "upstream_error", "delay_ms": 1}
        await failing.retry(again)
        tasks = await parts.tasks()
        for run_id in (asking_id, retrying_id):
            await parts.link.client.zadd(index, {member_of(USER, run_id): 1})
        async with (
            asyncio.timeout(10),
            Reaper(parts.link, parts.keys, lease_ms=600_000, cancel_grace_ms=GRACE_MS),
        ):
            while await parts.tasks() == tasks:
                await asyncio.sleep(0.01)
            while (await parts.events())[-1][0] != "input_resolved":
                await asyncio.sleep(0.01)
        await stream.finish(EventType.AGENT_COMPLETED, {"result": "ok", "duration_ms": 1})


async def test_a_superseded_lease_cannot_be_renewed(parts: Parts) -> None:
    run_id = await parts.submit()
    claim = await parts.claim(run_id, max_attempts=2)
    await expire_lease(parts, run_id)
    await parts.reaper.look_at(USER, run_id)
    [renewed] = await parts.registry.renew(parts.link, [claim], 60_000)
    assert (renewed.is_held, renewed.reason) == (False, "stale")


async def test_a_run_that_ignores_its_cancellation_is_ended_after_the_grace_time(
    parts: Parts,
) -> None:
    run_id = await parts.submit()
    claim = await parts.claim(run_id, 60_000)
    assert (await parts.registry.cancel(USER, run_id)).status == "cancel_requested"
    assert isinstance(await parts.reaper.look_at(USER, run_id), LookAgain)
    await parts.link.client.hset(parts.keys.user(USER).run(run_id), "cancel_ms", 1)
    assert await parts.reaper.look_at(USER, run_id) == FinishCancel()
    names = [name for name, _ in await parts.events()]
    assert names == ["agent_queued", "cancel_requested", "agent_cancelled"]
    [renewed] = await parts.registry.renew(parts.link, [claim], 60_000)
    assert renewed.reason == "ended"


async def test_silence_is_told_once_until_there_is_progress_again(parts: Parts) -> None:
    run_id = await parts.submit()
    async with Publisher(parts.link, parts.keys) as publisher:
        claim = await parts.claim(run_id, 60_000, stall_after_ms=1)
        stream = await started(parts, publisher, claim)
        await stream.flush()
        await asyncio.sleep(0.01)
        assert isinstance(await parts.reaper.look_at(USER, run_id), ReportStall)
        assert isinstance(await parts.reaper.look_at(USER, run_id), LookAgain)
        await stream.delta("progress")
        await stream.flush()
        await asyncio.sleep(0.01)
        assert isinstance(await parts.reaper.look_at(USER, run_id), ReportStall)
        await stream.finish(EventType.AGENT_COMPLETED, {"result": "ok", "duration_ms": 1})
    stalls = [data for name, data in await parts.events() if name == "agent_stalled"]
    assert [stall["last_event"] for stall in stalls] == ["agent_started", "agent_stalled"]


async def test_silence_is_looked_for_from_the_claim_on_however_long_the_lease(
    parts: Parts,
) -> None:
    run_id = await parts.submit()
    index = shard_key(parts.keys, USER)
    await parts.link.client.zadd(index, {member_of(USER, run_id): 2**50})
    await parts.claim(run_id, 60_000, stall_after_ms=2_000)
    claimed_ms = await parts.link.client.hget(parts.keys.user(USER).run(run_id), "claimed_ms")
    look_ms = await parts.link.client.zscore(index, member_of(USER, run_id))
    assert look_ms - int(claimed_ms) <= 2_000
    opened = SubmitRequest(USER, "t2", "a", "hello", secrets.token_hex(4))
    claim = await parts.registry.open_run(opened, "w", 60_000, fence="f", stall_after_ms=2_000)
    look_ms = await parts.link.client.zscore(index, member_of(USER, claim.run_id))
    assert look_ms - claim.created_ms <= 2_000


async def test_an_input_request_expires_and_an_answer_after_that_is_refused(parts: Parts) -> None:
    run_id = await parts.submit()
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = await started(parts, publisher, await parts.claim(run_id, 60_000))
        asked = {"request_id": "r1", "prompt": "Send?", "kind": "approval"}
        await stream.publish(
            EventType.INPUT_REQUESTED, {**asked, "expires_at": format_timestamp(1_000)}
        )
        await stream.flush()
        assert await parts.reaper.look_at(USER, run_id) == ExpireInput("r1")
        name, data = (await parts.events())[-1]
        assert (name, data["outcome"]) == ("input_resolved", "expired")
        try:
            await parts.registry.answer_input(USER, run_id, "r1", InputAnswer(value=True))
            code = "accepted"
        except Exception as refused:  # noqa: BLE001 -- asserted below
            code = getattr(refused, "code", repr(refused))
        assert code == "unknown_request"


async def test_a_run_whose_task_is_gone_is_dispatched_again_but_not_twice(parts: Parts) -> None:
    run_id = await parts.submit()
    assert await parts.reaper.look_at(USER, run_id) == Dispatch()
    assert await parts.tasks() == 1, "its task still waits in the stream"
    await parts.link.client.xtrim(parts.keys.tasks("a"), maxlen=0)
    assert await parts.reaper.look_at(USER, run_id) == Dispatch()
    assert await parts.tasks() == 1
    await parts.reaper.look_at(USER, run_id)
    assert await parts.tasks() == 1


async def test_the_next_run_of_a_thread_starts_although_nobody_dispatched_it(parts: Parts) -> None:
    first, second = await parts.submit(), await parts.submit()
    assert isinstance(await parts.reaper.look_at(USER, second), LookAgain)
    await parts.registry.cancel(USER, first)
    await parts.link.client.xtrim(parts.keys.tasks("a"), maxlen=0)
    assert await parts.reaper.look_at(USER, second) == Dispatch()
    assert await parts.tasks() == 1


async def test_of_many_reapers_one_ends_the_run(parts: Parts) -> None:
    run_id = await parts.submit()
    await parts.claim(run_id)
    await expire_lease(parts, run_id)
    reapers = [
        Reaper(parts.link, parts.keys, lease_ms=LEASE_MS, cancel_grace_ms=GRACE_MS)
        for _ in range(8)
    ]
    await asyncio.gather(*(reaper.look_at(USER, run_id) for reaper in reapers))
    names = [name for name, _ in await parts.events()]
    assert names.count("agent_error") == 1
    assert await parts.link.client.xlen(parts.keys.dead_letters) == 1


async def test_a_running_reaper_finds_what_is_due_after_a_lease_of_contact(parts: Parts) -> None:
    run_id = await parts.submit()
    await parts.claim(run_id)
    async with asyncio.timeout(10), parts.reaper:
        while True:
            detail = await parts.registry.get(USER, run_id)
            assert detail is not None
            if detail.summary.status == "error":
                break
            await asyncio.sleep(0.05)


async def test_tasks_of_a_dead_worker_are_given_back(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "SWEEP_S", SWEEP_S)
    run_id = await parts.submit()
    stream = parts.keys.tasks("a")
    taken = await parts.link.client.xreadgroup(GROUP, "dead-worker", {stream: ">"})
    assert len(taken) == 1
    await asyncio.sleep(LEASE_MS / 1000 + 0.05)
    async with asyncio.timeout(20), parts.reaper:
        while True:
            consumers = await parts.link.client.xinfo_consumers(stream, GROUP)
            if not consumers:
                break
            await asyncio.sleep(0.05)
    # The run's own deadline may have dispatched it as well; the claim lets one worker win.
    assert await parts.tasks() in (1, 2)
    assert isinstance(await parts.registry.claim(USER, run_id, "w2", LEASE_MS), Claim)
    assert isinstance(await parts.registry.claim(USER, run_id, "w3", LEASE_MS), NotClaimed)


async def test_an_undecodable_task_of_a_dead_worker_becomes_a_dead_letter(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "SWEEP_S", SWEEP_S)
    stream = parts.keys.tasks("a")
    await parts.link.client.xadd(stream, {"task": b"\xc1 not msgpack"})
    await parts.link.client.xreadgroup(GROUP, "dead-worker", {stream: ">"})
    await asyncio.sleep(LEASE_MS / 1000 + 0.05)
    async with asyncio.timeout(20), parts.reaper:
        while not await parts.link.client.xlen(parts.keys.dead_letters):
            await asyncio.sleep(0.05)
    await dispatch(parts.link, parts.keys, Task(USER, "run_x", "a"))


async def test_names_that_are_no_text_do_not_keep_the_sweep_from_other_agents(parts: Parts) -> None:
    client = parts.link.client
    await client.hset(parts.keys.agents, mapping={b"\xff": b"{}", "aaa": "{}", "zzz": "{}"})
    await client.set(parts.keys.tasks("aaa"), "not a stream")
    stream = parts.keys.tasks("zzz")
    await client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    await client.xgroup_createconsumer(stream, GROUP, "worker-dead")
    await asyncio.sleep(0.01)

    await sweep_orphans(parts.link, parts.keys, lease_ms=1)

    assert await client.xinfo_consumers(stream, GROUP) == []


async def test_agents_that_are_not_understood_are_left_out_of_the_list(parts: Parts) -> None:
    known = await parts.registry.agents()
    await parts.link.client.hset(
        parts.keys.agents, mapping={b"\xff": b"{}", "x": "{", "y": "[]", "z": b"\xff"}
    )
    assert await parts.registry.agents() == known
