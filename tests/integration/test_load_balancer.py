"""Through the deployed load balancer, on raw sockets: both must see the same requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from websockets.exceptions import InvalidStatus

from gateway.app import Gateway, running_gateway
from tests.integration.gateway_support import bearer, gateway_settings, http, raw_tab, tab
from tests.support.balancer import Balancer

pytestmark = pytest.mark.needs_haproxy

HEAD = b"Host: relay.example\r\n"
# What a desynchronized gateway would put before somebody else's request.
PREFIX = b"GET /smuggled HTTP/1.1\r\nX-Swallows: "


@pytest_asyncio.fixture
async def gateway(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    # As in the Compose file: the clients' own addresses are in the trusted networks.
    settings = gateway_settings(
        redis_url, key_prefix, trusted_proxies="127.0.0.0/8", max_failed_logins_per_minute=3
    )
    async with running_gateway(settings) as running:
        yield running


@pytest_asyncio.fixture
async def balancer(gateway: Gateway, tmp_path: Path) -> AsyncIterator[Balancer]:
    # One gateway behind both names: whatever an attack leaves there meets the next client.
    async with Balancer(tmp_path, [gateway.url, gateway.url]) as running:
        yield running


async def exchange(balancer: Balancer, sent: bytes, wait_s: float = 0.3) -> bytes:
    """Send bytes and give what comes back until the other side closes or says no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
    received = b""
    try:
        writer.write(sent)
        async with asyncio.timeout(wait_s):
            while chunk := await reader.read(65_536):
                received += chunk
    except TimeoutError:
        pass  # It waits for more, or keeps the connection for another request.
    finally:
        writer.close()
    return received


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def post(*headers: bytes, body: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST /v1/runs HTTP/1.1\r\n" + HEAD + lines + b"\r\n" + body


ENDS_EARLY = b"0\r\n\r\n" + PREFIX
LENGTH = b"Content-Length: %d" % len(ENDS_EARLY)

ATTACKS = {
    "length and chunks": post(LENGTH, b"Transfer-Encoding: chunked", body=ENDS_EARLY),
    "chunks and length": post(
        b"Transfer-Encoding: chunked", b"Content-Length: 4", body=chunked(PREFIX)
    ),
    "chunked spelt wrongly": post(LENGTH, b"Transfer-Encoding: xchunked", body=ENDS_EARLY),
    "space before the colon": post(LENGTH, b"Transfer-Encoding : chunked", body=ENDS_EARLY),
    "vertical tab": post(LENGTH, b"Transfer-Encoding:\x0bchunked", body=ENDS_EARLY),
    "two encodings": post(
        LENGTH, b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=ENDS_EARLY
    ),
    "folded line": post(LENGTH, b"Transfer-Encoding:\r\n chunked", body=ENDS_EARLY),
    "bare line feed": post(LENGTH, b"X: y\nTransfer-Encoding: chunked", body=ENDS_EARLY),
    "two lengths": post(b"Content-Length: 0", LENGTH, body=PREFIX),
    "signed length": post(b"Content-Length: +%d" % len(PREFIX), body=PREFIX),
    "length in hex": post(b"Content-Length: 0x10", body=PREFIX),
    "chunk size with garbage": post(b"Transfer-Encoding: chunked", body=b"0_0\r\n\r\n" + PREFIX),
    "huge chunk size": post(b"Transfer-Encoding: chunked", body=b"10000000000000000\r\n" + PREFIX),
    "body of an upgrade": (
        b"GET /v1/ws HTTP/1.1\r\n"
        + HEAD
        + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        + b"Content-Length: %d\r\n\r\n%b" % (len(PREFIX), PREFIX)
    ),
    "upgrade in an old version": (
        b"GET /v1/ws HTTP/1.1\r\n"
        + HEAD
        + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777\r\n"
        + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        + PREFIX
    ),
    "upgrade to something else": (
        b"GET /healthz HTTP/1.1\r\n"
        + HEAD
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
        + PREFIX
    ),
}


async def test_nothing_can_be_put_before_somebody_elses_request(balancer: Balancer) -> None:
    asked = b"GET /healthz HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
    for name, attack in ATTACKS.items():
        answer = await exchange(balancer, attack)
        assert b" 101 " not in answer, name
        # One answer at most: a second would belong to a request that only the gateway saw.
        assert answer.count(b"HTTP/1.1 ") <= 1 + answer.count(b"HTTP/1.1 400"), (name, answer)
        for _ in range(3):
            theirs = await exchange(balancer, asked, wait_s=5)
            assert theirs.startswith(b"HTTP/1.1 200 "), (name, theirs)
            assert theirs.endswith(b'{"status":"ok"}'), (name, theirs)


async def test_upgrade_that_was_refused_is_no_tunnel(balancer: Balancer) -> None:
    refused = (
        b"GET /v1/ws HTTP/1.1\r\n"
        + HEAD
        + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    smuggled = b"GET /metrics HTTP/1.1\r\n" + HEAD + b"\r\n"
    answer = await exchange(balancer, refused + smuggled, wait_s=1)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"relay_connections" not in answer
    assert b" 101 " not in answer


async def test_made_up_address_goes_no_further_than_the_balancer(
    balancer: Balancer, gateway: Gateway
) -> None:
    statuses = []
    for number in range(5):
        made_up = {"Authorization": "Bearer a.b.c", "X-Forwarded-For": f"192.0.2.{number}"}
        async with http(gateway, None) as client:
            answer = await client.get(balancer.url + "/v1/runs", headers=made_up)
            statuses.append(answer.status_code)
    assert statuses == [401, 401, 401, 429, 429]


async def test_large_and_broken_frames_end_one_connection_only(
    balancer: Balancer, gateway: Gateway
) -> None:
    async with tab(balancer.url, "bob") as bystander:
        limit = gateway.settings.max_frame_bytes
        async with tab(balancer.url) as opened:
            await opened.socket.send(json.dumps({"type": "ping", "id": "x" * limit}))
            assert (await opened.error())["code"] == "frame_too_large"
            assert await opened.is_alive()
            await opened.socket.send("x" * (limit * 6))
            assert (await opened.closed())[0] == 1009
        # Not masked, reserved bits, an opcode that does not exist, a control frame in pieces.
        for broken in (
            b"\x81\x02hi",
            b"\xf1\x80\0\0\0\0",
            b"\x83\x80\0\0\0\0",
            b"\x09\x80\0\0\0\0",
        ):
            async with raw_tab(balancer.url, headers=bearer()) as opened:
                await opened.until("connection_established")
                opened.socket.transport.write(broken)
                assert (await opened.closed())[0] == 1002
        assert await bystander.is_alive()


async def test_large_headers_are_refused_before_the_upgrade(balancer: Balancer) -> None:
    for large in ({"X-Large": "x" * 12_000}, {f"X-{number}": "y" for number in range(150)}):
        with pytest.raises(InvalidStatus) as caught:
            async with raw_tab(balancer.url, headers={**bearer(), **large}):
                pass
        assert caught.value.response.status_code in (400, 413)
    with pytest.raises(InvalidStatus) as caught:
        async with raw_tab(balancer.url, headers=bearer(), query=f"?since={'x' * 12_000}"):
            pass
    assert caught.value.response.status_code in (400, 413)
    # In what both take, an upgrade goes through.
    async with raw_tab(balancer.url, headers={**bearer(), "X-Fill": "x" * 4_000}) as opened:
        assert (await opened.receive())["type"] == "connection_established"
