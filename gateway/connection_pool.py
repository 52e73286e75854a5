"""The connections of this node: who is here, how many there may be, how they came and went."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from gateway.metrics import GatewayMetrics
from gateway.refusals import LIMIT_RETRY_MS
from relay.errors import CloseCode, RequestRefused
from relay.places import Holder, Place
from relay.tokens import Identity

MAX_CONNECTIONS_PER_NODE = 20_000

REPLACED = "a newer connection of this client took its place"
"""Reason of the close with 4429 that a client's older connection gets."""

log = structlog.stdlib.get_logger(__name__)


class PooledConnection(Protocol):
    """What the pool and its callers need of a connection."""

    @property
    def connection_id(self) -> str:
        """Unguessable; unique in the cluster."""

    @property
    def user_id(self) -> str:
        """Who owns it."""

    @property
    def identity(self) -> Identity:
        """What the token that it goes on with says."""

    @property
    def client_id(self) -> str | None:
        """The device that it comes from, as the client says."""

    def close(self, code: CloseCode, reason: str) -> None:
        """Close it after what is waiting has been sent."""

    def end_access(self, reason: str) -> None:
        """Close it with 4401 at once: nothing that waits is sent any more."""

    def drain(self, after_ms: int) -> None:
        """Ask the client to come back, and close."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many connections this node takes.

    Attributes:
        per_user: Of one user, here; the keeper of places counts those in the whole cluster.
        per_node: Of all users.
    """

    per_user: int
    per_node: int = MAX_CONNECTIONS_PER_NODE


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Figures for operators.

    Attributes:
        connections: Open now.
        users: Who they belong to.
        largest_user: The most that one user has here.
        opening: Places taken for connections that are not open yet.
        opened: Since the start.
        closed: Since the start, by close code.
        max_connections: Most that this node takes.
        max_per_user: Most that one user may have, here and in the cluster.
        places_owed: Places in Redis that are still to be given back.
    """

    connections: int
    users: int
    largest_user: int
    opening: int
    opened: int
    closed: Mapping[str, int]
    max_connections: int
    max_per_user: int
    places_owed: int


@dataclass(slots=True)
class _Entry:
    """A place, and the connection that it was taken for, once that is open."""

    place: Place
    opened_s: float
    connection: PooledConnection | None = None
    is_replaced: bool = False


class Places(Protocol):
    """What the pool needs of the keeper of places."""

    @property
    def owed_count(self) -> int:
        """Places that are still to be given back."""

    async def take(self, place: Place) -> Sequence[Holder]:
        """Take a place; gives the connections that it was taken over from."""

    async def check_room(self, place: Place) -> None:
        """Make sure that there would be one."""

    def give_back(self, place: Place) -> None:
        """Let a place go."""


class WebSocketConnectionPool:
    """All connections of this node, by id and by user, within their limits.

    A connection comes in two steps, because the user's places are counted in Redis: ``take_place``
    waits and may refuse; ``register`` does neither. In between the place counts as taken.

    Args:
        limits: Checked whenever a place is taken.
        metrics: Counts openings and closings.
        places: The users' places in the cluster.
        node_id: This node.
        tell_replaced: Tells another node that a connection of its has lost its place.
    """

    def __init__(
        self,
        limits: PoolLimits,
        metrics: GatewayMetrics,
        places: Places,
        *,
        node_id: str,
        tell_replaced: Callable[[str, str, str], Awaitable[None]],
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._places = places
        self._node_id = node_id
        self._tell_replaced = tell_replaced
        self._entries: dict[str, _Entry] = {}
        self._by_user: dict[str, dict[str, _Entry]] = {}
        self._open_count = 0

    def __len__(self) -> int:
        return self._open_count

    def __iter__(self) -> Iterator[PooledConnection]:
        entries = tuple(self._entries.values())
        return iter([entry.connection for entry in entries if entry.connection is not None])

    # --- Coming ---

    async def check_room(self, user_id: str, client_id: str | None = None) -> None:
        """Make sure that one more connection of this user would be taken.

        Raises:
            RequestRefused: ``rate_limited``.
            RedisUnavailable: Nobody knows.
        """
        self._check_here(user_id, client_id)
        await self._places.check_room(Place("", user_id, client_id))

    async def take_place(self, user_id: str, client_id: str | None = None) -> Place:
        """Take a place for a connection that is about to be opened.

        A connection of the same client, wherever it is, loses its place and is closed: a device
        that comes back must not be kept out by what is left of it.

        Returns:
            The place. Pass it to ``register`` with its connection, or to ``give_up``.

        Raises:
            RequestRefused: ``rate_limited``: there was none, or a newer connection of the same
                client took it over meanwhile; nothing stays taken.
            RedisUnavailable: Redis did not answer; nothing stays taken.
        """
        self._check_here(user_id, client_id)
        place = Place("con_" + secrets.token_hex(12), user_id, client_id)
        entry = _Entry(place, time.monotonic())
        self._entries[place.connection_id] = entry
        self._by_user.setdefault(user_id, {})[place.connection_id] = entry
        try:
            replaced = await self._places.take(place)
        except BaseException:
            self._drop(entry)
            raise
        try:
            for holder in replaced:
                await self._close_replaced(holder, user_id)
        except BaseException:
            self.give_up(place)
            raise
        if entry.is_replaced:
            # It has no place in Redis any more: opened, it would be one above the limit.
            self.give_up(place)
            raise RequestRefused(
                "rate_limited",
                "A newer connection of this client took its place.",
                suggestions=("Give each device or tab a client_id of its own.",),
                retry_after_ms=LIMIT_RETRY_MS,
            )
        return place

    def _check_here(self, user_id: str, client_id: str | None) -> None:
        if len(self._entries) >= self._limits.per_node:
            raise RequestRefused(
                "rate_limited",
                "This gateway has as many connections as it can serve.",
                suggestions=("Try again in a few seconds; another gateway may take you.",),
                retry_after_ms=LIMIT_RETRY_MS,
            )
        others = sum(
            client_id is None or entry.place.client_id != client_id
            for entry in self._by_user.get(user_id, {}).values()
        )
        if others >= self._limits.per_user:
            raise RequestRefused(
                "rate_limited",
                f"You already have {self._limits.per_user} connections.",
                suggestions=("Close a tab or another client, then try again.",),
                retry_after_ms=LIMIT_RETRY_MS,
            )

    async def _close_replaced(self, holder: Holder, user_id: str) -> None:
        if holder.node_id == self._node_id:
            self.close_replaced(holder.connection_id, user_id)
        else:
            await self._tell_replaced(holder.node_id, user_id, holder.connection_id)

    def close_replaced(self, connection_id: str, user_id: str) -> None:
        """Close a connection whose client has opened a newer one; harmless if it is gone.

        One that is not open yet is refused: ``take_place`` raises.
        """
        entry = self._entries.get(connection_id)
        if entry is None or entry.place.user_id != user_id:
            return
        entry.is_replaced = True
        if entry.connection is not None:
            entry.connection.close(CloseCode.LIMIT, REPLACED)

    def give_up(self, place: Place) -> None:
        """Let a place go whose connection will not be opened."""
        entry = self._entries.get(place.connection_id)
        if entry is not None and entry.connection is None:
            self._drop(entry)
            self._places.give_back(place)

    def register(self, connection: PooledConnection) -> None:
        """Take a connection in, at the place that was taken for it.

        Raises:
            KeyError: No place was taken under its id; this is a defect.
        """
        entry = self._entries[connection.connection_id]
        entry.connection = connection
        entry.opened_s = time.monotonic()
        self._open_count += 1
        self._metrics.opened += 1
        log.info(
            "connection opened",
            connection_id=connection.connection_id,
            user_id=connection.user_id,
            client_id=connection.client_id,
            jti=connection.identity.jti,
        )

    # --- Going ---

    def remove(self, connection: PooledConnection, code: int, reason: str) -> None:
        """Let a connection go; harmless if it is gone already.

        Args:
            connection: Which one.
            code: The close code, whoever sent it.
            reason: Why, for the log.
        """
        entry = self._entries.get(connection.connection_id)
        if entry is None or entry.connection is not connection:
            return
        self._drop(entry)
        self._places.give_back(entry.place)
        self._open_count -= 1
        self._metrics.closed[str(int(code))] += 1
        log.info(
            "connection closed",
            connection_id=connection.connection_id,
            user_id=connection.user_id,
            client_id=connection.client_id,
            code=int(code),
            reason=reason,
            lasted_s=round(time.monotonic() - entry.opened_s, 3),
        )

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.place.connection_id]
        own = self._by_user[entry.place.user_id]
        del own[entry.place.connection_id]
        if not own:
            del self._by_user[entry.place.user_id]

    # --- Looking ---

    def get(self, connection_id: str, owner: str) -> PooledConnection | None:
        """Give a user's connection; None for an unknown id and for another user's alike."""
        entry = self._entries.get(connection_id)
        return entry.connection if entry is not None and entry.place.user_id == owner else None

    def of_user(self, user_id: str) -> tuple[PooledConnection, ...]:
        """Give all connections of a user on this node."""
        entries = self._by_user.get(user_id, {}).values()
        return tuple(entry.connection for entry in entries if entry.connection is not None)

    def statistics(self) -> PoolStatistics:
        """Give the pool's figures."""
        users = [
            count
            for own in self._by_user.values()
            if (count := sum(entry.connection is not None for entry in own.values()))
        ]
        return PoolStatistics(
            connections=self._open_count,
            users=len(users),
            largest_user=max(users, default=0),
            opening=len(self._entries) - self._open_count,
            opened=self._metrics.opened,
            closed=dict(self._metrics.closed),
            max_connections=self._limits.per_node,
            max_per_user=self._limits.per_user,
            places_owed=self._places.owed_count,
        )
