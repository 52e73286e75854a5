"""The feeds of a gateway: which there are, what comes live, and whom it goes to.

``relay.recovery`` decides; ``history_reader`` reads what it asks for, ``position_check`` finds what
pub/sub swallowed, ``outage`` tells clients that Redis is away. Nothing here knows about sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import structlog

from gateway import position_check
from gateway.background import Background
from gateway.history_reader import HistoryReader
from gateway.outage import Outage
from gateway.position_check import PositionCheck
from gateway.user_feed import ClientSink, UserFeed
from relay.codec import parse_position, read_live
from relay.errors import DecodingFailed
from relay.keys import Keys
from relay.recovery import Advance, Broken, Cursor, CursorState, Since
from relay.scripts import RedisLink
from relay.subscriber import Subscriber

LINGER_S = 10.0
"""A feed outlives its last connection by this, so that a reload finds it warm."""

COMPLAIN_EVERY_S = 10.0

log = structlog.stdlib.get_logger(__name__)


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
        self._background = Background()
        self._parts: list[asyncio.Task[None]] = []
        self._outage = Outage(self._background, self._sinks)
        self.reader = HistoryReader(
            link,
            keys,
            self._background,
            self._outage,
            is_subscribed=lambda: self.subscriber.is_connected,
            subscribe=self._subscribe_again,
            perform=self.perform,
        )
        self.checks = PositionCheck(link, keys, self.subscriber, self._outage, self.perform)
        self.not_understood = 0
        self._complain_at_s = 0.0
        self._keys = keys
        self._ring_bytes = ring_bytes
        self._feeds: dict[bytes, UserFeed] = {}
        self._listeners: dict[bytes, Callable[[bytes], None]] = {}
        # Feeds without a connection, by when they go: the wait is the same for all.
        self._lingering: deque[tuple[float, UserFeed]] = deque()

    @property
    def is_degraded(self) -> bool:
        """Whether Redis is away as far as we know."""
        return self._outage.is_on

    @property
    def catch_ups(self) -> int:
        """How many times a connection read history."""
        return self.reader.catch_ups

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
        self._parts = [
            self._background.spawn(self.reader.run(), "history-reader"),
            self._background.spawn(self._look_after(), "feeds"),
            self._background.spawn(self.subscriber.watch(), "subscriber-watch"),
        ]

    async def watch(self) -> None:
        """Return when a part of a started hub has ended: without it, clients miss events.

        Raises:
            Exception: The defect that ended it.
        """
        done, _ = await asyncio.wait(self._parts, return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            if not part.cancelled():
                part.result()

    async def aclose(self) -> None:
        """Stop all work. Connections should have been closed before."""
        await self._background.aclose()
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
        if self._outage.announced:
            sink.degraded(self._outage.announced)
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
            # Who came and went again within one reading of the clock has put it here twice.
            if feed.linger_until_s == due_s and self._feeds.get(feed.channel) is feed:
                del self._feeds[feed.channel]
                # Nothing more is read for it, whatever is under way.
                feed.lose()
                self.subscriber.unsubscribe(feed.channel)

    def _receive(self, channel: bytes, payload: bytes) -> None:
        feed = self._feeds.get(channel)
        if feed is None:
            listener = self._listeners.get(channel)
            if listener is not None:
                listener(payload)
            return
        try:
            batch = read_live(payload)
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
        self._outage.begin("the subscription connection to Redis is down")
        for feed in self._feeds.values():
            feed.lose()

    def _subscribe_again(self, feed: UserFeed) -> None:
        # It may have been let go meanwhile.
        if self._feeds.get(feed.channel) is feed:
            self.subscriber.subscribe(feed.channel)

    def _confirm(self, channel: bytes) -> None:
        feed = self._feeds.get(channel)
        if feed is not None:
            feed.confirm()
            self.perform(feed)
        elif channel in self._listeners and not self._feeds:
            self._outage.end()

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
                    self.reader.ask(feed, effect)

    def _send_away(self, feed: UserFeed, broken: Broken) -> None:
        # Whoever cannot be written to must not believe to be up to date.
        log.error("connection failed", user_id=feed.user_id, exc_info=broken.error)
        self.release(feed)
        cast("ClientSink", broken.sink).fail()

    def _sinks(self) -> Iterator[ClientSink]:
        for feed in self._feeds.values():
            for cursor in feed.cursors:
                yield cast("ClientSink", cursor.sink)

    async def _look_after(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(position_check.ROUND_S / position_check.STEPS)
            self._forget(loop.time())
            await self.checks.advance(list(self._feeds.values()))
