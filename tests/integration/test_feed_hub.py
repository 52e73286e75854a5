"""Feeds on a real Redis: what the shell around the delivery machine has to keep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import pytest_asyncio
import redis.asyncio

from gateway import feed, history_reader, outage, position_check
from gateway.feed import Attachment, FeedHub
from gateway.user_feed import UserFeed
from relay.codec import Position
from relay.errors import RequestRefused
from relay.events import EventType
from relay.history import page_from
from relay.keys import BODY_THRESHOLD_BYTES, Keys
from relay.recovery import PART_THRESHOLD_BYTES, FeedState
from relay.scripts import RedisLink
from relay.testing import SequenceChecker
from tests.conftest import OwnRedis
from tests.integration.gateway_support import eventually
from tests.integration.script_support import Channel

DEADLINE_S = 15.0


class Tab:
    """A client's sink that keeps its frames as JSON would carry them."""

    def __init__(self, user_id: str = "alice") -> None:
        self.user_id = user_id
        self.has_room = True
        self.is_idle = True
        self.frames: list[dict[str, Any]] = []
        self.degradations: list[str | None] = []
        self.attachment: Attachment | None = None

    def established(self, position: Any, recovered: bool, runs: Any) -> None:
        self._add(
            type="connection_established",
            position=str(position),
            recovered=recovered,
            user_id=self.user_id,
        )

    def write(self, publication: Any) -> None:
        self.frames.append(orjson.loads(publication.frame))

    def write_all(self, publications: Any) -> None:
        for publication in publications:
            self.write(publication)

    def write_part(self, frame: bytes, is_last: bool) -> None:
        self.frames.append(orjson.loads(frame))

    def reset(self, position: Any, reason: str, runs: Any) -> None:
        self._add(type="reset", position=str(position), reason=reason)

    def reposition(self, position: Any) -> None:
        self._add(type="heartbeat", position=str(position))

    def degraded(self, reason: str | None) -> None:
        self.degradations.append(reason)

    def fail(self) -> None:
        self._add(type="closed")

    def refuse(self, error: RequestRefused) -> None:
        self._add(type="error", code=error.code)
        if self.attachment is not None:
            self.attachment.close()

    def _add(self, **frame: Any) -> None:
        self.frames.append(frame)

    def types(self) -> list[str]:
        return [frame["type"] for frame in self.frames]

    async def until(self, condition: Callable[[Tab], bool], deadline_s: float = DEADLINE_S) -> None:
        end_s = time.monotonic() + deadline_s
        while not condition(self):
            assert time.monotonic() < end_s, f"it did not happen; last frames: {self.frames[-5:]}"
            await asyncio.sleep(0.005)

    async def until_type(self, name: str, count: int = 1) -> None:
        await self.until(lambda tab: tab.types().count(name) >= count)


@asynccontextmanager
async def running_hub(url: str, prefix: str) -> AsyncIterator[FeedHub]:
    link = RedisLink(url)
    hub = FeedHub(link, Keys(prefix))
    try:
        await hub.start()
        yield hub
    finally:
        await hub.aclose()
        await link.aclose()


@pytest_asyncio.fixture
async def hub(redis_url: str, key_prefix: str) -> AsyncIterator[FeedHub]:
    async with running_hub(redis_url, key_prefix) as hub:
        yield hub


@pytest_asyncio.fixture
async def channel(redis_url: str, key_prefix: str) -> AsyncIterator[Channel]:
    async with Channel(redis_url, key_prefix) as channel:
        yield channel


async def connect(hub: FeedHub, since: Any = "active", user_id: str = "alice") -> Tab:
    tab = Tab(user_id)
    tab.attachment = hub.attach(user_id, since, tab)
    await tab.until_type("connection_established")
    return tab


