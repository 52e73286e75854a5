"""Commands to Redis end when whoever waits for them is cancelled, in whatever moment that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from relay.scripts import RedisLink

MOST_STEPS = 60


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[RedisLink]:
    link = RedisLink(redis_url, max_connections=2)
    yield link
    await link.aclose()


@pytest.mark.parametrize("is_connected", [True, False])
async def test_cancellation_in_any_moment_of_a_command_is_obeyed(
    link: RedisLink, is_connected: bool
) -> None:
    forever = asyncio.Event()

    async def work() -> None:
        await link.client.ping()
        await forever.wait()

    for steps in range(MOST_STEPS):
        await (link.client.ping() if is_connected else link.pool.disconnect())
        task = asyncio.create_task(work())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled(), f"after {steps} steps of the loop"
    assert await link.client.ping()


async def test_what_fails_while_it_is_sent_is_told_in_the_client_s_words(link: RedisLink) -> None:
    connection: AbstractConnection = await link.pool.get_connection()  # type: ignore[no-untyped-call]
    connection.socket_timeout = 0.2
    # The socket holds some megabytes; Redis does not take a command of that length at once.
    with pytest.raises(redis_errors.TimeoutError, match="writing"):
        await connection.send_packed_command([b"$1\r\n"] + [b"x" * 1_000_000] * 600)
    assert not connection.is_connected
    await connection.send_packed_command("PING\r\n")
    assert await connection.read_response() == b"PONG"
    await link.pool.release(connection)
