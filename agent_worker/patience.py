"""Waiting for Redis: what must happen sooner or later is tried until it does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import structlog

from agent_worker.metrics import WorkerMetrics
from relay.errors import RedisMisconfigured, RedisUnavailable

T = TypeVar("T")

FIRST_DELAY_S = 0.05
LAST_DELAY_S = 2.0

REDIS_AWAY = (RedisUnavailable, RedisMisconfigured)
"""What passes: also a refusal, since passwords and rights are changed on both sides in turn."""

_log = structlog.get_logger(__name__)


def delays() -> Iterator[float]:
    """Give the seconds to wait before each further try: doubling, with jitter, bounded."""
    ceiling_s = FIRST_DELAY_S
    while True:
        # Half of it is fixed: workers spread, and none of them hammers.
        yield ceiling_s * random.uniform(0.5, 1)  # noqa: S311
        ceiling_s = min(LAST_DELAY_S, ceiling_s * 2)


async def until_redis_answers(
    operation: Callable[[], Awaitable[T]], part: str, metrics: WorkerMetrics | None = None
) -> T:
    """Carry out an operation that may be repeated, as often as it takes.

    Cancelling is the way to stop it.

    Args:
        operation: Has the same effect once or several times.
        part: What is being done, for logs and metrics.
        metrics: Where failures are counted, if anywhere.
    """
    waits = delays()
    is_away = False
    while True:
        try:
            result = await operation()
        except REDIS_AWAY as error:
            if metrics is not None:
                metrics.redis_failures.labels(part).inc()
            if not is_away:
                _log.warning("redis_away", part=part, reason=str(error))
            is_away = True
            await asyncio.sleep(next(waits))
        else:
            if is_away:
                _log.info("redis_back", part=part)
            return result
