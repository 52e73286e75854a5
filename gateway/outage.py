"""Whether Redis is away, and telling all clients so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from gateway.background import Background
from gateway.user_feed import ClientSink

ANNOUNCE_AFTER_S = 1.0
"""Shorter outages are repaired without a word to the clients."""

TOLD_PER_TURN = 100
"""Clients told before the loop turns to others."""

MESSAGE = "Redis is not reachable; events will follow when it is back."


class Outage:
    """The current outage, if there is one.

    Args:
        background: Where its work is done.
        sinks: Gives all connections of the node.
    """

    def __init__(self, background: Background, sinks: Callable[[], Iterable[ClientSink]]) -> None:
        self._background = background
        self._sinks = sinks
        self._reason: str | None = None
        self._is_announced = False

    @property
    def is_on(self) -> bool:
        """Whether Redis is away as far as we know."""
        return self._reason is not None

    @property
    def announced(self) -> str | None:
        """What a client that comes now has to be told."""
        return self._reason if self._is_announced else None

    def begin(self, reason: str) -> None:
        """Redis did not answer."""
        if self._reason is None:
            self._reason = reason
            self._background.later(ANNOUNCE_AFTER_S, self._announce)

    def end(self) -> None:
        """Redis answered, and what is published arrives."""
        self._reason = None
        if self._is_announced:
            self._is_announced = False
            self._background.spawn(self._tell(None), "outage-tell")

    def _announce(self) -> None:
        if self._reason is not None and not self._is_announced:
            self._is_announced = True
            self._background.spawn(self._tell(MESSAGE), "outage-tell")

    async def _tell(self, reason: str | None) -> None:
        for index, sink in enumerate(list(self._sinks())):
            if index % TOLD_PER_TURN == 0:
                await asyncio.sleep(0)
                if self._is_announced != (reason is not None):
                    return  # It is over, or has begun again: all are told that.
            sink.degraded(reason)
