"""How connections are handed over before a gateway exits. Pure: gives a timetable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BATCH_INTERVAL_MS = 50

CLOSES_PER_S = 1_000
"""So many reconnects a second the other gateways take without making anybody wait."""

LONGEST_MS = 15_000
"""A drain is no longer than this, whatever the number: orchestrators kill after 30 s."""

SPREAD_MS = 300
"""Clients are asked to come back at different moments within this time."""


class DrainStep(NamedTuple):
    """One connection's place in the timetable.

    Attributes:
        at_ms: When it is closed, from the start of the drain.
        after_ms: How long the client is asked to wait before it comes back.
    """

    at_ms: int
    after_ms: int


def timetable(
    count: int, *, closes_per_s: int = CLOSES_PER_S, longest_ms: int = LONGEST_MS
) -> Iterator[DrainStep]:
    """Plan the closing of ``count`` connections in batches, at a bounded rate.

    The rate rises only where the drain would otherwise last longer than ``longest_ms``.
    Reconnects within one batch are spread evenly, so that no instant takes them all.
    """
    batches_allowed = max(1, longest_ms // BATCH_INTERVAL_MS)
    size = max(1, closes_per_s * BATCH_INTERVAL_MS // 1000, -(-count // batches_allowed))
    for index in range(count):
        batch, place = divmod(index, size)
        in_batch = min(size, count - batch * size)
        yield DrainStep(batch * BATCH_INTERVAL_MS, place * SPREAD_MS // in_batch)
