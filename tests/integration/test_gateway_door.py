"""At the door, on real sockets: floods without a token, guessing, pages of other sites."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import redis.asyncio

from gateway.app import Gateway, running_gateway
from tests.integration.gateway_support import (
    bearer,
    gateway_settings,
    http,
    raw_tab,
    read_problem,
    refusal,
    tab,
)


def address(gateway: Gateway) -> tuple[str, int]:
    host, port = gateway.url.removeprefix("http://").split(":")
    return host, int(port)


@pytest.mark.usefixtures("server")
async def test_sockets_that_send_nothing_make_room_for_those_who_mean_it(
    redis_url: str, key_prefix: str
) -> None:
    settings = gateway_settings(redis_url, key_prefix, max_waiting_sockets=16)
    async with running_gateway(settings) as gateway, tab(gateway) as opened:
        sockets = []
        for number in range(24):
            reader, writer = await asyncio.open_connection(*address(gateway))
            if number % 2:
                writer.write(b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            # A request that was answered does not make one a guest for ever.
            if number % 3:
                writer.write(
                    b"a\r\n\r\n" if number % 2 else b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
                )
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            sockets.append((reader, writer))
        for reader, _ in sockets[:6]:
            async with asyncio.timeout(5):
                told = (await reader.read()).rpartition(b"HTTP/1.1 503 ")
            headers, problem = read_problem(told[1] + told[2])
            assert problem["code"] == "unavailable"
            assert int(headers["retry-after"]) > 0
        async with tab(gateway, "bob") as other:
            assert await other.is_alive()
        assert await opened.is_alive()
        async with http(gateway, None) as client:
            text = (await client.get(gateway.admin_url + "/metrics")).text
        assert "relay_sockets_turned_away_total" in text
        for _, writer in sockets:
            writer.close()


@pytest_asyncio.fixture
async def strict(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(redis_url, key_prefix, max_failed_logins_per_minute=3)
    async with running_gateway(settings) as gateway:
        yield gateway


BAD = {"Authorization": "Bearer a.b.c"}


async def test_guessing_is_slowed_down_before_it_costs_anything(
    strict: Gateway, redis: redis.asyncio.Redis
) -> None:
    statuses = [(await refusal(strict, headers=BAD))[0].status_code for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    asked = int((await redis.info("commandstats")).get("cmdstat_getdel", {}).get("calls", 0))
    response, problem = await refusal(strict, query=f"?ticket={'x' * 43}")
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) > 0
    assert any("RELAY_TRUSTED_PROXIES" in hint for hint in problem["recovery_suggestions"])
    after = int((await redis.info("commandstats")).get("cmdstat_getdel", {}).get("calls", 0))
    assert after == asked
    async with http(strict, None) as client:
        for path in ("/v1/runs", "/v1/events"):
            assert (await client.get(path, headers=BAD)).status_code == 429
    # Whoever shares the address and has a token is served.
    async with tab(strict):
        pass


async def test_made_up_client_address_is_not_believed(strict: Gateway) -> None:
    made_up = [{**BAD, "X-Forwarded-For": f"192.0.2.{number}"} for number in range(5)]
    statuses = [(await refusal(strict, headers=headers))[0].status_code for headers in made_up]
    assert statuses == [401, 401, 401, 429, 429]


@pytest.mark.usefixtures("server")
async def test_clients_behind_a_trusted_proxy_are_told_apart(
    redis_url: str, key_prefix: str
) -> None:
    settings = gateway_settings(
        redis_url, key_prefix, max_failed_logins_per_minute=1, trusted_proxies="127.0.0.1, ::1"
    )
    async with running_gateway(settings) as gateway:

        async def try_from(client: str) -> int:
            headers = {**BAD, "X-Forwarded-For": client}
            return (await refusal(gateway, headers=headers))[0].status_code

        # The last entry is the proxy's; what comes before is the client's own invention.
        assert [await try_from("1.1.1.1, 192.0.2.1"), await try_from("2.2.2.2, 192.0.2.1")] == [
            401,
            429,
        ]
        assert await try_from("192.0.2.2") == 401


# --- Pages of other sites (cross-site WebSocket hijacking) ---


@pytest.mark.usefixtures("server")
async def test_page_of_another_site_gets_no_connection_whatever_its_origin_looks_like(
    redis_url: str, key_prefix: str
) -> None:
    allowed = "https://chat.example.com"
    settings = gateway_settings(redis_url, key_prefix, allowed_origins=allowed)
    async with running_gateway(settings) as gateway:
        own = gateway.url.removeprefix("http://")
        host, port = own.split(":")
        foreign = [
            "null",
            "",
            "file://",
            "https://evil.example",
            "http://chat.example.com",
            "https://chat.example.com:444",
            "https://chat.example.com.evil.example",
            "https://evilchat.example.com",
            "https://evil.example/https://chat.example.com",
            "https://chat.example.com@evil.example",
            "https://chat.example.com%2eevil.example",
            "https://chat.example.com#.evil.example",
            "https://chat.example.com, https://evil.example",
            "https://chat.example.com https://evil.example",
            f"http://{host}:{int(port) + 1}",
            f"http://{host}",
            f"http://{own}.evil.example",
            f"http://evil.example@{own}",
            f"ws://{own}",
            f"http://{own}/path",
            "http://[::1",
        ]
        for origin in foreign:
            response, problem = await refusal(gateway, headers={**bearer(), "Origin": origin})
            assert (response.status_code, problem["code"]) == (403, "forbidden"), origin
            async with http(gateway) as client:
                answer = await client.post("/v1/tickets", headers={"Origin": origin})
                assert answer.status_code == 403, origin
                assert "access-control-allow-origin" not in answer.headers, origin
        for origin in (allowed, allowed.upper(), gateway.url):
            async with raw_tab(gateway, headers={**bearer(), "Origin": origin}) as opened:
                assert (await opened.receive())["type"] == "connection_established"


async def test_cookie_is_no_credential(strict: Gateway) -> None:
    cookie = {"Cookie": f"token={bearer()['Authorization'].split()[1]}"}
    assert (await refusal(strict, headers=cookie))[0].status_code == 401


BYPASSES = ("X-User-Id", "X-Forwarded-User", "X-Remote-User", "X-Auth-Bypass", "X-Test-Mode")


@pytest.mark.usefixtures("server")
async def test_no_header_gets_one_past_the_token(redis_url: str, key_prefix: str) -> None:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:
        for name in BYPASSES:
            for value in ("alice", "true", "1"):
                response, _ = await refusal(gateway, headers={name: value})
                assert response.status_code == 401, name
