"""The feeds of a gateway: carries out what the delivery machine asks for.

``relay.recovery`` decides; here are the subscription, the pipelined reads, the position checks and
the notice to clients when Redis is away. Nothing here knows about sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol, cast

import structlog

from relay.cancellation import end_tasks
from relay.codec import decode_live, parse_position
from relay.errors import DecodingFailed, RedisMisconfigured, RedisUnavailable
from relay.history import fetch_call, page_from, read_call
from relay.keys import Keys
from relay.recovery import (
    Advance,
    Broken,
    Cursor,
    CursorState,
    Feed,
    FeedState,
    FetchBody,
    Read,
    Request,
    RequestQueue,
    Rotate,
    SharedRequest,
    Since,
    Sink,
)
from relay.scripts import RedisLink, ScriptCall, ScriptFailed, mapped_errors
from relay.subscriber import Subscriber

AUDIT_ROUND_S = 4.0
"""Each channel's position is compared with Redis this often: pub/sub may swallow a last message."""

AUDIT_STEPS = 16
AUDIT_CHUNK = 100
"""Channels compared in one pipeline: packing thousands would hold the loop up."""

LINGER_S = 10.0
"""A feed outlives its last connection by this, so that a reload finds it warm."""

ANNOUNCE_AFTER_S = 1.0
"""Shorter outages are repaired without a word to the clients."""

READS_PER_PIPELINE = 64
TOLD_PER_TURN = 100
TURN_S = 0.002
"""Answers are used for this long before the loop turns to others."""

PIPELINES = 4
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0

COMPLAIN_EVERY_S = 10.0

log = structlog.stdlib.get_logger(__name__)


class ClientSink(Sink, Protocol):
    """A connection's outbox, which can also be told that Redis is away."""

    def degraded(self, reason: str | None) -> None:
        """Tell the client that events may be late, or with None that this is over."""

    def fail(self) -> None:
        """Close the connection, which could not be written to; the client may resume."""


def parse_since(text: str) -> Since:
    """Read ``?since=``: a position, ``active``, ``now`` or ``0``.

    Raises:
        DecodingFailed: It is none of these.
    """
    match text:
        case "active" | "now" | "0":
            return text
        case _:
            try:
                return parse_position(text)
            except DecodingFailed as error:
                raise DecodingFailed(f"since is active, now, 0 or a position: {error}") from error


class UserFeed(Feed):
    """A feed with what the shell knows about it."""

    __slots__ = ("channel", "linger_until_s", "user_id")

    def __init__(self, user_id: str, channel: bytes, *, ring_bytes: int) -> None:
        super().__init__(ring_bytes=ring_bytes)
        self.user_id = user_id
        self.channel = channel
        # Set while it has no connection.
        self.linger_until_s: float | None = None


class Attachment:
    """A connection's place in its user's feed. Made by ``FeedHub.attach``."""

    __slots__ = ("_cursor", "_feed", "_hub")

    def __init__(self, hub: FeedHub, feed: UserFeed, cursor: Cursor) -> None:
        self._hub = hub
        self._feed = feed
        self._cursor = cursor

    @property
    def position(self) -> str:
        """The client's position, ``epoch:offset``; empty before it is established."""
        return str(self._cursor.position) if self._cursor.is_established else ""

    @property
    def epoch(self) -> str:
        """The epoch that the offsets written now count in."""
        return self._feed.epoch or ""

    def writable(self) -> None:
        """The outbox has room again, or is empty: go on where the cursor had to stop."""
        if self._cursor.state is not CursorState.LIVE:
            self._feed.let_advance(self._cursor)
            self._hub.perform(self._feed)

    def close(self) -> None:
        """The connection is gone."""
        self._cursor.close()
        self._hub.release(self._feed)


