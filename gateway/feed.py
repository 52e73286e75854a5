"""The feeds of a gateway: carries out what the delivery machine asks for.

``relay.recovery`` decides; here are the subscription, the pipelined reads, the position checks and
the notice to clients when Redis is away. Nothing here knows about sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import structlog

from relay.cancellation import end_tasks
from relay.codec import decode_live, parse_position
from relay.errors import DecodingFailed, RedisMisconfigured, RedisUnavailable
from relay.history import page_from, read_body, read_call
from relay.keys import Keys
from relay.recovery import (
    Advance,
    Cursor,
    CursorState,
    Feed,
    FeedState,
    FetchBody,
    Read,
    Rotate,
    Since,
    Sink,
)
from relay.scripts import RedisLink, ScriptCall, ScriptFailed, mapped_errors
from relay.subscriber import Subscriber

AUDIT_ROUND_S = 4.0
"""Each channel's position is compared with Redis this often: pub/sub may swallow a last message."""

AUDIT_STEPS = 16
AUDIT_PATIENCE_S = 0.2
"""A message may be on its way: only what is still missing after this counts as lost."""

LINGER_S = 10.0
"""A feed outlives its last connection by this, so that a reload finds it warm."""

ANNOUNCE_AFTER_S = 1.0
"""Shorter outages are repaired without a word to the clients."""

READS_PER_PIPELINE = 64
PIPELINES = 4
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0

COMPLAIN_EVERY_S = 10.0

log = structlog.stdlib.get_logger(__name__)


class ClientSink(Sink, Protocol):
    """A connection's outbox, which can also be told that Redis is away."""

    def degraded(self, reason: str | None) -> None:
        """Tell the client that events may be late, or with None that this is over."""


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


class Attachment:
    """A connection's place in its user's feed. Made by ``FeedHub.attach``."""

    def __init__(self, hub: FeedHub, user_feed: _UserFeed, cursor: Cursor) -> None:
        self._hub = hub
        self._user_feed = user_feed
        self._cursor = cursor

    @property
    def position(self) -> str:
        """The client's position, ``epoch:offset``; empty before it is established."""
        return str(self._cursor.position) if self._cursor.is_established else ""

    @property
    def epoch(self) -> str:
        """The epoch that the offsets written now count in."""
        return self._user_feed.feed.epoch or ""

    def writable(self) -> None:
        """The outbox has room again, or is empty: go on where the cursor had to stop."""
        if self._cursor.state is not CursorState.LIVE:
            self._cursor.advance()
            self._hub.perform(self._user_feed)

    def close(self) -> None:
        """The connection is gone."""
        self._cursor.close()
        self._hub.release(self._user_feed)


