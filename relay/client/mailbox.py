"""The way from the task that reads the socket to whoever iterates over the client."""

from __future__ import annotations

import asyncio
from collections import deque

from relay.client.state import Update

MAX_WAITING_UPDATES = 1_024


class Mailbox:
    """Updates on their way to whoever iterates. Nothing is lost when the taker is cancelled."""

    def __init__(self) -> None:
        self._waiting: deque[Update] = deque()
        self._changed = asyncio.Condition()
        self.error: Exception | None = None
        self._is_closed = False

    async def put(self, update: Update) -> None:
        """Add one; wait while a thousand are waiting to be taken."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING_UPDATES)
            self._waiting.append(update)
            self._changed.notify_all()

    async def take(self) -> Update | None:
        """Give the next update; None at the end. Raises what the connection ended with."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
        if self.error is not None:
            raise self.error
        return None

    async def close(self, error: Exception | None) -> None:
        """End it: what waits can still be taken, then ``error`` is raised."""
        async with self._changed:
            self.error, self._is_closed = error, True
            self._changed.notify_all()
