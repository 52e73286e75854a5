"""What a gateway keeps for one user with connections."""

from __future__ import annotations

from typing import Protocol

from relay.errors import RequestRefused
from relay.recovery import Feed, Sink


class ClientSink(Sink, Protocol):
    """A connection's outbox, which can also be told that Redis is away."""

    def degraded(self, reason: str | None) -> None:
        """Tell the client that events may be late, or with None that this is over."""

    def fail(self) -> None:
        """Close the connection, which could not be written to; the client may resume."""

    def refuse(self, error: RequestRefused) -> None:
        """Tell the client why it cannot be served, and close the connection."""


class UserFeed(Feed):
    """A feed with what the shell knows about it."""

    __slots__ = ("channel", "linger_until_s", "user_id")

    def __init__(self, user_id: str, channel: bytes, *, ring_bytes: int) -> None:
        super().__init__(ring_bytes=ring_bytes)
        self.user_id = user_id
        self.channel = channel
        # Set while it has no connection.
        self.linger_until_s: float | None = None
