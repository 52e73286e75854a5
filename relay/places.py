"""Places: how many connections a user may have in the whole cluster, counted in Redis.

A place is an entry of the user's hash ``connections``. It counts while its node lives, which the
node's own key says; that key is in another slot, so it is looked at aside, and only where it
matters: when all places are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from relay.keys import Keys
from relay.script_line import ScriptLine
from relay.scripts import RedisLink, ScriptCall, ScriptFailed, mapped_errors

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """What a connection takes one of.

    Attributes:
        client_id: The device, as the client says; it takes over its own place.
    """

    connection_id: str
    user_id: str
    client_id: str | None = None


class Holder(NamedTuple):
    """A connection that holds a place, and its node."""

    connection_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class PlaceTaken:
    """There was room.

    Attributes:
        replaced: Connections of the same client, which have none any more.
    """

    replaced: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class AllTaken:
    """There was no room."""

    holders: tuple[Holder, ...]


class PlaceBook:
    """The places of all users, as Redis has them.

    Args:
        link: Which Redis.
        keys: Key names.
        node_id: The node that asks.
        limit: Most places of one user.
    """

    def __init__(self, link: RedisLink, keys: Keys, node_id: str, limit: int) -> None:
        self._link = link
        self._keys = keys
        self.node_id = node_id
        self._limit = limit
        # One for all: what gives a place back stays behind what may be taking it.
        self._line = ScriptLine(link)

    async def take(self, place: Place, gone: Sequence[str] = ()) -> PlaceTaken | AllTaken:
        """Take a place, or take over that of the same client.

        Args:
            place: Whose.
            gone: Nodes that are dead and connections that are not open: they hold nothing.

        Raises:
            RedisUnavailable: Whether it was taken is unknown; give it back.
        """
        return await self._take(place, place.connection_id, gone)

    async def look(self, place: Place, gone: Sequence[str] = ()) -> PlaceTaken | AllTaken:
        """Tell what ``take`` would, without taking anything.

        Raises:
            RedisUnavailable: Redis did not answer.
        """
        return await self._take(place, "", gone)

    async def _take(
        self, place: Place, connection_id: str, gone: Sequence[str]
    ) -> PlaceTaken | AllTaken:
        call = self._call(
            "place_take",
            place.user_id,
            connection_id,
            self.node_id,
            place.client_id or "",
            self._limit,
            *gone,
        )
        [reply] = await self._line.run_each([call])
        if isinstance(reply, ScriptFailed):
            raise reply
        is_taken, *fields = reply
        names = [field.decode() for field in fields]
        holders = tuple(map(Holder, names[::2], names[1::2]))
        return PlaceTaken(holders) if is_taken else AllTaken(holders)

    async def dead_nodes(self, holders: Iterable[Holder]) -> list[str]:
        """Give the nodes among the holders' whose sign of life is gone.

        Raises:
            RedisUnavailable: Redis did not answer.
        """
        nodes = sorted({holder.node_id for holder in holders} - {self.node_id})
        if not nodes:
            return []
        with mapped_errors(self._link.url):
            # One EXISTS each: the keys are in different slots of a cluster.
            async with self._link.client.pipeline(transaction=False) as pipe:
                for node_id in nodes:
                    pipe.exists(self._keys.node(node_id))
                alive = await pipe.execute()
        return [node_id for node_id, is_alive in zip(nodes, alive, strict=True) if not is_alive]

    async def hold(self, places: Sequence[Place]) -> None:
        """Say that these places are taken, whatever Redis had.

        Raises:
            RedisUnavailable: Some may not be.
        """
        by_user: dict[str, list[str]] = {}
        for place in places:
            pair = (place.connection_id, place.client_id or "")
            by_user.setdefault(place.user_id, []).extend(pair)
        await self._write(
            [
                self._call("place_hold", user_id, self.node_id, *pairs)
                for user_id, pairs in by_user.items()
            ]
        )

    async def free(self, places: Sequence[Place]) -> None:
        """Give places back.

        Raises:
            RedisUnavailable: Some may still be taken.
        """
        by_user: dict[str, list[str]] = {}
        for place in places:
            by_user.setdefault(place.user_id, []).append(place.connection_id)
        await self._write(
            [self._call("place_free", user_id, *ids) for user_id, ids in by_user.items()]
        )

    async def _write(self, calls: Sequence[ScriptCall]) -> None:
        for call, reply in zip(calls, await self._line.run_each(calls), strict=True):
            if isinstance(reply, ScriptFailed):
                # No place can stand where something else does: that is this one user's trouble.
                log.error("places of a user not written", key=call.keys[0], error=str(reply))

    def _call(self, name: str, user_id: str, *args: str | int) -> ScriptCall:
        keys = (self._keys.user(user_id).connections,)
        return ScriptCall(self._link.scripts[name], keys, "", args)
