"""The pub/sub connection: every gap is reported, on a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import redis.asyncio
import uvloop
from redis.asyncio.connection import AbstractConnection

from agent_worker.signals import SignalListener
from relay import subscriber
from relay.errors import RedisUnavailable
from relay.pubsub import CHUNK_BYTES, PIECE_BYTES
from relay.scripts import RedisLink
from relay.subscriber import SILENCE_S, SUBSCRIBE_CHUNK, Subscriber
from tests.conftest import OwnRedis
from tests.support.redis_server import free_port

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class Heard:
    """What a subscriber reported, in order."""

    def __init__(self, url: str) -> None:
        self.events: list[tuple[str, ...]] = []
        self.link = RedisLink(url)
        self.subscriber = Subscriber(
            self.link,
            on_message=lambda channel, payload: self.add(
                "message", channel.decode(), payload.decode()
            ),
            on_lost=lambda: self.add("lost"),
            on_confirmed=lambda channel: self.add("confirmed", channel.decode()),
        )

    def add(self, *event: str) -> None:
        self.events.append(event)

    async def until(self, condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
        end_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end_s, self.events[-5:]
            await asyncio.sleep(0.005)

    async def until_event(self, *event: str, count: int = 1) -> None:
        await self.until(lambda: self.events.count(event) >= count)

    async def aclose(self) -> None:
        await self.subscriber.aclose()
        await self.link.aclose()


def fail() -> None:
    raise RuntimeError("defect")


@pytest_asyncio.fixture
async def heard(redis_url: str) -> AsyncIterator[Heard]:
    heard = Heard(redis_url)
    await heard.subscriber.start()
    yield heard
    await heard.aclose()


async def test_messages_come_after_the_confirmation_and_in_order(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    heard.subscriber.subscribe(key_prefix.encode())
    await heard.until_event("confirmed", key_prefix)
    for number in range(100):
        await redis.publish(key_prefix, str(number))
    await heard.until_event("message", key_prefix, "99")
    assert heard.events[1:] == [("message", key_prefix, str(number)) for number in range(100)]


async def test_messages_that_cross_the_bounds_of_chunks_and_pieces_come_whole_and_in_order(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    heard.subscriber.subscribe(key_prefix.encode())
    await heard.until_event("confirmed", key_prefix)
    # Together many chunks; single ones smaller than a piece, about as large, and several chunks.
    sizes = [*range(1, 3_000, 7), PIECE_BYTES - 30, PIECE_BYTES, CHUNK_BYTES, 5 * CHUNK_BYTES, 3]
    sent = [f"{number}:".ljust(size, "x") for number, size in enumerate(sizes)]
    async with redis.pipeline(transaction=False) as pipeline:
        for text in sent:
            pipeline.publish(key_prefix, text)
        await pipeline.execute()
    await heard.until(lambda: len(heard.events) > len(sent))
    assert heard.events[1:] == [("message", key_prefix, text) for text in sent]


async def test_a_killed_connection_is_reported_and_everything_confirmed_again(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    names = [f"{key_prefix}:{number}" for number in range(SUBSCRIBE_CHUNK + 20)]
    for name in names:
        heard.subscriber.subscribe(name.encode())
    await heard.until(lambda: len(heard.events) == len(names))
    await redis.client_kill_filter(_type="pubsub")
    await heard.until(lambda: len(heard.events) == 2 * len(names) + 1)
    assert heard.events[len(names)] == ("lost",)
    assert {event[1] for event in heard.events[len(names) + 1 :]} == set(names)


async def test_a_confirmation_of_an_earlier_subscription_counts_for_nothing(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    """Between two subscriptions messages are missed: only the last one's confirmation counts."""
    heard.subscriber.subscribe(key_prefix.encode())
    heard.subscriber._confirm(key_prefix.encode())
    assert heard.events == []
    await heard.until_event("confirmed", key_prefix)
    for _ in range(20):
        heard.subscriber.unsubscribe(key_prefix.encode())
        await asyncio.sleep(0)
        heard.subscriber.subscribe(key_prefix.encode())
        await asyncio.sleep(0)
    seen = len(heard.events)
    heard.subscriber.subscribe(key_prefix.encode())
    await heard.until(lambda: ("confirmed", key_prefix) in heard.events[seen:])
    await redis.publish(key_prefix, "after")
    await heard.until_event("message", key_prefix, "after")


