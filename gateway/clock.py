"""The two clocks of a gateway, in milliseconds."""

from __future__ import annotations

import time


def wall_ms() -> int:
    """Give the time of day, for timestamps and tokens."""
    return time.time_ns() // 1_000_000


def steady_ms() -> int:
    """Give a time that never jumps, for intervals."""
    return time.monotonic_ns() // 1_000_000
