"""A gateway's places in its users' limits: taken, held, and given back whatever happens to Redis.

What is open counts more than what Redis knows: places that were lost there (a node that was taken
for dead, a failover, a key deleted) are entered again, and those that nobody uses are given back
until Redis has acknowledged it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from gateway.refusals import LIMIT_RETRY_MS
from relay.errors import RedisMisconfigured, RedisUnavailable, RequestRefused
from relay.keys import PLACES_TTL_MS
from relay.places import AllTaken, Holder, Place, PlaceBook

LOOK_EVERY_S = 1.0
HOLD_EVERY_S = PLACES_TTL_MS / 1000 / 3
"""Each place is entered again this often, so that it neither expires nor stays lost."""

PLACES_PER_STEP = 512

log = structlog.stdlib.get_logger(__name__)


class PlaceKeeper:
    """Takes places for connections and answers for them.

    Args:
        book: The places in Redis.
        limit: Most places of one user in the cluster.
    """

    def __init__(self, book: PlaceBook, limit: int) -> None:
        self._book = book
        self._limit = limit
        # By when each was last entered in Redis, the longest ago first.
        self._held: dict[Place, float] = {}
        self._taking: set[Place] = set()
        # How many acknowledgements it takes until a place has certainly been given back.
        self._owed: dict[Place, int] = {}
        self._is_all_owed = False
        self._wake = asyncio.Event()

    @property
    def owed_count(self) -> int:
        """Places that are still to be given back."""
        return len(self._owed)

    async def take(self, place: Place) -> tuple[Holder, ...]:
        """Take a place; ``give_back`` it when the connection has gone.

        Returns:
            Connections of the same client that have no place any more, and are to be closed.

        Raises:
            RequestRefused: ``rate_limited``: the user has no place left in the cluster.
            RedisUnavailable: Nobody knows whether there is one.
        """
        self._taking.add(place)
        try:
            answer = await self._book.take(place)
            if isinstance(answer, AllTaken) and (gone := await self._gone(answer.holders)):
                answer = await self._book.take(place, gone)
        except BaseException:
            self.give_back(place, is_uncertain=True)
            raise
        finally:
            self._taking.discard(place)
        if isinstance(answer, AllTaken):
            raise self._refusal()
        self._held[place] = time.monotonic()
        return answer.replaced

    async def check_room(self, place: Place) -> None:
        """Make sure that ``take`` would find a place.

        Raises:
            RequestRefused: ``rate_limited``.
            RedisUnavailable: Nobody knows.
        """
        answer = await self._book.look(place)
        if isinstance(answer, AllTaken) and (gone := await self._gone(answer.holders)):
            answer = await self._book.look(place, gone)
        if isinstance(answer, AllTaken):
            raise self._refusal()

    async def _gone(self, holders: Sequence[Holder]) -> list[str]:
        own = {place.connection_id for place in (*self._held, *self._taking)}
        gone = await self._book.dead_nodes(holders)
        gone += [
            holder.connection_id
            for holder in holders
            if holder.node_id == self._book.node_id and holder.connection_id not in own
        ]
        return gone

    def _refusal(self) -> RequestRefused:
        return RequestRefused(
            "rate_limited",
            f"You already have {self._limit} connections.",
            suggestions=("Close a tab or another client, then try again.",),
            retry_after_ms=LIMIT_RETRY_MS,
        )

    def give_back(self, place: Place, *, is_uncertain: bool = False) -> None:
        """Let a place go, at once where Redis answers, otherwise as soon as it does.

        Args:
            place: Which one.
            is_uncertain: Whether taking it may still be under way: what was sent on a connection
                that broke can be carried out after what is sent on the next one.
        """
        self._held.pop(place, None)
        # The same holds for entering it again, while it is not known whether that succeeded.
        self._owed[place] = 2 if is_uncertain or self._is_all_owed else 1
        self._wake.set()

    def hold_all(self) -> None:
        """Enter all places again: others may have taken this node for dead."""
        self._is_all_owed = True
        self._wake.set()

    async def run(self) -> None:
        """Give back and hold until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # Time to look what is due.
            self._wake.clear()
            try:
                await self.step()
            except (RedisUnavailable, RedisMisconfigured) as error:
                log.debug("places not written", error=str(error))
                # Whatever Redis has when it is back, it may be older than this.
                self._is_all_owed = True
                await asyncio.sleep(LOOK_EVERY_S)

    async def step(self) -> None:
        """Write what is due.

        Raises:
            RedisUnavailable, RedisMisconfigured: The rest stays due.
        """
        await self.settle()
        now_s = time.monotonic()
        if self._is_all_owed:
            self._is_all_owed = False
            due = list(self._held)
        else:
            due = []
            for place, held_s in self._held.items():
                if now_s - held_s < HOLD_EVERY_S:
                    break
                due.append(place)
        for first in range(0, len(due), PLACES_PER_STEP):
            # Those that were closed meanwhile are given back by the next step, never before this.
            places = [
                place for place in due[first : first + PLACES_PER_STEP] if place in self._held
            ]
            try:
                await self._book.hold(places)
            except BaseException:
                self._is_all_owed = True
                self._owed.update(dict.fromkeys(self._owed.keys() & places, 2))
                raise
            for place in places:
                if self._held.pop(place, None) is not None:
                    self._held[place] = now_s

    async def settle(self) -> None:
        """Give back what is to be given back; once where that is certain.

        Raises:
            RedisUnavailable, RedisMisconfigured: The rest stays due.
        """
        due = list(self._owed)
        for first in range(0, len(due), PLACES_PER_STEP):
            places = due[first : first + PLACES_PER_STEP]
            await self._book.free(places)
            for place in places:
                left = self._owed.pop(place) - 1
                if left:
                    self._owed[place] = left

    async def aclose(self) -> None:
        """Give back everything, as far as Redis can be reached: a dead node's places are free."""
        try:
            await self.settle()
        except (RedisUnavailable, RedisMisconfigured) as error:
            log.debug("places left to expire", error=str(error))
