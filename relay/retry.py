"""When a failed attempt is tried again. Pure."""

from __future__ import annotations

FIRST_RETRY_MS = 1_000
LONGEST_RETRY_MS = 60_000


def retry_delay_ms(attempt: int) -> int:
    """Give how long to wait after this attempt (from 1): doubling from a second to a minute."""
    return min(LONGEST_RETRY_MS, FIRST_RETRY_MS << min(attempt - 1, 16))
