"""What waits for one client's socket, bounded in bytes. Pure: time enters as an argument."""

from __future__ import annotations

NO_PROGRESS_LIMIT_MS = 60_000
"""A client that takes nothing at all for this long is closed with 4410."""


class Backlog:
    """What a socket has been given and not taken, seen from time to time.

    Args:
        left_bytes: How much it is now.
        now_ms: When that was seen.
    """

    __slots__ = ("_left", "_progress_ms")

    def __init__(self, left_bytes: int, now_ms: int) -> None:
        self._left = left_bytes
        self._progress_ms = now_ms

    def add(self, size_bytes: int) -> None:
        """Note that more was given to the socket."""
        self._left += size_bytes

    def look(self, left_bytes: int, now_ms: int) -> None:
        """Note how much is left; less than was given means that the peer takes something."""
        if left_bytes < self._left:
            self._progress_ms = now_ms
        self._left = left_bytes

    def is_stuck(self, now_ms: int) -> bool:
        """Whether nothing has been taken for too long."""
        return now_ms >= self.stuck_at_ms

    @property
    def stuck_at_ms(self) -> int:
        """When it will count as stuck unless the socket takes something."""
        return self._progress_ms + NO_PROGRESS_LIMIT_MS


class Outbox:
    """Frames on their way to one socket, and the two marks that say when to stop and go on.

    Nothing is refused here: control frames must always fit. Events are held back by whoever
    asks ``has_room`` first, so that the bound is the budget plus what one tick adds to it.

    Args:
        budget_bytes: Above this there is no room for further events.
    """

    __slots__ = ("_budget", "_is_full", "_low", "_pending", "_progress_ms", "_size")

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        # The distance keeps a client at the edge from switching to and fro at each frame.
        self._low = budget_bytes // 2
        self._pending: list[bytes] = []
        self._size = 0
        self._progress_ms = 0
        self._is_full = False

    @property
    def size_bytes(self) -> int:
        """Bytes not yet taken by the socket, in flight ones included."""
        return self._size

    @property
    def has_room(self) -> bool:
        """Whether an event may be added; once full, not before the low mark is reached."""
        return not self._is_full

    @property
    def is_empty(self) -> bool:
        """Whether everything has been taken by the socket."""
        return self._size == 0

    def add(self, frame: bytes, now_ms: int) -> bool:
        """Put a frame behind the others.

        Returns:
            Whether the writer must be woken: nothing was pending before.
        """
        if not self._size:
            self._progress_ms = now_ms
        self._size += len(frame)
        if self._size >= self._budget:
            self._is_full = True
        self._pending.append(frame)
        return len(self._pending) == 1

    def take(self) -> list[bytes]:
        """Give all pending frames to the writer, who reports each with ``written``."""
        frames = self._pending
        self._pending = []
        return frames

    def written(self, size_bytes: int, now_ms: int) -> bool:
        """Note that the socket took so many bytes.

        Returns:
            Whether a full outbox has just fallen to its low mark: events may flow again.
        """
        self._size -= size_bytes
        self._progress_ms = now_ms
        if self._is_full and self._size <= self._low:
            self._is_full = False
            return True
        return False

    def is_stuck(self, now_ms: int) -> bool:
        """Whether something waits and the socket has taken nothing for too long."""
        return self._size > 0 and now_ms - self._progress_ms >= NO_PROGRESS_LIMIT_MS

    @property
    def stuck_at_ms(self) -> int | None:
        """When it will count as stuck unless the socket takes something; None when empty."""
        return self._progress_ms + NO_PROGRESS_LIMIT_MS if self._size else None