class _UserFeed:
    """A feed with what the shell knows about it."""

    def __init__(self, user_id: str, channel: str, feed: Feed) -> None:
        self.user_id = user_id
        self.channel = channel
        self.feed = feed
        self.sinks: dict[Cursor, ClientSink] = {}
        self.linger: asyncio.TimerHandle | None = None


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
        self._feeds: dict[str, _UserFeed] = {}
        self._listeners: dict[str, Callable[[bytes], None]] = {}
        self._effects: deque[tuple[_UserFeed, Read | Rotate | FetchBody]] = deque()
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
        for user_feed in self._feeds.values():
            if user_feed.linger is not None:
                user_feed.linger.cancel()
        self._feeds.clear()
        await self.subscriber.aclose()

    def listen(self, channel: str, callback: Callable[[bytes], None]) -> None:
        """Also receive the messages of another channel, such as the node's own."""
        self._listeners[channel] = callback
        self.subscriber.subscribe(channel)

    def attach(self, user_id: str, since: Since, sink: ClientSink) -> Attachment:
        """Give a connection its place; ``sink.established`` follows when it has one."""
        channel = self._keys.user(user_id).live
        user_feed = self._feeds.get(channel)
        if user_feed is None:
            user_feed = _UserFeed(user_id, channel, Feed(ring_bytes=self._ring_bytes))
            self._feeds[channel] = user_feed
            self.subscriber.subscribe(channel)
        if user_feed.linger is not None:
            user_feed.linger.cancel()
            user_feed.linger = None
        cursor = user_feed.feed.attach(sink, since)
        user_feed.sinks[cursor] = sink
        self.perform(user_feed)
        if self._is_announced:
            sink.degraded(self._outage)
        return Attachment(self, user_feed, cursor)

    def release(self, user_feed: _UserFeed) -> None:
        """Let go of closed cursors; the feed stays for a while after its last one."""
        for cursor in tuple(user_feed.sinks):
            if cursor not in user_feed.feed.cursors:
                del user_feed.sinks[cursor]
        if not user_feed.sinks and user_feed.linger is None:
            loop = asyncio.get_running_loop()
            user_feed.linger = loop.call_later(LINGER_S, self._forget, user_feed)

    def _forget(self, user_feed: _UserFeed) -> None:
        if not user_feed.sinks and self._feeds.get(user_feed.channel) is user_feed:
            del self._feeds[user_feed.channel]
            self.subscriber.unsubscribe(user_feed.channel)

    def _receive(self, channel: str, payload: bytes) -> None:
        user_feed = self._feeds.get(channel)
        if user_feed is None:
            listener = self._listeners.get(channel)
            if listener is not None:
                listener(payload)
            return
        try:
            batch = decode_live(payload)
        except DecodingFailed as error:
            # Nobody may miss what it stood for: history has it in a form that we understand.
            self._complain(channel, error)
            user_feed.feed.sync()
        else:
            user_feed.feed.receive_live(batch)
        self.perform(user_feed)

    def _complain(self, channel: str, error: DecodingFailed) -> None:
        # While a newer writer is about, every message of every user would be a line.
        self.not_understood += 1
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._complain_at_s:
            self._complain_at_s = now_s + COMPLAIN_EVERY_S
            log.error(
                "live message not understood: history is read instead",
                channel=channel,
                error=str(error),
                so_far=self.not_understood,
            )

    def _lose(self) -> None:
        self._begin_outage("the subscription connection to Redis is down")
        for user_feed in self._feeds.values():
            user_feed.feed.lose()

    def _confirm(self, channel: str) -> None:
        user_feed = self._feeds.get(channel)
        if user_feed is not None:
            user_feed.feed.confirm()
            self.perform(user_feed)
        elif channel in self._listeners and not self._feeds:
            self._end_outage()

    def perform(self, user_feed: _UserFeed) -> None:
        """Queue what the machine asked for."""
        effects = user_feed.feed.effects
        while effects:
            batch, effects[:] = list(effects), []
            for effect in batch:
                if isinstance(effect, Advance):
                    effect.cursor.advance()
                else:
                    self._effects.append((user_feed, effect))
                    self._wake.set()

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            # One turn of the loop gathers what a reconnect of all feeds asks for.
            await asyncio.sleep(0)
            self._wake.clear()
            while self._effects:
                await self._pipelines.acquire()
                count = min(len(self._effects), READS_PER_PIPELINE)
                chunk = [self._effects.popleft() for _ in range(count)]
                self._spawn(self._carry_out(chunk), "feed-read")

    async def _carry_out(
        self, chunk: Sequence[tuple[_UserFeed, Read | Rotate | FetchBody]]
    ) -> None:
        try:
            calls: list[ScriptCall] = []
            called: list[tuple[_UserFeed, Read | Rotate]] = []
            fetches: list[tuple[_UserFeed, FetchBody]] = []
            for user_feed, effect in chunk:
                if isinstance(effect, FetchBody):
                    fetches.append((user_feed, effect))
                elif isinstance(effect, Read):
                    called.append((user_feed, effect))
                    calls.append(read_call(self._link, self._keys, user_feed.user_id, effect))
                else:
                    user = self._keys.user(user_feed.user_id)
                    called.append((user_feed, effect))
                    calls.append(self._link.call("rotate", user, None, effect.epoch))
            if calls:
                replies = await self._persist(lambda: self._link.run_each(calls))
                for (user_feed, effect), reply in zip(called, replies, strict=True):
                    self._give(user_feed, effect, reply)
            for user_feed, fetch in fetches:
                await self._fetch(user_feed, fetch)
        finally:
            self._pipelines.release()

    def _give(self, user_feed: _UserFeed, effect: Read | Rotate, reply: Any) -> None:
        """Hand over an answer. What is wrong with one user's data holds up nobody else."""
        try:
            if isinstance(reply, ScriptFailed):
                raise reply
            if isinstance(effect, Rotate):
                log.warning("history contradicts itself: new epoch", user_id=user_feed.user_id)
                effect.feed.receive_rotated(effect)
            else:
                page = page_from(user_feed.user_id, effect, reply)
                if isinstance(effect.requester, Cursor):
                    self.catch_ups += 1
                effect.requester.receive_page(effect, page)
        except (DecodingFailed, ScriptFailed) as error:
            log.error("history not understood", user_id=user_feed.user_id, error=str(error))
            self._later(_RETRY_MOST_S, lambda: self._try_again(user_feed, effect))
        self.perform(user_feed)

    def _try_again(self, user_feed: _UserFeed, effect: Read | Rotate) -> None:
        """Ask once more, unless nobody waits for it by now."""
        if effect.is_awaited and self._feeds.get(user_feed.channel) is user_feed:
            self._effects.append((user_feed, effect))

    async def _fetch(self, user_feed: _UserFeed, effect: FetchBody) -> None:
        piece = await self._persist(
            lambda: read_body(self._link, self._keys, user_feed.user_id, effect)
        )
        effect.cursor.receive_body(effect, piece)
        self.perform(user_feed)

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
        step = 0
        while True:
            await asyncio.sleep(AUDIT_ROUND_S / AUDIT_STEPS)
            step = (step + 1) % AUDIT_STEPS
            checked = [
                user_feed
                for index, user_feed in enumerate(self._feeds.values())
                if index % AUDIT_STEPS == step and user_feed.feed.state is FeedState.LIVE
            ]
            if not checked and not self.is_degraded:
                continue
            heads = [user_feed.feed.head for user_feed in checked]
            try:
                with mapped_errors(self._link.url):
                    pipeline = self._link.client.pipeline(transaction=False)
                    pipeline.ping()
                    for user_feed in checked:
                        key = self._keys.user(user_feed.user_id).channel
                        pipeline.hmget(key, ["epoch", "offset"])
                    _, *stored = await pipeline.execute(raise_on_error=False)
            except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
                self._begin_outage(str(error))
                continue
            if self.subscriber.is_connected:
                self._end_outage()
            for user_feed, head, answer in zip(checked, heads, stored, strict=True):
                # A key of another type is one user's trouble; reading reports it.
                epoch, offset = (None, None) if isinstance(answer, Exception) else answer
                self._compare(user_feed, head, epoch, offset)

    def _compare(
        self, user_feed: _UserFeed, head: int, epoch: bytes | None, offset: bytes | None
    ) -> None:
        """Compare what Redis answered with the head as it was when Redis was asked."""
        feed = user_feed.feed
        if epoch is None or offset is None or epoch.decode() != feed.epoch or int(offset) < head:
            feed.sync()
            self.perform(user_feed)
        elif int(offset) > feed.head:
            expected = int(offset)
            self._later(AUDIT_PATIENCE_S, lambda: self._repair(user_feed, expected))

    def _repair(self, user_feed: _UserFeed, expected: int) -> None:
        if user_feed.feed.head < expected and user_feed.feed.state is FeedState.LIVE:
            log.info("swallowed message noticed", user_id=user_feed.user_id, offset=expected)
            user_feed.feed.sync()
            self.perform(user_feed)

    def _begin_outage(self, reason: str) -> None:
        if self._outage is None:
            self._outage = reason
            self._later(ANNOUNCE_AFTER_S, self._announce)

    def _end_outage(self) -> None:
        self._outage = None
        if self._is_announced:
            self._is_announced = False
            self._tell(None)

    def _announce(self) -> None:
        if self._outage is not None and not self._is_announced:
            self._is_announced = True
            self._tell("Redis is not reachable; events will follow when it is back.")

    def _tell(self, reason: str | None) -> None:
        for user_feed in self._feeds.values():
            for sink in tuple(user_feed.sinks.values()):
                sink.degraded(reason)

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
