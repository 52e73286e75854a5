"""The publications that a feed keeps for whoever is just behind its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from relay.codec import Publication
from relay.events import Kind

PUBLICATION_OVERHEAD_BYTES: Final = 400
"""What a kept publication costs beside its bytes: the object, its fields, its place in the ring."""


AT_REST_SHARE: Final = 8
"""While nobody is behind, the newest publication is kept, unless it is larger than one part in so
many of the budget. What is kept for each of many users falls out of the processor's caches, and
costs most when it is let go; what a connection that falls behind will want comes after that."""


class Ring:
    """Recent publications without a gap, bounded in bytes.

    Args:
        budget_bytes: The oldest go where all together pass it.

    Attributes:
        start: Everything after this offset, up to the newest, is here.
    """

    __slots__ = ("_budget", "_kept", "_size", "start")

    def __init__(self, budget_bytes: int) -> None:
        self.start = 0
        self._budget = budget_bytes
        self._size = 0
        # Most feeds are idle most of the time, and need no list.
        self._kept: list[Publication] | None = None

    def push(self, publication: Publication, *, is_awaited: bool) -> None:
        """Keep the next publication; ``is_awaited`` where somebody is behind and may want it."""
        # Its bytes are held twice, stored and framed.
        size = 2 * len(publication.event) + PUBLICATION_OVERHEAD_BYTES
        kept = self._kept
        if not is_awaited:
            if kept:
                self.start = kept[-1].offset
            if size > self._budget // AT_REST_SHARE:
                self.restart(publication.offset)
            elif kept is not None and len(kept) == 1:
                kept[0] = publication
                self._size = size
            else:
                self._kept = [publication]
                self._size = size
            return
        if kept is None:
            kept = self._kept = []
        kept.append(publication)
        self._size += size
        if self._size > self._budget:
            # Some at a time, for the list moves the others up.
            self._trim(kept, self._budget - self._budget // 16)

    def _trim(self, kept: list[Publication], enough: int) -> None:
        size, gone = self._size, 0
        for oldest in kept:
            if size <= enough:
                break
            size -= 2 * len(oldest.event) + PUBLICATION_OVERHEAD_BYTES
            self.start = oldest.offset
            gone += 1
        del kept[:gone]
        self._size = size

    def restart(self, offset: int) -> None:
        """Forget everything; what follows comes after this offset."""
        self._kept = None
        self._size = 0
        self.start = offset

    def after(self, offset: int) -> Sequence[Publication] | None:
        """Give all publications after an offset, None where the ring does not reach back."""
        if offset < self.start:
            return None
        # From the newest on: whoever asks is mostly a few publications behind.
        found: list[Publication] = []
        for publication in reversed(self._kept or ()):
            if publication.offset <= offset:
                break
            found.append(publication)
        found.reverse()
        return found

    def contradicts(self, publication: Publication) -> bool:
        """Whether another event is known to stand at the same offset.

        Only what is kept is known, at rest the newest. A history that fell back and has been filled
        again beyond that is noticed by the server's identity, by the next position check or page,
        or by publishers whose batches are missing.
        """
        if publication.is_claim or publication.kind == Kind.TEXT:
            return False
        return any(
            held.offset == publication.offset
            and not held.is_claim
            and held.kind != Kind.TEXT
            and held.event != publication.event
            for held in self._kept or ()
        )