class FeedHub:
    """All feeds of one gateway process, on one pub/sub connection.

    Args:
        link: Redis.
        keys: Key names.
        ring_bytes: Recent publications kept per feed.
    """

    def __init__(self, link: RedisLink, keys: Keys, *, ring_bytes: int = 64 * 1024) -> None:
        self.subscriber = Subscriber(
            link,
            on_message=self._receive,
            on_lost=self._lose,
            on_confirmed=self._confirm,
        )
        self.catch_ups = 0
        self.not_understood = 0
        self._complain_at_s = 0.0
        self._link = link
        self._keys = keys
        self._ring_bytes = ring_bytes
        self._feeds: dict[bytes, UserFeed] = {}
        self._listeners: dict[bytes, Callable[[bytes], None]] = {}
        self._requests: RequestQueue[UserFeed] = RequestQueue()
        # Feeds without a connection, by when they go: the wait is the same for all.
        self._lingering: deque[tuple[float, UserFeed]] = deque()
        self._wake = asyncio.Event()
        self._pipelines = asyncio.Semaphore(PIPELINES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._outage: str | None = None
        self._is_announced = False

    @property
    def is_degraded(self) -> bool:
        """Whether Redis is away as far as we know."""
        return self._outage is not None

    @property
    def feed_count(self) -> int:
        """How many users' channels are open."""
        return len(self._feeds)

    async def start(self) -> None:
        """Connect and begin to work.

        Raises:
            RedisUnavailable, RedisMisconfigured: The first connection could not be made.
        """
        await self.subscriber.start()
        self._spawn(self._work(), "feed-work")
        self._spawn(self._audit(), "feed-audit")

    async def aclose(self) -> None:
        """Stop all work. Connections should have been closed before."""
        await end_tasks(self._tasks)
        for timer in tuple(self._timers):
            timer.cancel()
        self._feeds.clear()
        self._lingering.clear()
        await self.subscriber.aclose()

    def listen(self, channel: str, callback: Callable[[bytes], None]) -> None:
        """Also receive the messages of another channel, such as the node's own."""
        name = channel.encode()
        self._listeners[name] = callback
        self.subscriber.subscribe(name)

    def attach(self, user_id: str, since: Since, sink: ClientSink) -> Attachment:
        """Give a connection its place; ``sink.established`` follows when it has one."""
        channel = self._keys.user(user_id).live.encode()
        feed = self._feeds.get(channel)
        if feed is None:
            feed = UserFeed(user_id, channel, ring_bytes=self._ring_bytes)
            self._feeds[channel] = feed
            self.subscriber.subscribe(channel)
        feed.linger_until_s = None
        cursor = feed.attach(sink, since)
        self.perform(feed)
        if self._is_announced:
            sink.degraded(self._outage)
        return Attachment(self, feed, cursor)

    def release(self, feed: UserFeed) -> None:
        """Let a feed stay for a while after its last connection."""
        if not feed.cursors and feed.linger_until_s is None:
            due_s = asyncio.get_running_loop().time() + LINGER_S
            feed.linger_until_s = due_s
            self._lingering.append((due_s, feed))

    def _forget(self, now_s: float) -> None:
        """Let go of the feeds that nobody came back to."""
        while self._lingering and self._lingering[0][0] <= now_s:
            due_s, feed = self._lingering.popleft()
            if feed.linger_until_s == due_s:
                del self._feeds[feed.channel]
                self.subscriber.unsubscribe(feed.channel)

    def _receive(self, channel: bytes, payload: bytes) -> None:
        feed = self._feeds.get(channel)
        if feed is None:
            listener = self._listeners.get(channel)
            if listener is not None:
                listener(payload)
            return
        try:
            batch = decode_live(payload)
        except DecodingFailed as error:
            # Nobody may miss what it stood for: history has it in a form that we understand.
            self._complain(channel, error)
            feed.sync()
        else:
            feed.receive_live(batch)
        if feed.effects:
            self.perform(feed)

    def _complain(self, channel: bytes, error: DecodingFailed) -> None:
        # While a newer writer is about, every message of every user would be a line.
        self.not_understood += 1
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._complain_at_s:
            self._complain_at_s = now_s + COMPLAIN_EVERY_S
            log.error(
                "live message not understood: history is read instead",
                channel=channel.decode(),
                error=str(error),
                so_far=self.not_understood,
            )

    def _lose(self) -> None:
        self._begin_outage("the subscription connection to Redis is down")
        for feed in self._feeds.values():
            feed.lose()

    def _confirm(self, channel: bytes) -> None:
        feed = self._feeds.get(channel)
        if feed is not None:
            feed.confirm()
            self.perform(feed)
        elif channel in self._listeners and not self._feeds:
            self._end_outage()

    def perform(self, feed: UserFeed) -> None:
        """Queue what the machine asked for."""
        effects = feed.effects
        while effects:
            batch, effects[:] = list(effects), []
            for effect in batch:
                if isinstance(effect, Advance):
                    feed.let_advance(cast("Cursor", effect.cursor))
                elif isinstance(effect, Broken):
                    self._send_away(feed, effect)
                else:
                    self._requests.add(feed, effect)
                    self._wake.set()

    def _send_away(self, feed: UserFeed, broken: Broken) -> None:
        # Whoever cannot be written to must not believe to be up to date.
        log.error("connection failed", user_id=feed.user_id, exc_info=broken.error)
        self.release(feed)
        cast("ClientSink", broken.sink).fail()

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            # One turn of the loop gathers what a reconnect of all feeds asks for.
            await asyncio.sleep(0)
            self._wake.clear()
            while self._requests:
                await self._pipelines.acquire()
                self._spawn(self._carry_out(self._requests.take(READS_PER_PIPELINE)), "feed-read")

    async def _carry_out(self, requests: Sequence[SharedRequest[UserFeed]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            calls = [self._call(shared.owner, shared.first) for shared in requests]
            replies = await self._persist(lambda: self._link.run_each(calls))
            turn_s = loop.time()
            for shared, reply in zip(requests, replies, strict=True):
                for request, answer in self._answers(shared, reply):
                    self._answer(shared.owner, request, answer)
                    self.perform(shared.owner)
                    if loop.time() - turn_s > TURN_S:
                        await asyncio.sleep(0)
                        turn_s = loop.time()
        finally:
            self._pipelines.release()

    def _call(self, feed: UserFeed, request: Request) -> ScriptCall:
        if isinstance(request, Read):
            return read_call(self._link, self._keys, feed.user_id, request)
        if isinstance(request, FetchBody):
            return fetch_call(self._link, self._keys, feed.user_id, request)
        return self._link.call("rotate", self._keys.user(feed.user_id), None, request.epoch)

    def _answers(
        self, shared: SharedRequest[UserFeed], reply: Any
    ) -> Sequence[tuple[Request, Any]]:
        """Give who gets what. What is wrong with one user's data holds up nobody else."""
        feed, first = shared.owner, shared.first
        try:
            if isinstance(reply, ScriptFailed):
                raise reply
            answer = page_from(feed.user_id, first, reply) if isinstance(first, Read) else reply
        except (DecodingFailed, ScriptFailed) as error:
            log.error("history not understood", user_id=feed.user_id, error=str(error))
            for request in shared.waiting:
                self._later(_RETRY_MOST_S, partial(self._try_again, feed, request))
            return []
        if isinstance(first, Rotate):
            log.warning("history contradicts itself: new epoch", user_id=feed.user_id)
        return [(request, answer) for request in shared.waiting]

    def _answer(self, feed: UserFeed, request: Request, answer: Any) -> None:
        cursor = request.cursor if isinstance(request, FetchBody) else None
        try:
            if isinstance(request, Rotate):
                feed.receive_rotated(request)
            elif isinstance(request, FetchBody):
                request.cursor.receive_body(request, answer)
            else:
                if isinstance(request.requester, Cursor):
                    cursor = request.requester
                    self.catch_ups += 1
                request.requester.receive_page(request, answer)
        except Exception as error:
            if isinstance(cursor, Cursor):
                feed.give_up(cursor, error)
            else:
                log.exception("feed failed", user_id=feed.user_id)
                self._later(_RETRY_MOST_S, partial(self._begin_anew, feed))

    def _begin_anew(self, feed: UserFeed) -> None:
        feed.lose()
        feed.confirm()
        self.perform(feed)

    def _try_again(self, feed: UserFeed, request: Request) -> None:
        """Ask once more, unless nobody waits for it by now."""
        if request.is_awaited and self._feeds.get(feed.channel) is feed:
            self._requests.add(feed, request)

    async def _persist(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Read until Redis answers: to the machine, a read may take long, but never fails."""
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                answer = await attempt()
            except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
                self._begin_outage(str(error))
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, _RETRY_MOST_S)
            else:
                if self.subscriber.is_connected:
                    self._end_outage()
                return answer

    async def _audit(self) -> None:
        loop = asyncio.get_running_loop()
        step = 0
        while True:
            await asyncio.sleep(AUDIT_ROUND_S / AUDIT_STEPS)
            self._forget(loop.time())
            step = (step + 1) % AUDIT_STEPS
            feeds = [
                feed
                for feed in list(self._feeds.values())[step::AUDIT_STEPS]
                if feed.state is FeedState.LIVE
            ]
            if not feeds and not self.is_degraded:
                continue
            for start in range(0, max(1, len(feeds)), AUDIT_CHUNK):
                if not await self._check(feeds[start : start + AUDIT_CHUNK]):
                    break

    async def _check(self, feeds: Sequence[UserFeed]) -> bool:
        """Compare positions with Redis; tells whether it answered."""
        heads = [feed.head for feed in feeds]
        try:
            with mapped_errors(self._link.url):
                pipeline = self._link.client.pipeline(transaction=False)
                pipeline.ping()
                for feed in feeds:
                    pipeline.hmget(self._keys.user(feed.user_id).channel, ["epoch", "offset"])
                _, *stored = await pipeline.execute(raise_on_error=False)
        except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
            self._begin_outage(str(error))
            return False
        if self.subscriber.is_connected:
            self._end_outage()
        missing: list[tuple[UserFeed, int]] = []
        for feed, head, answer in zip(feeds, heads, stored, strict=True):
            # A key of another type is one user's trouble; reading reports it.
            epoch, offset = (None, None) if isinstance(answer, Exception) else answer
            if epoch is None or offset is None or epoch.decode() != feed.epoch:
                self._repair(feed)
            elif int(offset) < head:
                # Less than it had when Redis was asked.
                self._repair(feed)
            elif int(offset) > feed.head:
                missing.append((feed, int(offset)))
        # A message may be on its way, or wait for us: only what is still missing behind everything
        # that Redis sent before counts as lost.
        if missing and await self.subscriber.barrier():
            for feed, expected in missing:
                if feed.head < expected and feed.state is FeedState.LIVE:
                    log.info("swallowed message noticed", user_id=feed.user_id, offset=expected)
                    self._repair(feed)
        return True

    def _repair(self, feed: UserFeed) -> None:
        feed.sync()
        self.perform(feed)

    def _begin_outage(self, reason: str) -> None:
        if self._outage is None:
            self._outage = reason
            self._later(ANNOUNCE_AFTER_S, self._announce)

    def _end_outage(self) -> None:
        self._outage = None
        if self._is_announced:
            self._is_announced = False
            self._spawn(self._tell(None), "feed-tell")

    def _announce(self) -> None:
        if self._outage is not None and not self._is_announced:
            self._is_announced = True
            reason = "Redis is not reachable; events will follow when it is back."
            self._spawn(self._tell(reason), "feed-tell")

    async def _tell(self, reason: str | None) -> None:
        for index, feed in enumerate(list(self._feeds.values())):
            if index % TOLD_PER_TURN == 0:
                await asyncio.sleep(0)
                if self._is_announced != (reason is not None):
                    return  # It is over, or has begun again: all are told that.
            for cursor in feed.cursors:
                cast("ClientSink", cursor.sink).degraded(reason)

    def _later(self, delay_s: float, action: Callable[[], Any]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            action()
            self._wake.set()

        timer = asyncio.get_running_loop().call_later(delay_s, run)
        self._timers.add(timer)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("feed work failed", task=task.get_name(), exc_info=error)
