"""The connections of this node: who is here, how many there may be, how they came and went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from gateway.metrics import GatewayMetrics
from gateway.refusals import LIMIT_RETRY_MS
from relay.errors import CloseCode, RequestRefused
from relay.tokens import Identity

MAX_CONNECTIONS_PER_NODE = 20_000

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
    """How many connections this node takes."""

    per_user: int
    per_node: int = MAX_CONNECTIONS_PER_NODE


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Figures for operators."""

    connections: int
    users: int
    largest_user: int


class WebSocketConnectionPool:
    """All open connections of this node, by id and by user.

    Args:
        limits: Checked on every registration.
        metrics: Counts openings and closings.
    """

    def __init__(self, limits: PoolLimits, metrics: GatewayMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._by_id: dict[str, PooledConnection] = {}
        self._by_user: dict[str, dict[str, PooledConnection]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[PooledConnection]:
        return iter(tuple(self._by_id.values()))

    def check_room(self, user_id: str) -> None:
        """Make sure that one more connection of this user would be taken.

        Raises:
            RequestRefused: ``rate_limited``.
        """
        if len(self._by_id) >= self._limits.per_node:
            raise RequestRefused(
                "rate_limited",
                "This gateway has as many connections as it can serve.",
                suggestions=("Try again in a few seconds; another gateway may take you.",),
                retry_after_ms=LIMIT_RETRY_MS,
            )
        if len(self._by_user.get(user_id, ())) >= self._limits.per_user:
            raise RequestRefused(
                "rate_limited",
                f"You already have {self._limits.per_user} connections.",
                suggestions=("Close a tab or another client, then try again.",),
                retry_after_ms=LIMIT_RETRY_MS,
            )

    def register(self, connection: PooledConnection) -> None:
        """Take a connection in.

        Raises:
            RequestRefused: ``rate_limited``; nothing was registered.
        """
        self.check_room(connection.user_id)
        self._by_id[connection.connection_id] = connection
        self._by_user.setdefault(connection.user_id, {})[connection.connection_id] = connection
        self._metrics.opened += 1
        log.info(
            "connection opened",
            connection_id=connection.connection_id,
            user_id=connection.user_id,
            client_id=connection.client_id,
        )

    def remove(self, connection: PooledConnection, code: int, reason: str) -> None:
        """Let a connection go; harmless if it is gone already.

        Args:
            connection: Which one.
            code: The close code, whoever sent it.
            reason: Why, for the log.
        """
        if self._by_id.pop(connection.connection_id, None) is None:
            return
        own = self._by_user[connection.user_id]
        del own[connection.connection_id]
        if not own:
            del self._by_user[connection.user_id]
        self._metrics.closed[str(int(code))] += 1
        log.info(
            "connection closed",
            connection_id=connection.connection_id,
            user_id=connection.user_id,
            code=int(code),
            reason=reason,
        )

    def get(self, connection_id: str, owner: str) -> PooledConnection | None:
        """Give a user's connection; None for an unknown id and for another user's alike."""
        connection = self._by_id.get(connection_id)
        return connection if connection is not None and connection.user_id == owner else None

    def of_user(self, user_id: str) -> tuple[PooledConnection, ...]:
        """Give all connections of a user on this node."""
        return tuple(self._by_user.get(user_id, {}).values())

    def statistics(self) -> PoolStatistics:
        """Give the pool's figures."""
        return PoolStatistics(
            connections=len(self._by_id),
            users=len(self._by_user),
            largest_user=max(map(len, self._by_user.values()), default=0),
        )
