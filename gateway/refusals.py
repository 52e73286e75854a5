"""Errors of the layers below in the words of the wire: one place, for every transport."""

from __future__ import annotations

import math

import structlog

from relay.errors import (
    RedisMisconfigured,
    RedisUnavailable,
    RelayError,
    RequestRefused,
    TokenRejected,
)
from relay.scripts import KeyTaken

UNAVAILABLE_RETRY_MS = 2_000
LIMIT_RETRY_MS = 5_000

log = structlog.stdlib.get_logger(__name__)


def refusal_of(error: Exception) -> RequestRefused:
    """Give what a client is told when a request ended with this exception.

    What a client could not act upon is logged here and told as ``internal``; the texts of
    such exceptions stay on this side.
    """
    match error:
        case RequestRefused():
            return error
        case TokenRejected():
            return RequestRefused("invalid_token", str(error))
        case RedisUnavailable():
            return RequestRefused("unavailable", retry_after_ms=UNAVAILABLE_RETRY_MS)
        case RedisMisconfigured():
            log.error("redis refuses this gateway", error=str(error))
            return RequestRefused("unavailable", retry_after_ms=UNAVAILABLE_RETRY_MS)
        case KeyTaken():
            log.error("request failed", error=str(error))
            return unreadable()
        case RelayError():
            log.error("request failed", error=str(error), exc_info=error)
        case _:
            log.error("request failed", error=type(error).__name__, exc_info=error)
    return RequestRefused("internal")


def unreadable() -> RequestRefused:
    """Give what a user is told whose keys in Redis hold something else than our data."""
    return RequestRefused(
        "internal",
        "What is stored for you cannot be read, so nothing can be delivered.",
        suggestions=(
            "Give your operator the time of this message: the log of the gateway names the cause.",
            "Try again when it has been repaired.",
        ),
    )


def retry_after_s(refused: RequestRefused) -> int | None:
    """Give the value of ``Retry-After``, whole seconds; None where trying again is no use."""
    if refused.http_status not in (429, 503) and refused.retry_after_ms is None:
        return None
    return max(1, math.ceil((refused.retry_after_ms or UNAVAILABLE_RETRY_MS) / 1000))