def verify(tabs: list[Tab], channel: Channel, run_id: str, thoughts: int, text: str = "") -> None:
    """Hold what tabs saw against a run of ``thoughts`` events and some text."""
    checker = SequenceChecker()
    for number in range(thoughts):
        checker.published(channel.user_id, run_id, "agent_thinking", {"thought": str(number)})
    if text:
        checker.streamed(channel.user_id, run_id, text)
    for index, tab in enumerate(tabs):
        for frame in tab.frames:
            checker.received(f"tab {index}", channel.user_id, frame)
    checker.verify()


async def test_two_tabs_see_a_run_and_another_user_does_not(hub: FeedHub, channel: Channel) -> None:
    tabs = [await connect(hub) for _ in range(2)]
    other = await connect(hub, user_id="bob")
    run = await channel.started()
    await run.publish(run.text("m1", 0, "ab"), run.event(thought="0"))
    await run.end()
    for tab in tabs:
        await tab.until_type("agent_completed")
    verify(tabs, channel, run.run_id, 1, "ab")
    assert other.types() == ["connection_established"]


async def test_killed_subscriptions_lose_nothing(
    hub: FeedHub, channel: Channel, redis: redis.asyncio.Redis
) -> None:
    tabs = [await connect(hub) for _ in range(3)]
    run = await channel.started()
    text = ""
    for number in range(60):
        await run.publish(run.text(f"m{number}", 0, "x"), run.event(thought=str(number)))
        text += "x"
        if number % 10 == 5:
            await redis.client_kill_filter(_type="pubsub")
        await asyncio.sleep(0.005)
    await run.end()
    for tab in tabs:
        await tab.until_type("agent_completed")
        assert "reset" not in tab.types()
    verify(tabs, channel, run.run_id, 60, text)


async def test_a_swallowed_last_message_is_noticed(hub: FeedHub, channel: Channel) -> None:
    tab = await connect(hub)
    run = await channel.started()
    await tab.until_type("agent_started")
    # As a proxy does that loses one message of a connection that stays up.
    swallowed = asyncio.Event()
    connection = hub.subscriber._connection
    assert connection is not None
    receive = connection.on_message
    connection.on_message = lambda *_: swallowed.set()
    await run.end()
    await swallowed.wait()
    connection.on_message = receive
    assert "agent_completed" not in tab.types()
    await tab.until(lambda one: "agent_completed" in one.types(), deadline_s=5.0)
    verify([tab], channel, run.run_id, 0)


