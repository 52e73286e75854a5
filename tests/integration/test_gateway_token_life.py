"""A token's life on an open connection: nothing after its end, and nobody else's token instead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import orjson
import pytest
import pytest_asyncio
from websockets.exceptions import ConnectionClosed

from gateway.app import Gateway, running_gateway
from gateway.protocol import CLOSE_LIMIT_MS
from relay.config import Settings
from tests.integration.gateway_support import (
    Work,
    bearer,
    eventually,
    gateway_settings,
    raw_tab,
    refusal,
    tab,
    token,
)
from tests.support.proxy import TcpProxy

APP = {"issuer": "app", "audience": "relay"}
AFTER_S = 1.0
"""Events that arrive this long after the token's expiry are a defect."""


@pytest.fixture
def settings(redis_url: str, key_prefix: str, server: str) -> Settings:
    return gateway_settings(redis_url, key_prefix, jwt_issuer="app", jwt_audience="relay")


@pytest_asyncio.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    async with running_gateway(settings) as running:
        yield running


async def publish_until(work: Work, is_over: Callable[[], bool]) -> None:
    while not is_over():
        await work.run()


Listener = Callable[[Gateway, str], Awaitable[tuple[list[float], int]]]


async def over_websocket(gateway: Gateway, shown: str) -> tuple[list[float], int]:
    """Listen until it is closed; gives when the events came, and the close code."""
    arrived: list[float] = []
    async with raw_tab(gateway, headers={"Authorization": f"Bearer {shown}"}) as opened:
        try:
            while True:
                if "offset" in await opened.receive():
                    arrived.append(time.time())
        except ConnectionClosed:
            return arrived, opened.socket.close_code or 0


async def over_http(gateway: Gateway, shown: str) -> tuple[list[float], int]:
    arrived: list[float] = []
    headers = {"Authorization": f"Bearer {shown}"}
    async with (
        httpx.AsyncClient(trust_env=False, headers=headers) as client,
        client.stream("GET", gateway.url + "/v1/events") as answer,
    ):
        is_close = False
        async for line in answer.aiter_lines():
            if line == "event: close":
                is_close = True
            elif line.startswith("data: "):
                frame = orjson.loads(line.removeprefix("data: "))
                if is_close:
                    return arrived, int(frame["code"])
                if "offset" in frame:
                    arrived.append(time.time())
    raise AssertionError("the stream ended without a word")


@pytest.mark.parametrize("listen", [over_websocket, over_http])
async def test_no_event_comes_after_the_expiry(
    gateway: Gateway, settings: Settings, listen: Listener
) -> None:
    expires_s = time.time() + 1.5
    is_over = asyncio.Event()
    async with Work(settings) as work, asyncio.TaskGroup() as group:
        group.create_task(publish_until(work, is_over.is_set))
        arrived, code = await listen(gateway, token(ttl_s=1.5, **APP))
        is_over.set()
    assert code == 4401
    assert len(arrived) > 5
    assert max(arrived) < expires_s + AFTER_S


async def test_slow_reader_has_no_time_to_take_what_waits_after_the_expiry(
    gateway: Gateway, settings: Settings
) -> None:
    port = int(gateway.url.rpartition(":")[2])
    with TcpProxy(port, bytes_per_s=4_096) as modem:
        expires_s = time.time() + 2.5
        shown = bearer(ttl_s=2.5, **APP)
        async with Work(settings) as work, raw_tab(modem.url, headers=shown) as slow:
            await slow.until("connection_established")
            for _ in range(4):
                await work.run(pieces=("x" * 500_000,))
            await eventually(lambda: is_empty(gateway))
            # Whoever is closed in the usual way gets five seconds to take it.
            assert time.time() < expires_s + CLOSE_LIMIT_MS / 1000 - 1
            modem.cut()


async def is_empty(gateway: Gateway) -> bool:
    return len(gateway.pool) == 0


async def test_token_within_the_leeway_is_taken_and_ends_with_it(gateway: Gateway) -> None:
    async with tab(gateway, ttl_s=-28.5, **APP) as opened:
        assert (await opened.closed())[0] == 4401
    for late in (-30.5, -3_600):
        response, problem = await refusal(gateway, headers=bearer(ttl_s=late, **APP))
        assert response.status_code == 401
        assert "expired" in problem["detail"]


async def test_connection_is_not_refreshed_by_what_would_not_have_opened_it(
    gateway: Gateway,
) -> None:
    async with tab(gateway, **APP) as opened:
        for shown, words in (
            (token(issuer="another", audience="relay"), "issuer"),
            (token(issuer="app", audience="another"), "audience"),
            (token(audience="relay"), "issuer"),
            (token(issuer="app"), "audience"),
            (token(secret="k" * 40, **APP), "signature"),
            (token(ttl_s=-60, **APP), "expired"),
            (token("bob", **APP), "another user"),
        ):
            answer = await opened.ask(type="refresh_token", token=shown)
            assert answer["code"] == "invalid_token", words
            assert words in answer["message"]
            assert shown not in str(answer)
        answer = await opened.ask(type="refresh_token", token=token(**APP))
        assert answer["type"] == "ack"
