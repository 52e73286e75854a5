"""Who may connect: every refusal comes before the upgrade, and says what to do."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING

import httpx
import jwt
import pytest
import redis.asyncio
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidStatus

from gateway.app import Gateway, running_gateway
from relay.keys import Keys
from tests.integration.gateway_support import (
    SECRET,
    bearer,
    direct_only,
    eventually,
    gateway_settings,
    http,
    raw_tab,
    read_problem,
    refusal,
    tab,
    token,
    upgrade_by_hand,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import OwnRedis


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(
        redis_url, key_prefix, jwt_issuer="app", jwt_audience="relay", max_connections_per_user=3
    )
    async with running_gateway(settings) as running:
        yield running


GOOD = {"issuer": "app", "audience": "relay"}


def unsigned() -> str:
    parts = [{"alg": "none", "typ": "JWT"}, {"sub": "alice", "exp": 4_000_000_000}]
    return (
        ".".join(
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
            for part in parts
        )
        + "."
    )


async def test_token_comes_as_header_or_as_subprotocol(gateway: Gateway) -> None:
    async with tab(gateway, "alice", **GOOD) as opened:
        assert opened.frames[0]["user_id"] == "alice"
        assert opened.socket.subprotocol is None
    entry = f"bearer.{token('bob', **GOOD)}"
    async with raw_tab(gateway, subprotocols=["relay.v1", entry]) as opened:
        assert (await opened.receive())["user_id"] == "bob"
        assert opened.socket.subprotocol == "relay.v1"
        response = opened.socket.response
        assert response is not None
        assert all("bearer" not in value for value in response.headers.values())


async def test_bad_tokens_are_refused_with_401_and_the_next_good_one_works(
    gateway: Gateway,
) -> None:
    expired = token(ttl_s=-60, **GOOD)
    claims = {"sub": "alice", "exp": 4_000_000_000, "iss": "app", "aud": "relay"}
    without_user = jwt.encode({**claims, "sub": ""}, SECRET, "HS256")
    bad = {
        "no token": ({}, "no token"),
        "garbage": ({"Authorization": "Bearer garbage"}, "not a JSON Web Token"),
        "not bearer": ({"Authorization": f"Basic {token(**GOOD)}"}, "not: Bearer"),
        "empty": ({"Authorization": "Bearer"}, "not: Bearer"),
        "expired": ({"Authorization": f"Bearer {expired}"}, "expired"),
        "issuer": (bearer(issuer="other", audience="relay"), "issuer"),
        "audience": (bearer(issuer="app", audience="other"), "audience"),
        "alg none": ({"Authorization": f"Bearer {unsigned()}"}, "algorithm"),
        "key": (bearer(secret="k" * 40, **GOOD), "signature"),
        "user": ({"Authorization": f"Bearer {without_user}"}, "sub"),
    }
    for headers, words in bad.values():
        response, problem = await refusal(gateway, headers=headers)
        assert response.status_code == 401
        assert problem["code"] == "invalid_token"
        assert words in problem["detail"]
        assert response.headers["WWW-Authenticate"] == "Bearer"
        shown = headers.get("Authorization", "").partition(" ")[2]
        assert not shown or shown not in (response.body or b"").decode()
        async with http(gateway, None) as client:
            answer = await client.post("/v1/runs", headers=headers, json={})
            assert answer.status_code == 401
            assert answer.json()["detail"] == problem["detail"]
    async with tab(gateway, **GOOD):
        pass
    assert gateway.metrics.refused == {"invalid_token": len(bad)}


async def test_token_in_the_url_is_refused_with_guidance(gateway: Gateway) -> None:
    secret = token(**GOOD)
    for name in ("token", "access_token", "ticket"):
        query = f"?{name}={secret}"
        response, problem = await refusal(gateway, query=query, headers=bearer(**GOOD))
        assert response.status_code == 401, name
        assert "URL" in problem["detail"], name
        assert any("bearer.<token>" in hint for hint in problem["recovery_suggestions"])
        assert secret not in (response.body or b"").decode()


async def test_ticket_opens_one_connection_only(gateway: Gateway) -> None:
    async with http(gateway, "alice", **GOOD) as client:
        answer = await client.post("/v1/tickets")
        assert answer.status_code == 201
        assert answer.json()["expires_in_s"] == 30
        ticket = answer.json()["ticket"]
    async with raw_tab(gateway, query=f"?ticket={ticket}") as opened:
        assert (await opened.receive())["user_id"] == "alice"
    response, problem = await refusal(gateway, query=f"?ticket={ticket}")
    assert response.status_code == 401
    assert "used" in problem["detail"]
    for made_up in ("", "x", "x" * 43, "*", "%7Balice%7D%3Alive"):
        assert (await refusal(gateway, query=f"?ticket={made_up}"))[0].status_code == 401


async def test_ticket_used_by_two_at_once_opens_one(gateway: Gateway) -> None:
    async with http(gateway, "alice", **GOOD) as client:
        ticket = (await client.post("/v1/tickets")).json()["ticket"]

    async def attempt() -> bool:
        try:
            async with raw_tab(gateway, query=f"?ticket={ticket}"):
                return True
        except InvalidStatus:
            return False

    assert sorted(await asyncio.gather(*(attempt() for _ in range(5)))) == [False] * 4 + [True]


async def test_ticket_expires(
    gateway: Gateway, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    async with http(gateway, "alice", **GOOD) as client:
        ticket = (await client.post("/v1/tickets")).json()["ticket"]
        assert 0 < await redis.pttl(Keys(key_prefix).ticket(ticket)) <= 30_000
    async with http(gateway, None) as client:
        assert (await client.get("/v1/runs", params={"ticket": ticket})).status_code == 401


async def test_pages_of_other_origins_are_refused(gateway: Gateway) -> None:
    host = gateway.url.removeprefix("http://")
    for origin in ("https://evil.example", "null", f"http://{host}.evil.example", "http://[::1"):
        response, problem = await refusal(gateway, headers={**bearer(**GOOD), "Origin": origin})
        assert response.status_code == 403
        assert problem["code"] == "forbidden"
        assert "RELAY_ALLOWED_ORIGINS" in problem["recovery_suggestions"][0]
        async with http(gateway, "alice", **GOOD) as client:
            answer = await client.post("/v1/tickets", headers={"Origin": origin})
            assert answer.status_code == 403
    async with raw_tab(gateway, headers={**bearer(**GOOD), "Origin": gateway.url}) as opened:
        assert (await opened.receive())["type"] == "connection_established"


@pytest.mark.usefixtures("server")
async def test_allowed_origins_may_connect(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(
        redis_url, key_prefix, allowed_origins="https://chat.example.com,http://localhost:3000"
    )
    async with running_gateway(settings) as gateway:
        for origin in ("https://chat.example.com", "http://localhost:3000", gateway.url):
            async with raw_tab(gateway, headers={**bearer(), "Origin": origin}) as opened:
                assert (await opened.receive())["type"] == "connection_established"
        response, _ = await refusal(
            gateway, headers={**bearer(), "Origin": "https://chat.example.com.evil.example"}
        )
        assert response.status_code == 403


async def test_limit_of_connections_is_told_with_429(gateway: Gateway) -> None:
    async with tab(gateway, **GOOD), tab(gateway, **GOOD):
        async with tab(gateway, **GOOD):
            response, problem = await refusal(gateway, headers=bearer(**GOOD))
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) > 0
            assert "3 connections" in problem["detail"]
            async with http(gateway, "alice", **GOOD) as client:
                answer = await client.post("/v1/tickets")
                assert answer.status_code == 429
                assert int(answer.headers["Retry-After"]) > 0
            async with tab(gateway, "bob", **GOOD):
                pass
        async with tab(gateway, **GOOD):
            pass


async def test_wrong_parameters_are_named(gateway: Gateway) -> None:
    for query, words in (
        ("?since=yesterday", "since is active, now, 0 or a position"),
        ("?since=e:-5", "since"),
        (f"?client_id={'x' * 129}", "client_id"),
    ):
        response, problem = await refusal(gateway, query=query, headers=bearer(**GOOD))
        assert response.status_code == 422
        assert words in problem["detail"]


async def test_header_beyond_ascii_keeps_nobody_out(gateway: Gateway) -> None:
    for value in ("café".encode(), b"caf\xe9"):
        authorization, line = bearer(**GOOD)["Authorization"], b"Cookie: place=" + value
        upgrade = upgrade_by_hand(gateway.url, authorization, line=line)
        async with asyncio.timeout(5), upgrade as (reader, _):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), value


# Refused below ASGI: an application does not hear of it, and the answer is its server's.
@direct_only
@pytest.mark.parametrize(
    ("header", "query", "code"),
    [
        ("X-Long: " + "x" * 9_000, "", "frame_too_large"),
        ("Sec-WebSocket-Protocol: " + "a," * 5_000 + "b", "", "frame_too_large"),
        ("\r\n".join(f"X-{number}: x" for number in range(200)), "", "frame_too_large"),
        ("X-Short: x", "?since=now&x=" + "x" * 9_000, "frame_too_large"),
        ("Content-Length: 5", "", "invalid_frame"),
        ("Transfer-Encoding: chunked", "", "invalid_frame"),
        ("Sec-WebSocket-Protocol: a\x01", "", "invalid_frame"),
        ("Sec-WebSocket-Version: 8", "", "bad_request"),
        ("Sec-WebSocket-Key: short", "", "bad_request"),
        ("Upgrade: websocket", "", "upgrade_required"),
    ],
    ids=[
        "long header",
        "many protocols",
        "many headers",
        "long query",
        "body",
        "chunked",
        "control",
        "version",
        "key",
        "two upgrades",
    ],
)
async def test_handshake_that_cannot_be_read_is_refused_at_once_and_closed(
    gateway: Gateway, header: str, query: str, code: str
) -> None:
    upgrade = upgrade_by_hand(
        gateway.url, bearer(**GOOD)["Authorization"], query=query, line=header.encode()
    )
    async with asyncio.timeout(5), upgrade as (reader, _):
        _, problem = read_problem(await reader.read())
    assert problem["code"] == code
    assert gateway.metrics.refused == {code: 1}
    assert gateway.metrics.requests_refused == {}
    async with tab(gateway, "alice", **GOOD) as opened:
        assert await opened.is_alive()


HALF_REQUESTS = (
    b"",
    b"GET /v1/ws HTTP/1.1\r\nHost: x\r\n",
    b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
)


async def test_request_that_does_not_come_to_an_end_loses_its_connection(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server.REQUEST_S", 0.3)
    host, port = gateway.url.removeprefix("http://").split(":")

    async def send_half(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            async with asyncio.timeout(4):
                await reader.read()
        finally:
            writer.close()

    # A connection that is served is not meant.
    async with tab(gateway, "alice", **GOOD) as opened:
        await asyncio.gather(*map(send_half, HALF_REQUESTS))
        assert await opened.is_alive()


async def test_no_websocket_elsewhere(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with raw_tab(f"{gateway.url}/elsewhere"):
            pass
    assert caught.value.response.status_code == 404


@pytest.mark.usefixtures("server")
async def test_gateway_that_nothing_is_published_to_refuses_tickets_as_it_refuses_upgrades(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    private = await own_redis()
    async with (
        running_gateway(gateway_settings(private.url, key_prefix)) as gateway,
        redis.asyncio.Redis.from_url(private.url) as operator,
        http(gateway) as client,
    ):
        assert (await client.post("/v1/tickets")).status_code == 201
        # Connections that are open go on; the one for what is published is not made anew.
        await operator.config_set("maxclients", 1)
        assert await operator.client_kill_filter(_type="pubsub") == 1

        async def is_lost() -> bool:
            return not gateway.hub.subscriber.is_connected

        await eventually(is_lost)
        response, problem = await refusal(gateway, headers=bearer())
        assert (response.status_code, problem["code"]) == (503, "unavailable")
        told = await client.post("/v1/tickets")
        assert (told.status_code, told.json()) == (503, problem)
        assert told.headers["Retry-After"] == response.headers["Retry-After"]
        assert (await client.get("/v1/events")).status_code == 503


async def test_ticket_is_refused_for_the_parameters_of_its_websocket(gateway: Gateway) -> None:
    async with http(gateway, "alice", **GOOD) as client:
        for query in ("?since=yesterday", f"?client_id={'x' * 129}"):
            response, problem = await refusal(gateway, query=query, headers=bearer(**GOOD))
            told = await client.post(f"/v1/tickets{query}")
            assert (told.status_code, told.json()) == (response.status_code, problem)


@pytest.mark.usefixtures("server")
async def test_redis_away_is_told_with_503(own_redis: OwnRedis, key_prefix: str) -> None:
    private = await own_redis()
    async with running_gateway(gateway_settings(private.url, key_prefix)) as gateway:
        async with tab(gateway):
            pass
        await private.kill()
        await asyncio.sleep(1.1)  # the list of agents may be that old, and needs no Redis
        response, problem = await refusal(gateway, headers=bearer())
        assert response.status_code == 503
        assert problem["code"] == "unavailable"
        assert int(response.headers["Retry-After"]) > 0
        async with http(gateway) as client:
            for answer in (
                await client.post("/v1/tickets"),
                await client.get("/v1/runs"),
                await client.post("/v1/runs", json={"thread_id": "t", "content": "x"}),
            ):
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
        await private.start()
        for _ in range(100):
            try:
                # It may be told first that Redis was away a moment ago.
                async with raw_tab(gateway, headers=bearer()) as opened:
                    await opened.until("connection_established")
                    break
            except InvalidStatus:
                await asyncio.sleep(0.05)
        else:
            pytest.fail("the gateway did not come back")


async def test_request_without_upgrade_is_told_to_upgrade(gateway: Gateway) -> None:
    async with http(gateway, "alice", **GOOD) as client:
        answer = await client.get("/v1/ws")
    assert answer.status_code == 426
    assert answer.headers["Upgrade"] == "websocket"
    assert answer.headers["Connection"].lower() == "upgrade"
    assert answer.json()["code"] == "upgrade_required"
    assert any("wss://" in hint for hint in answer.json()["recovery_suggestions"])


async def test_list_of_agents_that_cannot_be_read_refuses_nobody(
    gateway: Gateway, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    await redis.set(Keys(key_prefix).agents, b"of the wrong type")
    async with raw_tab(gateway, headers=bearer(**GOOD)) as opened:
        assert (await opened.receive())["agents"] == []
    async with httpx.AsyncClient(base_url=gateway.admin_url, trust_env=False) as operator:
        answer = await operator.get("/readyz")
        assert answer.status_code == 200
        [agents] = [check for check in answer.json()["checks"] if check["name"] == "agents"]
        assert not agents["ok"]
        assert not agents["required"]
        assert "WRONGTYPE" in agents["detail"]


class WithoutExtensions(WebSocketsSansIOProtocol):
    """A server that offers no ASGI extension, and so does not name any."""

    async def run_asgi(self) -> None:
        del self.scope["extensions"]  # type: ignore[typeddict-item]
        await super().run_asgi()


async def test_a_server_without_asgi_extensions_serves_and_refuses(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server.RelayWebSocketProtocol", WithoutExtensions)
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as running:
        async with tab(running, "alice") as opened:
            assert opened.frames[0]["user_id"] == "alice"
            assert await opened.is_alive()
        # It has no way to say more than that.
        with pytest.raises(InvalidStatus) as refused:
            async with raw_tab(running):
                pass
        assert refused.value.response.status_code == 403
        assert running.metrics.refused["invalid_token"] == 1
