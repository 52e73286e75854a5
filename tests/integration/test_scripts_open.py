"""The scripts for runs without a queue: open, release, notice; sent twice, done once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import pytest_asyncio

from relay.errors import AgentError, EncodingFailed, InvalidEvent, RequestRefused, RunEnded
from relay.errors import StaleFence as TakenElsewhere
from relay.events import EventType
from relay.keys import Keys
from relay.notices import MAX_NOTICE_BYTES, Notice
from relay.publisher import Publisher
from relay.run_model import AgentInfo, Claim, NotClaimed, RunLimits, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import RedisLink

pytestmark = pytest.mark.every_redis

USER = "alice"


class Parts:
    def __init__(self, url: str, prefix: str) -> None:
        self.link, self.keys = RedisLink(url), Keys(prefix)
        self.registry = RunRegistry(self.link, self.keys, RunLimits(max_active=2))

    async def open(self, message_id: str, fence: str = "f1") -> Claim:
        request = SubmitRequest(USER, "t1", "a", "hi", message_id, {"k": 1})
        return await self.registry.open_run(request, "bridge-1", 60_000, fence=fence)

    async def events(self) -> list[dict[str, Any]]:
        entries = await self.link.client.xrange(self.keys.user(USER).log)
        return [orjson.loads(fields[b"e"]) for _, fields in entries]


@pytest_asyncio.fixture
async def parts(redis_url: str, key_prefix: str) -> AsyncIterator[Parts]:
    parts = Parts(redis_url, key_prefix)
    yield parts
    await parts.link.aclose()


async def test_opened_run_is_claimed_at_once_and_has_no_task(parts: Parts) -> None:
    claim = await parts.open("m1")
    assert (claim.envelope.attempt, claim.seq, claim.request.content) == (1, 1, "hi")
    assert [event["type"] for event in await parts.events()] == ["agent_queued"]
    assert await parts.link.client.xlen(parts.keys.tasks("a")) == 0
    taken = await parts.registry.claim(USER, claim.run_id, "worker-1", 60_000)
    assert taken == NotClaimed("taken")
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = publisher.open(claim)
        await stream.publish(EventType.AGENT_STARTED, {})
        await stream.finish(EventType.AGENT_COMPLETED, {"result": 1, "duration_ms": 0})
    with pytest.raises(RunEnded):
        await parts.open("m1")


async def test_open_whose_answer_was_lost_gives_the_same_claim_again(parts: Parts) -> None:
    first, again = await parts.open("m1"), await parts.open("m1")
    assert first == again
    assert len(await parts.events()) == 1
    with pytest.raises(TakenElsewhere):
        await parts.open("m1", fence="f2")


async def test_open_holds_the_quota(parts: Parts) -> None:
    for message_id in ("m1", "m2"):
        await parts.open(message_id)
    with pytest.raises(RequestRefused, match="rate_limited"):
        await parts.open("m3")
    assert len(await parts.events()) == 2


async def test_released_run_is_as_if_it_had_not_been_claimed(parts: Parts) -> None:
    await parts.registry.register_agents([AgentInfo("a")])
    run_id = (await parts.registry.submit(SubmitRequest(USER, "t1", "a", "hi", "m1"))).run_id
    first = await parts.registry.claim(USER, run_id, "w1", 60_000)
    assert isinstance(first, Claim)
    assert await parts.registry.release(first)
    assert not await parts.registry.release(first), "its fence is no longer the current one"
    second = await parts.registry.claim(USER, run_id, "w2", 60_000)
    assert isinstance(second, Claim)
    assert second.envelope.attempt == 1
    async with Publisher(parts.link, parts.keys) as publisher:
        stream = publisher.open(second)
        await stream.publish(EventType.AGENT_STARTED, {})
        await stream.flush()
    assert not await parts.registry.release(second), "it has begun"


async def test_run_that_is_to_stop_is_not_released(parts: Parts) -> None:
    await parts.registry.register_agents([AgentInfo("a")])
    run_id = (await parts.registry.submit(SubmitRequest(USER, "t1", "a", "hi", "m1"))).run_id
    claim = await parts.registry.claim(USER, run_id, "w1", 60_000)
    assert isinstance(claim, Claim)
    await parts.registry.cancel(USER, run_id)
    assert not await parts.registry.release(claim)


async def test_notice_that_is_sent_again_appears_once(parts: Parts) -> None:
    data = {"severity": "info", "title": "Hi", "body": "There", "extra": [1]}
    notices = [Notice(parts.keys, USER, data) for _ in range(3)]
    positions = [await notice.send(parts.link) for notice in notices]
    assert [position.offset for position in positions] == [1, 2, 3]
    assert [await notice.send(parts.link) for notice in notices] == positions
    events = await parts.events()
    assert [event["data"] for event in events] == [data] * 3
    stored = await parts.link.client.hget(parts.keys.user(USER).channel, "notices")
    for _ in range(100):
        await Notice(parts.keys, USER, data).send(parts.link)
    later = await parts.link.client.hget(parts.keys.user(USER).channel, "notices")
    assert stored is not None
    assert later is not None
    assert len(later.split()) == 64, "what is remembered of them is bounded"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"severity": "loud", "title": "x", "body": "y"}, InvalidEvent),
        ({"severity": "info", "title": "x"}, InvalidEvent),
        ({"severity": "info", "title": "x", "body": "y", "k": object()}, EncodingFailed),
        ({"severity": "info", "title": "x", "body": "y" * MAX_NOTICE_BYTES}, AgentError),
    ],
)
async def test_notice_that_does_not_fit_raises_before_it_is_sent(
    parts: Parts, data: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Notice(parts.keys, USER, data)
    with pytest.raises(ValueError, match="user id"):
        Notice(parts.keys, "", {"severity": "info", "title": "x", "body": "y"})
