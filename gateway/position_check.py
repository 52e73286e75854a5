"""Comparing what feeds have with what Redis has: pub/sub may swallow a message without a sign."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from gateway.outage import Outage
from gateway.user_feed import UserFeed
from relay.errors import RedisMisconfigured, RedisUnavailable
from relay.keys import Keys
from relay.recovery import FeedState
from relay.scripts import RedisLink, ScriptFailed
from relay.subscriber import Subscriber

ROUND_S = 4.0
"""Each channel is compared this often."""

STEPS = 16
"""A round is spread over so many steps."""

KEEPS_PER_AGE = 4
"""How often a quiet channel is kept within the time in which it would expire."""

CHUNK = 100
"""Channels compared in one pipeline: packing thousands would hold the loop up."""

log = structlog.stdlib.get_logger(__name__)


class PositionCheck:
    """Finds the last message of a burst that was lost with nothing behind it (rule 13).

    Args:
        link: Redis.
        keys: Key names.
        subscriber: What brings the messages.
        outage: Learns whether Redis answers.
        perform: Carries out what a feed asks for.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        subscriber: Subscriber,
        outage: Outage,
        perform: Callable[[UserFeed], None],
    ) -> None:
        self._link = link
        self._keys = keys
        self._subscriber = subscriber
        self._outage = outage
        self._perform = perform
        self._step = 0
        self._keep_every_s = link.limits.max_age_ms / 1000 / KEEPS_PER_AGE
        self._keep_at_s = time.monotonic() + self._keep_every_s
        # Steps left of the round in which channels are kept.
        self._keeping = 0

    async def advance(self, feeds: Sequence[UserFeed]) -> None:
        """Do the next step of a round over these feeds."""
        self._step = (self._step + 1) % STEPS
        self._keeping = max(0, self._keeping - 1)
        if time.monotonic() >= self._keep_at_s:
            self._keep_at_s = time.monotonic() + self._keep_every_s
            self._keeping = STEPS
        checked = [feed for feed in feeds[self._step :: STEPS] if feed.state is FeedState.LIVE]
        if not checked and not self._outage.is_on:
            return
        for start in range(0, max(1, len(checked)), CHUNK):
            if not await self.check(checked[start : start + CHUNK]):
                return

    async def check(self, feeds: Sequence[UserFeed]) -> bool:
        """Compare positions with Redis; tells whether it answered."""
        heads = [feed.head for feed in feeds]
        try:
            # The ping is for when there is nothing to check.
            channels = [self._keys.user(feed.user_id).channel for feed in feeds]
            commands = [("HMGET", channel, "epoch", "offset") for channel in channels]
            _, *stored = await self._link.ask_each([("PING",), *commands])
            if self._keeping:
                await self._keep(feeds, stored)
        except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
            self._outage.begin(str(error))
            return False
        if self._subscriber.is_connected:
            self._outage.end()
        missing: list[tuple[UserFeed, int]] = []
        for feed, head, answer in zip(feeds, heads, stored, strict=True):
            epoch, offset = _position_from(answer)
            # Less than the head is less than it had when Redis was asked.
            if epoch != feed.epoch or offset < head:
                self._repair(feed)
            elif offset > feed.head:
                missing.append((feed, offset))
        # A message may be on its way, or wait for us: only what is still missing behind everything
        # that Redis sent before counts as lost.
        if missing and await self._subscriber.barrier():
            for feed, expected in missing:
                if feed.head < expected and feed.state is FeedState.LIVE:
                    log.info("swallowed message noticed", user_id=feed.user_id, offset=expected)
                    self._repair(feed)
        return True

    async def _keep(self, feeds: Sequence[UserFeed], stored: Sequence[Any]) -> None:
        """Have the counters of quiet channels outlive their events while somebody is connected.

        Without them the next event would begin a new history, and whoever has missed nothing
        would be told that something was lost. The events go when their time has come.
        """
        keep_ms = str(self._link.limits.max_age_ms)
        commands = [
            ("PEXPIRE", self._keys.user(feed.user_id).channel, keep_ms)
            for feed, answer in zip(feeds, stored, strict=True)
            # Not what somebody else may have put there.
            if _position_from(answer)[0] == feed.epoch
        ]
        await self._link.ask_each(commands)

    def _repair(self, feed: UserFeed) -> None:
        feed.sync()
        self._perform(feed)


def _position_from(answer: Any) -> tuple[str | None, int]:
    """Understand a channel's stored position; without an epoch where there is none."""
    try:
        epoch, offset = answer
        return epoch.decode(), int(offset)
    except (TypeError, ValueError, AttributeError):
        # Gone, or something else stands there: one user's trouble, which reading reports.
        return None, 0