async def test_a_channel_that_was_given_up_stays_silent(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    other = f"{key_prefix}:other"
    for name in (key_prefix, other):
        heard.subscriber.subscribe(name.encode())
    await heard.until_event("confirmed", other)
    heard.subscriber.unsubscribe(key_prefix.encode())

    async with asyncio.timeout(10):
        while (await redis.pubsub_numsub(key_prefix))[0][1]:
            await asyncio.sleep(0.005)
    await redis.publish(key_prefix, "nobody")
    await redis.client_kill_filter(_type="pubsub")
    await heard.until_event("confirmed", other, count=2)
    assert heard.events.count(("confirmed", key_prefix)) == 1
    assert ("message", key_prefix, "nobody") not in heard.events


async def test_a_dead_peer_is_noticed_in_seconds(own_redis: OwnRedis) -> None:
    server = await own_redis()
    heard = Heard(server.url)
    await heard.subscriber.start()
    try:
        heard.subscriber.subscribe(b"c")
        await heard.until_event("confirmed", "c")
        server.pause()
        paused_s = time.monotonic()
        await heard.until_event("lost")
        assert time.monotonic() - paused_s < SILENCE_S + 2.0
        assert not heard.subscriber.is_connected
        server.resume()
        await heard.until_event("confirmed", "c", count=2)
    finally:
        server.resume()
        await heard.aclose()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_pause_of_our_own_is_not_taken_for_redis_silence(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch, new_loop: LoopFactory
) -> None:
    monkeypatch.setattr(subscriber, "PING_EVERY_S", 0.1)
    monkeypatch.setattr(subscriber, "SILENCE_S", 0.3)

    async def pause() -> None:
        heard = Heard(redis_url)
        await heard.subscriber.start()
        try:
            heard.subscriber.subscribe(key_prefix.encode())
            await heard.until_event("confirmed", key_prefix)
            for _ in range(2):
                # Past the answer to the last ping, and with a ping on its way.
                await asyncio.sleep(0.05)
                time.sleep(0.5)  # noqa: ASYNC251 -- it is the pause
                assert await heard.subscriber.barrier()
            assert ("lost",) not in heard.events
        finally:
            await heard.aclose()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(pause())


async def test_the_first_connection_must_be_made() -> None:
    heard = Heard(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(RedisUnavailable):
        await heard.subscriber.start()
    await heard.aclose()


async def test_a_barrier_is_passed_behind_all_that_was_published_before(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    heard.subscriber.subscribe(key_prefix.encode())
    await heard.until_event("confirmed", key_prefix)
    for number in range(200):
        await redis.publish(key_prefix, str(number))
    assert await heard.subscriber.barrier()
    assert heard.events[-1] == ("message", key_prefix, "199")


async def test_a_barrier_ends_with_the_connection(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    connection = heard.subscriber._connection
    assert connection is not None
    assert connection._transport is not None
    connection._transport.pause_reading()  # type: ignore[attr-defined]
    waiting = asyncio.create_task(heard.subscriber.barrier())
    await asyncio.sleep(0)
    connection.connection_lost(None)
    assert await waiting is False


async def test_a_message_that_cannot_be_handled_holds_up_no_other(
    heard: Heard, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    heard.subscriber.subscribe(key_prefix.encode())
    await heard.until_event("confirmed", key_prefix)
    await redis.publish(key_prefix, b"\xff not UTF-8")
    await redis.publish(key_prefix, "next")
    await heard.until_event("message", key_prefix, "next")
    assert ("lost",) not in heard.events


@pytest.mark.parametrize("protocol", [2, 3])
async def test_both_protocols_of_redis_are_understood(
    redis_url: str, redis: redis.asyncio.Redis, key_prefix: str, protocol: int
) -> None:
    heard = Heard(redis_url)
    heard.link.pool.connection_kwargs["protocol"] = protocol
    await heard.subscriber.start()
    try:
        assert await heard.subscriber.barrier()
        heard.subscriber.subscribe(key_prefix.encode())
        await heard.until_event("confirmed", key_prefix)
        await redis.publish(key_prefix, "hello")
        await heard.until_event("message", key_prefix, "hello")
        assert await heard.subscriber.barrier()
    finally:
        await heard.aclose()


async def test_a_defect_is_told_to_whoever_watches_and_leaves_no_connection(
    redis_url: str,
) -> None:
    heard = Heard(redis_url)
    heard.subscriber._on_lost = fail
    await heard.subscriber.start()
    try:
        watching = asyncio.create_task(heard.subscriber.watch())
        connection = heard.subscriber._connection
        assert connection is not None
        connection.end(ConnectionError("cut"))
        async with asyncio.timeout(5):
            with pytest.raises(RuntimeError, match="defect"):
                await watching
        assert not heard.subscriber.is_connected
    finally:
        await heard.aclose()


async def test_watching_ends_quietly_with_the_subscriber(redis_url: str) -> None:
    heard = Heard(redis_url)
    await heard.subscriber.start()
    watching = asyncio.create_task(heard.subscriber.watch())
    await asyncio.sleep(0)
    await heard.aclose()
    async with asyncio.timeout(5):
        await watching


async def test_a_refused_subscription_is_a_loss_and_is_tried_again(own_redis: OwnRedis) -> None:
    server = await own_redis()
    async with server.client() as client:
        await client.execute_command(
            "ACL", "SETUSER", "reader", "on", "nopass", "~*", "+@all", "resetchannels", "&open"
        )
        heard = Heard(server.url.replace("redis://", "redis://reader:any@"))
        await heard.subscriber.start()
        try:
            heard.subscriber.subscribe(b"closed")
            await heard.until_event("lost")
            await client.execute_command("ACL", "SETUSER", "reader", "&closed")
            await heard.until_event("confirmed", "closed")
        finally:
            await heard.aclose()


async def test_a_connection_that_is_lost_as_soon_as_it_is_made_is_none(
    heard: Heard, redis: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AbstractConnection] = []
    make = heard.link.pool.make_connection

    def make_and_lose() -> AbstractConnection:
        connection: AbstractConnection = make()  # type: ignore[no-untyped-call]
        connect = connection.connect

        async def connect_and_lose() -> None:
            await connect()  # type: ignore[no-untyped-call]
            assert connection._writer is not None
            connection._writer.close()

        monkeypatch.setattr(connection, "connect", connect_and_lose)
        made.append(connection)
        return connection

    heard.subscriber.subscribe(b"one")
    await heard.until_event("confirmed", "one")
    with monkeypatch.context() as lossy:
        lossy.setattr(heard.link.pool, "make_connection", make_and_lose)
        await redis.client_kill_filter(_type="pubsub")
        await heard.until(lambda: len(made) >= 2)
    await heard.until_event("confirmed", "one", count=2)
    assert heard.events.count(("lost",)) == 1


async def test_signals_that_a_defect_ended_are_said_to_be_gone(
    redis_url: str, key_prefix: str
) -> None:
    def ignore(*_: object) -> None:
        return None

    link = RedisLink(redis_url)
    listener = SignalListener(link, key_prefix, ignore, ignore)
    await listener.start()
    try:
        connection = listener._subscriber._connection
        assert connection is not None
        listener._subscriber._on_lost = fail
        connection.end(ConnectionError("cut"))
        with pytest.raises(RuntimeError, match="defect"):
            async with asyncio.timeout(5):
                await listener._subscriber.watch()
        assert not listener.is_connected
        assert "defect" in str(listener.last_error)
    finally:
        await listener.aclose()
        await link.aclose()
