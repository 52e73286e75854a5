"""The wall clock, read in one place. Pure modules take the time as an argument instead."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Give the time in ms since the epoch."""
    return time.time_ns() // 1_000_000
