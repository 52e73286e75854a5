"""Submitting, claiming and cancelling runs: the scripts' contracts, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from relay.accepting import Accepting
from relay.cancelling import Cancelling
from relay.codec import decode_task
from relay.deadlines import Deadlines
from relay.errors import RedisUnavailable, RequestRefused
from relay.events import EventType
from relay.run_model import (
    CancelOutcome,
    Claim,
    NotClaimed,
    RunLimits,
    SubmitRequest,
    derive_run_id,
)
from relay.tasks import TASK_FIELD
from tests.integration.script_support import Channel, types

pytestmark = pytest.mark.every_redis

LIMITS = RunLimits(max_active=3, max_queued=3)


@pytest_asyncio.fixture
async def channel(redis_url: str, key_prefix: str) -> AsyncIterator[Channel]:
    async with Channel(redis_url, key_prefix, run_limits=LIMITS) as channel:
        yield channel


async def tasks(channel: Channel) -> list[str]:
    entries = await channel.client.xrange(channel.all_keys.tasks("docs"))
    return [decode_task(fields[TASK_FIELD.encode()]).run_id for _, fields in entries]


async def test_the_same_message_gives_the_same_run(channel: Channel) -> None:
    first = await channel.submit("m1")
    again = await channel.submit("m1", content="something else")
    assert (again.run_id, again.duplicate, first.duplicate) == (first.run_id, True, False)
    assert types(await channel.read()) == ["agent_queued"]
    await channel.registry.cancel(channel.user_id, first.run_id)
    assert (await channel.submit("m1")).status == "cancelled"


async def test_many_at_once_with_one_message_make_one_run(channel: Channel) -> None:
    outcomes = await asyncio.gather(*[channel.submit("m1") for _ in range(20)])
    assert len({outcome.run_id for outcome in outcomes}) == 1
    assert sum(not outcome.duplicate for outcome in outcomes) == 1
    assert types(await channel.read()) == ["agent_queued"]


async def test_one_thread_runs_one_after_the_other(channel: Channel) -> None:
    runs = [await channel.submit(thread_id="t") for _ in range(3)]
    assert await tasks(channel) == [runs[0].run_id]
    claims = [await channel.registry.claim(channel.user_id, run.run_id, "w", 1_000) for run in runs]
    assert [type(claim) for claim in claims] == [Claim, NotClaimed, NotClaimed]
    assert claims[1] == NotClaimed("waiting")


async def test_the_next_run_of_a_thread_is_named_when_one_ends(channel: Channel) -> None:
    run = await channel.started(thread_id="t")
    following = await channel.submit(thread_id="t")
    answer = await run.end()
    assert [answer[6].decode(), answer[7].decode()] == [following.run_id, "docs"]
    await channel.claim(following.run_id)


async def test_quotas_refuse_with_guidance_and_no_effect(channel: Channel) -> None:
    for thread in "abc":
        await channel.submit(thread_id=thread)
    with pytest.raises(RequestRefused) as active:
        await channel.submit(thread_id="d")
    for _ in range(3):
        await channel.submit(thread_id="a")
    with pytest.raises(RequestRefused) as queued:
        await channel.submit(thread_id="b")
    for caught in (active, queued):
        assert caught.value.code == "rate_limited"
        assert caught.value.retryable
    assert (await channel.read()).offset == 6


async def test_an_unknown_agent_is_refused_by_name(channel: Channel) -> None:
    request = SubmitRequest("alice", "t", "nobody", "hi", "m1")
    with pytest.raises(RequestRefused, match=r"nobody.*docs") as caught:
        await channel.registry.submit(request)
    assert caught.value.code == "unknown_agent"


async def test_reject_refuses_while_the_thread_is_busy(channel: Channel) -> None:
    first = await channel.submit(thread_id="t", policy="reject")
    with pytest.raises(RequestRefused, match=first.run_id) as caught:
        await channel.submit(thread_id="t", policy="reject")
    assert caught.value.code == "thread_busy"


async def test_parallel_does_not_wait(channel: Channel) -> None:
    runs = [await channel.submit(thread_id="t", policy="parallel") for _ in range(2)]
    assert await tasks(channel) == [run.run_id for run in runs]
    for run in runs:
        await channel.claim(run.run_id)


async def test_interrupt_cancels_what_is_ahead(channel: Channel) -> None:
    run = await channel.started(thread_id="t")
    waiting = await channel.submit(thread_id="t")
    newest = await channel.submit(thread_id="t", policy="interrupt")
    detail = await channel.registry.get(channel.user_id, waiting.run_id)
    assert detail is not None
    assert detail.summary.status == "cancelled"
    answer = await run.publish(run.event())
    assert answer[5]
    ended = await run.end(EventType.AGENT_CANCELLED)
    assert ended[6].decode() == newest.run_id


class CutShort(Cancelling):
    """What a submit finds where Redis goes away after its script."""

    async def cancel(
        self, user_id: str, run_id: str, *, by: str, reason: str | None
    ) -> CancelOutcome:
        raise RedisUnavailable("gone for a moment")


async def submit_cut_short(channel: Channel, message_id: str) -> None:
    """Submit a request in the thread ``t``, and end before anything is interrupted."""
    link, keys, deadlines = (
        channel.link,
        channel.all_keys,
        Deadlines(channel.link, channel.all_keys),
    )
    cancelling = CutShort(link, keys, deadlines, 1_000)
    accepting = Accepting(link, keys, LIMITS, deadlines, cancelling)
    request = SubmitRequest(channel.user_id, "t", "docs", "hi", message_id, policy="interrupt")
    with pytest.raises(RedisUnavailable):
        await accepting.submit(request)


async def is_cancelled(channel: Channel, run_id: str) -> bool:
    detail = await channel.registry.get(channel.user_id, run_id)
    assert detail is not None
    return detail.summary.cancel_requested


async def test_a_submit_that_was_cut_short_interrupts_when_it_is_repeated(channel: Channel) -> None:
    run = await channel.started(thread_id="t")
    waiting = await channel.submit(thread_id="t")
    await submit_cut_short(channel, "m")
    later = await channel.submit(thread_id="t")
    assert not await is_cancelled(channel, run.run_id)
    # Its agent's policy may have changed since: what counts is the one that it was accepted with.
    again = await channel.submit("m", thread_id="t")
    assert (again.duplicate, again.status) == (True, "queued")
    for run_id, is_interrupted in [
        (run.run_id, True),
        (waiting.run_id, True),
        (again.run_id, False),
        (later.run_id, False),
    ]:
        assert await is_cancelled(channel, run_id) == is_interrupted


async def test_a_repeated_submit_interrupts_nobody_whom_the_first_would_not(
    channel: Channel,
) -> None:
    run = await channel.started(thread_id="t")
    await channel.submit("m", thread_id="t")
    await channel.submit("m", thread_id="t", policy="interrupt")
    assert not await is_cancelled(channel, run.run_id)
    # A process before this one kept no policy: that of the repeated request is the best guess.
    run_id = derive_run_id(channel.user_id, "m")
    await channel.client.hdel(channel.keys.run(run_id), "policy")
    await channel.submit("m", thread_id="t", policy="interrupt")
    assert await is_cancelled(channel, run.run_id)
    await run.end(EventType.AGENT_CANCELLED)
    await channel.claim(run_id)
    again = await channel.submit("m", thread_id="t", policy="interrupt")
    assert again.status == "running"
    assert not await is_cancelled(channel, run_id)


async def test_an_interrupting_run_needs_no_place_in_the_queue(
    redis_url: str, key_prefix: str
) -> None:
    limits = RunLimits(max_active=3, max_queued=0)
    async with Channel(redis_url, key_prefix, run_limits=limits) as channel:
        run = await channel.started(thread_id="t")
        second = await channel.submit(thread_id="t", policy="interrupt")
        assert await is_cancelled(channel, run.run_id)
        # Before the first one has stopped: the second ends at once, and the third has its turn.
        third = await channel.submit(thread_id="t", policy="interrupt")
        assert await is_cancelled(channel, second.run_id)
        with pytest.raises(RequestRefused, match="rate_limited"):
            await channel.submit(thread_id="t")
        ended = await run.end(EventType.AGENT_CANCELLED)
        assert ended[6].decode() == third.run_id
        await channel.claim(third.run_id)


async def test_of_interrupting_requests_at_the_same_instant_the_last_one_waits(
    redis_url: str, key_prefix: str
) -> None:
    limits = RunLimits(max_active=3, max_queued=0)
    async with Channel(redis_url, key_prefix, run_limits=limits) as channel:
        run = await channel.started(thread_id="t")
        accepted = await asyncio.gather(
            *[channel.submit(thread_id="t", policy="interrupt") for _ in range(4)]
        )
        left = [one.run_id for one in accepted if not await is_cancelled(channel, one.run_id)]
        ended = await run.end(EventType.AGENT_CANCELLED)
        assert [ended[6].decode()] == left


async def test_an_interrupting_run_takes_no_place_of_those_that_wait(channel: Channel) -> None:
    await channel.started(thread_id="t")
    await channel.submit(thread_id="t", policy="interrupt")
    await channel.started(thread_id="u")
    queued = [await channel.submit(thread_id=thread) for thread in "tuu"]
    for thread in "tu":
        with pytest.raises(RequestRefused, match="rate_limited"):
            await channel.submit(thread_id=thread)
    # The queue is full, but those in its way end.
    newest = await channel.submit(thread_id="t", policy="interrupt")
    assert await is_cancelled(channel, queued[0].run_id)
    assert not await is_cancelled(channel, newest.run_id)
    await channel.submit(thread_id="u")


async def test_interrupting_runs_that_interrupt_nobody_do_not_pile_up(channel: Channel) -> None:
    run = await channel.started(thread_id="t")
    most = LIMITS.max_queued + 8
    for number in range(most):
        await submit_cut_short(channel, f"m{number}")
    with pytest.raises(RequestRefused, match="rate_limited"):
        await channel.submit(thread_id="t", policy="interrupt")
    assert not await is_cancelled(channel, run.run_id)
    await channel.submit(f"m{most - 1}", thread_id="t")
    await channel.submit(thread_id="t", policy="interrupt")
    assert await is_cancelled(channel, run.run_id)


async def test_one_of_many_claims_wins(channel: Channel) -> None:
    submitted = await channel.submit()
    outcomes = await asyncio.gather(
        *[
            channel.registry.claim(channel.user_id, submitted.run_id, f"w{number}", 1_000)
            for number in range(10)
        ]
    )
    assert sum(isinstance(outcome, Claim) for outcome in outcomes) == 1
    assert outcomes.count(NotClaimed("taken")) == 9


async def test_a_claim_whose_answer_was_lost_is_asked_for_again(channel: Channel) -> None:
    submitted = await channel.submit()
    first = await channel.claim(submitted.run_id, fence="f1")
    again = await channel.claim(submitted.run_id, fence="f1")
    assert again == first
    assert first.envelope.attempt == 1


async def test_what_cannot_be_claimed_says_why(channel: Channel) -> None:
    run = await channel.started()
    await run.end()
    claim = channel.registry.claim
    assert await claim(channel.user_id, run.run_id, "w", 1) == NotClaimed("ended")
    assert await claim(channel.user_id, "run_none", "w", 1) == NotClaimed("unknown")
    assert await claim("bob", run.run_id, "w", 1) == NotClaimed("unknown")


async def test_a_queued_run_is_cancelled_at_once(channel: Channel) -> None:
    submitted = await channel.submit(thread_id="t")
    following = await channel.submit(thread_id="t")
    outcome = await channel.registry.cancel(channel.user_id, submitted.run_id, reason="changed")
    assert (outcome.status, outcome.already) == ("cancelled", False)
    assert types(await channel.read())[-2:] == ["cancel_requested", "agent_cancelled"]
    assert await tasks(channel) == [submitted.run_id, following.run_id]


async def test_a_cancel_that_is_repeated_after_the_end_is_taken_as_before(channel: Channel) -> None:
    submitted = await channel.submit(thread_id="t")
    following = await channel.submit(thread_id="t")
    await channel.registry.cancel(channel.user_id, submitted.run_id, reason="changed")
    before = await channel.read()
    # As if the first time had broken off before it told the workers of the next run.
    await channel.client.delete(channel.all_keys.tasks("docs"))
    again = await channel.registry.cancel(channel.user_id, submitted.run_id, reason="changed")
    assert (again.status, again.already) == ("cancelled", True)
    assert await tasks(channel) == [following.run_id]
    assert (await channel.read()).offset == before.offset
    await channel.claim(following.run_id)
    await channel.registry.cancel(channel.user_id, submitted.run_id)
    assert await tasks(channel) == [following.run_id], "it is at work already"


async def test_a_cancel_after_an_end_of_another_cause_is_refused(channel: Channel) -> None:
    by_system, in_vain, done = [await channel.started() for _ in range(3)]
    await channel.registry.cancel(channel.user_id, by_system.run_id, by="system")
    await by_system.end(EventType.AGENT_CANCELLED)
    await channel.registry.cancel(channel.user_id, in_vain.run_id)
    await in_vain.end()
    await done.end()
    for run in (by_system, in_vain, done):
        with pytest.raises(RequestRefused, match="run_ended"):
            await channel.registry.cancel(channel.user_id, run.run_id)


async def test_a_running_run_is_asked_to_stop_once(channel: Channel) -> None:
    run = await channel.started()
    outcomes = [await channel.registry.cancel(channel.user_id, run.run_id) for _ in range(2)]
    assert [(one.status, one.already) for one in outcomes] == [
        ("cancel_requested", False),
        ("cancel_requested", True),
    ]
    assert types(await channel.read()).count("cancel_requested") == 1
    answer = await run.publish(run.event())
    assert (answer[4], answer[5][:5]) == (b"4", b'{"by"')
    again = await channel.claim(run.run_id, fence=run.claim.fence)
    assert again.cancel == {"by": "user", "reason": None}


async def test_nobody_cancels_another_users_run(channel: Channel) -> None:
    run = await channel.started()
    for user_id in ("bob", "alic", "alice "):
        with pytest.raises(RequestRefused) as caught:
            await channel.registry.cancel(user_id, run.run_id)
        assert caught.value.code == "unknown_run"


async def test_a_runs_result_can_be_read_after_its_end(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.event(EventType.AGENT_COMPLETED, result={"a": 1}, duration_ms=1))
    detail = await channel.registry.get(channel.user_id, run.run_id)
    assert detail is not None
    body = detail.as_json()
    assert (body["status"], body["result"], body["error"]) == ("completed", {"a": 1}, None)
    assert [one.run_id for one in await channel.registry.list_runs(channel.user_id)] == [run.run_id]
    assert await channel.registry.get("bob", run.run_id) is None
