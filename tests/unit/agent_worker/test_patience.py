from __future__ import annotations

from itertools import islice

import pytest

from agent_worker import patience
from relay.errors import RedisMisconfigured, RedisUnavailable


def test_delays_grow_are_spread_and_bounded() -> None:
    waits = list(islice(patience.delays(), 12))
    assert waits[0] <= patience.FIRST_DELAY_S
    assert all(0 < wait <= patience.LAST_DELAY_S for wait in waits)
    assert waits[-1] >= patience.LAST_DELAY_S / 2


async def test_it_tries_until_redis_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.001)
    failures: list[Exception] = [RedisUnavailable("away"), RedisMisconfigured("wrong password")]

    async def operation() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert await patience.until_redis_answers(operation, "test") == "answer"


async def test_other_errors_are_not_waited_for() -> None:
    async def operation() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        await patience.until_redis_answers(operation, "test")
