"""One timer for all connections of a node: who is due now. Pure: time enters as an argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

TICK_MS = 100
"""Resolution: nothing is due early, nothing later than this plus the caller's own delay."""


class Wheel(Generic[T]):
    """Items by due time, in slots of one tick; a turn costs only what is due.

    A timer per connection would cost each heartbeat a heap operation and a wake-up of its own.
    """

    def __init__(self, now_ms: int) -> None:
        self._slots: dict[int, set[T]] = {}
        self._slot_of: dict[T, int] = {}
        self._turned_to = now_ms // TICK_MS

    def __len__(self) -> int:
        return len(self._slot_of)

    def schedule(self, item: T, due_ms: int) -> None:
        """Make an item due at a time, instead of the time set before."""
        self.remove(item)
        # Rounded up, so that an item is never handed out before its time; and into a slot that
        # has not been passed, so that it is handed out at all.
        slot = max(-(-due_ms // TICK_MS), self._turned_to + 1)
        self._slot_of[item] = slot
        self._slots.setdefault(slot, set()).add(item)

    def remove(self, item: T) -> None:
        """Forget an item; harmless if it is not here."""
        slot = self._slot_of.pop(item, None)
        if slot is None:
            return
        items = self._slots[slot]
        items.discard(item)
        if not items:
            del self._slots[slot]

    def turn(self, now_ms: int) -> list[T]:
        """Take out the items that have become due since the last turn, earliest first."""
        now_slot = now_ms // TICK_MS
        due: list[T] = []
        for slot in self._passed(now_slot):
            for item in self._slots.pop(slot):
                del self._slot_of[item]
                due.append(item)
        self._turned_to = max(self._turned_to, now_slot)
        return due

    def _passed(self, now_slot: int) -> Iterable[int]:
        if now_slot - self._turned_to > len(self._slots):
            # After a long pause it is quicker to look at the slots than at every tick.
            return sorted(slot for slot in self._slots if slot <= now_slot)
        return [slot for slot in range(self._turned_to + 1, now_slot + 1) if slot in self._slots]