async def test_a_restart_with_its_file_resets_nobody(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with running_hub(server.url, "t") as hub, Channel(server.url, "t") as channel:
        tab = await connect(hub)
        run = await channel.started()
        await tab.until_type("agent_started")
        await server.restart()
        async with asyncio.timeout(DEADLINE_S):
            while not hub.subscriber.is_connected:
                await asyncio.sleep(0.01)
        await run.publish(run.event(thought="0"))
        await run.end()
        await tab.until_type("agent_completed")
        assert "reset" not in tab.types()
        verify([tab], channel, run.run_id, 1)


async def test_an_outage_is_announced_after_a_second_and_its_end_too(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with running_hub(server.url, "t") as hub:
        tab = await connect(hub)
        await server.stop()
        stopped_s = time.monotonic()
        await tab.until(lambda one: bool(one.degradations))
        assert time.monotonic() - stopped_s >= outage.ANNOUNCE_AFTER_S - 0.2
        assert (hub.is_degraded, tab.degradations[0] is None) == (True, False)
        late = Tab()
        late.attachment = hub.attach("bob", "active", late)
        assert late.degradations
        await server.start()
        await tab.until(lambda one: one.degradations[-1] is None)
        await late.until_type("connection_established")
        assert not hub.is_degraded


async def test_many_return_at_once_each_with_what_it_missed(hub: FeedHub, channel: Channel) -> None:
    tab = await connect(hub)
    run = await channel.started()
    await tab.until_type("agent_started")
    assert tab.attachment is not None
    epoch, _, offset = tab.attachment.position.rpartition(":")
    for number in range(50):
        await run.publish(run.event(thought=str(number)))
    await run.end()
    returned = [Tab() for _ in range(300)]
    for one in returned:
        one.attachment = hub.attach("alice", Position(epoch, int(offset)), one)
    for one in returned:
        await one.until_type("agent_completed")
        assert one.types() == [
            "connection_established",
            *["agent_thinking"] * 50,
            "agent_completed",
        ]


async def test_a_large_event_arrives_in_parts_in_its_place(hub: FeedHub, channel: Channel) -> None:
    tab = await connect(hub)
    run = await channel.started()
    filler = PART_THRESHOLD_BYTES + 5
    await run.publish(run.event(size=filler), run.event(size=BODY_THRESHOLD_BYTES))
    await run.end()
    await tab.until_type("agent_completed")
    parts = [frame for frame in tab.frames if frame["type"] == "event_part"]
    joined = orjson.loads("".join(part["text"] for part in parts))
    assert (joined["offset"], len(joined["data"]["filler"])) == (3, filler)
    assert tab.types().count("agent_thinking") == 1
    verify([tab], channel, run.run_id, 0)


async def test_a_full_outbox_stops_one_tab_only(hub: FeedHub, channel: Channel) -> None:
    slow, fast = await connect(hub), await connect(hub)
    slow.has_room = False
    run = await channel.started()
    for number in range(40):
        await run.publish(run.text("m1", number, "x"))
    await run.publish(run.event(thought="0"))
    await run.end()
    await fast.until_type("agent_completed")
    assert slow.types() == ["connection_established"]
    slow.has_room = True
    assert slow.attachment is not None
    slow.attachment.writable()
    await slow.until_type("agent_completed")
    verify([slow, fast], channel, run.run_id, 1, "x" * 40)


async def test_one_users_broken_key_holds_up_nobody_else(
    hub: FeedHub, channel: Channel, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    broken = Keys(key_prefix).user("mallory").channel
    await redis.set(broken, "not a hash")
    stuck = Tab("mallory")
    stuck.attachment = hub.attach("mallory", "active", stuck)
    tab = await connect(hub)
    run = await channel.started()
    await run.end(EventType.AGENT_ERROR)
    await tab.until_type("agent_error")
    assert not hub.is_degraded
    await stuck.until_type("error")
    await redis.delete(broken)
    again = Tab("mallory")
    again.attachment = hub.attach("mallory", "active", again)
    await again.until_type("connection_established")


async def test_a_history_that_nobody_waits_for_is_read_no_more(
    hub: FeedHub, redis: redis.asyncio.Redis, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LINGER_S", 0.05)
    monkeypatch.setattr(history_reader, "_RETRY_MOST_S", 0.02)
    await redis.set(Keys(key_prefix).user("mallory").channel, "not a hash")
    tab = Tab("mallory")
    tab.attachment = hub.attach("mallory", "active", tab)
    await tab.until_type("error")
    async with asyncio.timeout(DEADLINE_S):
        while hub.feed_count or hub.reader._background._timers or hub.reader._failures:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("count", [1, 100])
async def test_a_client_is_told_when_its_history_cannot_be_read_again_and_again(
    hub: FeedHub, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = count

    def fail_at_first(user_id: str, read: Any, reply: Any) -> Any:
        nonlocal failing
        if read.is_header_only and failing:
            failing -= 1
            raise RuntimeError("defect")
        return page_from(user_id, read, reply)

    monkeypatch.setattr(history_reader, "page_from", fail_at_first)
    monkeypatch.setattr(history_reader, "_RETRY_MOST_S", 0.02)
    tab = Tab()
    tab.attachment = hub.attach("alice", "active", tab)
    await tab.until(lambda tab: bool(tab.frames))
    expected = "connection_established" if count == 1 else "error"
    assert tab.types() == [expected]


async def test_a_defect_at_one_users_history_holds_up_nobody_else(
    hub: FeedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def fail_once(user_id: str, read: Any, reply: Any) -> Any:
        nonlocal failures
        if user_id == "mallory" and not failures:
            failures += 1
            raise RuntimeError("defect")
        return page_from(user_id, read, reply)

    monkeypatch.setattr(history_reader, "page_from", fail_once)
    # Attached in one turn of the loop: all are in one pipeline, behind the one that fails.
    tabs = [Tab(user_id) for user_id in ("mallory", "alice", "bob")]
    for tab in tabs:
        tab.attachment = hub.attach(tab.user_id, "active", tab)
    for tab in tabs:
        await tab.until_type("connection_established")
    assert failures == 1


async def test_reads_that_cannot_be_sent_are_made_again(
    hub: FeedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_each = hub.reader._line.run_each
    failures = 0

    async def fail_once(asked: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise TypeError("defect")
        return await run_each(asked)

    monkeypatch.setattr(hub.reader._line, "run_each", fail_once)
    await connect(hub)
    assert failures > 1


async def test_a_feed_that_failed_in_an_outage_waits_for_its_subscription(
    hub: FeedHub, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab = await connect(hub)
    [feed] = hub._feeds.values()
    may_connect = asyncio.Event()
    make_connection = hub.subscriber._connect

    async def connect_later() -> None:
        await may_connect.wait()
        await make_connection()

    monkeypatch.setattr(hub.subscriber, "_connect", connect_later)
    connection = hub.subscriber._connection
    assert connection is not None
    connection.end(ConnectionError("cut"))
    await tab.until(lambda _: hub.is_degraded)
    hub.reader._begin_anew(feed)
    run = await channel.started()
    assert (feed.state, hub.reader.waiting) == (FeedState.SUBSCRIBING, 0)
    may_connect.set()
    await run.end()
    await tab.until_type("agent_completed")
    verify([tab], channel, run.run_id, 0)


async def test_a_feed_that_failed_goes_on_with_its_confirmation(
    hub: FeedHub, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive_page = UserFeed.receive_page
    failures = 0

    def fail_once(feed: UserFeed, read: Any, page: Any) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise RuntimeError("defect")
        receive_page(feed, read, page)

    monkeypatch.setattr(UserFeed, "receive_page", fail_once)
    tab = await connect(hub)
    assert failures > 1
    run = await channel.started()
    await run.end()
    await tab.until_type("agent_completed")
    verify([tab], channel, run.run_id, 0)


async def test_one_users_broken_position_ends_no_other_users_check(
    hub: FeedHub,
    channel: Channel,
    redis: redis.asyncio.Redis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(position_check, "ROUND_S", 0.2)
    keys = Keys(key_prefix).user("mallory")
    mallory = await connect(hub, user_id="mallory")
    await redis.hset(keys.channel, "offset", "not a number")
    broken = hub._feeds[keys.live.encode()]
    await mallory.until(lambda _: broken.state is not FeedState.LIVE)
    tab = await connect(hub)
    run = await channel.started()
    await run.end()
    await tab.until_type("agent_completed")
    await channel.client.delete(channel.keys.channel)
    await tab.until_type("reset")


async def test_history_of_a_quiet_user_stays_the_same_while_somebody_is_connected(
    hub: FeedHub,
    channel: Channel,
    redis: redis.asyncio.Redis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(position_check, "ROUND_S", 0.2)
    foreign = Keys(key_prefix).user("mallory").channel
    await connect(hub, user_id="mallory")
    await redis.delete(foreign)
    await redis.set(foreign, "of somebody else")
    tab = await connect(hub)
    run = await channel.started()
    await run.end()
    await tab.until_type("agent_completed")
    await redis.pexpire(channel.keys.channel, 60_000)
    # As if a fourth of the time had passed in which it would have expired.
    hub.checks._keep_at_s = 0.0

    async def is_kept() -> bool:
        return bool(await redis.pttl(channel.keys.channel) > 80_000_000)

    await eventually(is_kept)
    assert await redis.pttl(foreign) == -1


async def test_a_feed_that_was_left_twice_in_one_moment_is_forgotten_once(
    hub: FeedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "LINGER_S", 0.05)
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as moment:
        # uvloop's clock stands still within a turn of the loop.
        now_s = loop.time()
        moment.setattr(loop, "time", lambda: now_s)
        for _ in range(2):
            hub.attach("alice", "active", Tab()).close()
    for user_id in ("bob", "carol"):
        tab = await connect(hub, user_id=user_id)
        assert tab.attachment is not None
        tab.attachment.close()
        await tab.until(lambda _: hub.feed_count == 0)


async def test_a_lost_channel_is_noticed_without_any_event(hub: FeedHub, channel: Channel) -> None:
    tab = await connect(hub)
    run = await channel.started()
    await run.end()
    await tab.until_type("agent_completed")
    await channel.client.delete(channel.keys.channel)
    await tab.until_type("reset")
    assert tab.frames[-1]["reason"] == "unknown_epoch"


async def test_a_large_text_arrives_in_parts_and_grows_on(hub: FeedHub, channel: Channel) -> None:
    run = await channel.started()
    piece = 'é"\n' * 20_000
    size = len(piece.encode())
    for number in range(6):
        await run.publish(run.text("m1", number * len(piece), piece, number * size))
    tab = await connect(hub, "0")
    await tab.until_type("event_part", 6)
    await run.publish(run.text("m1", 6 * len(piece), "end", 6 * size), run.event(thought="0"))
    await run.end()
    await tab.until_type("agent_completed")
    parts = [frame for frame in tab.frames if frame["type"] == "event_part"]
    assert [part["index"] for part in parts] == list(range(parts[0]["total"]))
    joined = orjson.loads("".join(part["text"] for part in parts))
    assert joined["data"] == {"message_id": "m1", "position": 0, "text": piece * 6}
    verify([tab], channel, run.run_id, 1, piece * 6 + "end")


@pytest.mark.parametrize("since", ["0", 1])
async def test_tabs_that_return_together_share_their_reads(
    hub: FeedHub, channel: Channel, since: str | int
) -> None:
    run = await channel.started()
    await run.publish(run.event(thought="0"))
    await run.end()
    calls: list[str] = []
    run_each = hub.reader._line.run_each

    async def counted(asked: Any) -> Any:
        calls.extend(call.script.name for call in asked)
        return await run_each(asked)

    hub.reader._line.run_each = counted  # type: ignore[method-assign]
    tabs = [Tab() for _ in range(200)]
    for tab in tabs:
        place: Any = since if since == "0" else Position(run.epoch, 1)
        tab.attachment = hub.attach("alice", place, tab)
    for tab in tabs:
        await tab.until_type("agent_completed")
    assert calls == ["read"]
    for tab in tabs:
        offsets = [frame["offset"] for frame in tab.frames if "offset" in frame]
        assert offsets == list(range(int(since) + 1, 5))


async def test_a_tab_that_cannot_be_written_to_is_sent_away_alone(
    hub: FeedHub, channel: Channel
) -> None:
    broken, tab = await connect(hub), await connect(hub)

    def fail(publication: Any) -> None:
        raise RuntimeError("broken")

    broken.write = fail  # type: ignore[method-assign]
    run = await channel.started()
    await run.end()
    await tab.until_type("agent_completed")
    assert broken.types()[-1] == "closed"
    verify([tab], channel, run.run_id, 0)


async def test_messages_that_wait_for_a_slow_gateway_are_not_taken_as_lost(
    hub: FeedHub, channel: Channel
) -> None:
    """The position check finds Redis ahead; the message is there, behind what is read first."""
    await connect(hub)
    [feed] = hub._feeds.values()
    connection = hub.subscriber._connection
    assert connection is not None
    assert connection._transport is not None
    connection._transport.pause_reading()  # type: ignore[attr-defined]
    run = await channel.started()
    checking = asyncio.create_task(hub.checks.check([feed]))
    await asyncio.sleep(0.5)
    assert (checking.done(), feed.state) == (False, FeedState.LIVE)
    connection._transport.resume_reading()  # type: ignore[attr-defined]
    assert await checking
    assert (feed.head, feed.state, hub.reader.waiting) == (2, FeedState.LIVE, 0)
    await run.end()
