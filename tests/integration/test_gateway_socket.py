"""The socket below a connection: what is on the wire, whoever is at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import random
import socket as sockets
import struct
from typing import TYPE_CHECKING, Any

import pytest

from gateway import direct
from gateway.app import Gateway, running_gateway
from gateway.clock import steady_ms
from gateway.metrics import GatewayMetrics
from gateway.protocol import PING_INTERVAL_MS
from gateway.server import Listener, bind, server_config
from gateway.session import PINGS_AT_ONCE
from gateway.wire import Opcode
from relay.errors import CloseCode
from tests.integration.gateway_support import (
    Work,
    bearer,
    direct_only,
    eventually,
    gateway_settings,
    http,
    raw_tab,
    tab,
    upgrade_by_hand,
)
from tests.unit.gateway.test_wire import sent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as running:
        yield running


class Wire:
    """A client that sends and sees bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, opcode: int, data: bytes = b"", **options: Any) -> None:
        self.writer.write(sent(opcode, data, **options))

    async def receive(self) -> tuple[int, bytes]:
        async with asyncio.timeout(5):
            first, size = await self.reader.readexactly(2)
            if size == 126:
                [size] = struct.unpack("!H", await self.reader.readexactly(2))
            elif size == 127:
                [size] = struct.unpack("!Q", await self.reader.readexactly(8))
            return first & 0x0F, await self.reader.readexactly(size)

    async def until(self, opcode: int) -> bytes:
        while True:
            received, data = await self.receive()
            if received == opcode:
                return data

    async def closed(self) -> int:
        """Give the code of the close frame, once the end of the stream followed it."""
        payload = await self.until(Opcode.CLOSE)
        async with asyncio.timeout(5):
            assert await self.reader.read() == b""
        return int.from_bytes(payload[:2])

    async def is_alive(self) -> bool:
        self.send(Opcode.TEXT, b'{"type": "ping", "id": "alive"}')
        while True:
            frame = json.loads(await self.until(Opcode.TEXT))
            if frame.get("id") == "alive":
                return bool(frame["type"] == "pong")


@contextlib.asynccontextmanager
async def upgraded(url: str, early: bytes = b"") -> AsyncIterator[Wire]:
    authorization = bearer()["Authorization"]
    async with upgrade_by_hand(url, authorization, behind=early) as (reader, writer):
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        yield Wire(reader, writer)


@contextlib.asynccontextmanager
async def wire(gateway: Gateway, early: bytes = b"") -> AsyncIterator[Wire]:
    async with upgraded(gateway.url, early) as opened:
        assert json.loads(await opened.until(Opcode.TEXT))["type"] == "connection_established"
        yield opened


async def test_ping_is_answered_with_its_payload_and_a_pong_is_not(gateway: Gateway) -> None:
    async with wire(gateway) as opened:
        opened.send(Opcode.PONG, b"nobody asked")
        opened.send(Opcode.PING, b"are you there?")
        assert await opened.receive() == (Opcode.PONG, b"are you there?")
        assert await opened.is_alive()


# Pings, violations and sockets that are full are a server's own affair, below ASGI.
@direct_only
@pytest.mark.parametrize("opcode", [Opcode.PING, Opcode.PONG])
async def test_flood_of_pings_closes_with_4429(gateway: Gateway, opcode: int) -> None:
    async with wire(gateway) as opened, tab(gateway, "bob") as other:
        for _ in range(PINGS_AT_ONCE // 2):
            opened.send(opcode, b"x")
        assert await opened.is_alive()
        for _ in range(PINGS_AT_ONCE * 2):
            opened.send(opcode, b"x")
        payload = await opened.until(Opcode.CLOSE)
        assert int.from_bytes(payload[:2]) == CloseCode.LIMIT
        assert await other.is_alive()


@direct_only
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (sent(Opcode.TEXT, b"{}", mask=False), 1002),
        (sent(Opcode.TEXT, b"{}", first=0xC0), 1002),
        (sent(Opcode.TEXT, b"{", first=0) + sent(Opcode.TEXT, b"}"), 1002),
        (sent(Opcode.TEXT, b"\xff"), 1007),
        (sent(Opcode.CLOSE, b"\x03"), 1002),
        (sent(Opcode.TEXT, first=0) + sent(Opcode.CONTINUATION, first=0) * 1_000, 1008),
    ],
)
async def test_violation_is_told_although_more_was_sent_behind_it(
    gateway: Gateway, data: bytes, code: int
) -> None:
    async with wire(gateway) as opened:
        opened.writer.write(data + sent(Opcode.TEXT, b"x" * 60_000) * 20)
        assert await opened.closed() == code

        async def is_gone() -> bool:
            return not len(gateway.pool)

        await eventually(is_gone)
        assert gateway.metrics.closed == {str(code): 1}


async def test_close_is_answered_with_its_code_and_ends_the_stream(gateway: Gateway) -> None:
    async with wire(gateway) as opened:
        opened.send(Opcode.CLOSE, struct.pack("!H", 3001) + b"enough")
        assert await opened.closed() == 3001

    async def is_counted() -> bool:
        return gateway.metrics.closed == {"3001": 1}

    await eventually(is_counted)


async def test_compression_is_not_agreed_to_so_that_no_frame_can_grow(gateway: Gateway) -> None:
    # What browsers offer; and frames compressed all the same are a violation (reserved bit), above.
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    async with raw_tab(gateway, headers={**bearer(), **offer}) as opened:
        assert opened.socket.response is not None
        assert "Sec-WebSocket-Extensions" not in opened.socket.response.headers
        assert (await opened.receive())["type"] == "connection_established"
    # Nor does a body of a request grow: it is taken as it came, which is no JSON.
    bomb = gzip.compress(b" " * 10_000_000)
    async with http(gateway) as client:
        answer = await client.post("/v1/runs", content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_json"


@direct_only
async def test_pings_of_connections_that_came_together_are_spread(gateway: Gateway) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(12):
            await stack.enter_async_context(tab(gateway, f"user-{number}"))
        now_ms = steady_ms()
        waits_ms = [connection._ping_due_ms - now_ms for connection in gateway._wheel._slot_of]
    assert len(waits_ms) == 12
    assert all(0 < wait_ms <= PING_INTERVAL_MS for wait_ms in waits_ms)
    # Half an interval is what they are spread over; all within a tenth of it is no chance.
    assert max(waits_ms) - min(waits_ms) > PING_INTERVAL_MS / 20


async def test_requests_are_answered_in_their_order_however_they_arrive(
    gateway: Gateway,
) -> None:
    async with Work(gateway.settings), wire(gateway) as opened:
        requests = []
        for number in range(5):
            message = {"thread_id": f"t{number}", "content": "x"}
            requests += [
                {"type": "user_message", "id": f"m{number}", **message},
                {"type": "ping", "id": f"p{number}"},
            ]
        data = b"".join(sent(Opcode.TEXT, json.dumps(request).encode()) for request in requests)
        for start in range(0, len(data), 50):
            opened.writer.write(data[start : start + 50])
            await asyncio.sleep(0)
        answers: list[dict[str, Any]] = []
        while len(answers) < len(requests):
            frame = json.loads(await opened.until(Opcode.TEXT))
            if "id" in frame:
                answers.append(frame)
        assert [answer["id"] for answer in answers] == [request["id"] for request in requests]
        assert {answer["type"] for answer in answers} == {"ack", "pong"}


async def test_frame_behind_the_handshake_is_not_lost(gateway: Gateway) -> None:
    early = sent(Opcode.TEXT, b'{"type": "ping", "id": "early"}')
    async with wire(gateway, early=early) as opened:
        frame = json.loads(await opened.until(Opcode.TEXT))
        assert (frame["type"], frame["id"]) == ("pong", "early")


# uvicorn's own class answers it before the handshake.
@direct_only
async def test_ping_behind_the_handshake_is_answered_behind_it(gateway: Gateway) -> None:
    async with wire(gateway, early=sent(Opcode.PING, b"early")) as opened:
        assert await opened.until(Opcode.PONG) == b"early"


async def test_application_that_stays_with_asgi_is_served_too() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"].upper()})

    listening = bind("127.0.0.1", 0, host_variable="HOST", port_variable="PORT")
    listener = Listener(server_config(echo, max_frame_bytes=1_000), listening)
    await listener.start()
    try:
        async with upgraded(listener.url, sent(Opcode.TEXT, b"early")) as opened:
            assert await opened.until(Opcode.TEXT) == b"EARLY"
            opened.send(Opcode.TEXT, b"late")
            assert await opened.until(Opcode.TEXT) == b"LATE"
            opened.send(Opcode.CLOSE, struct.pack("!H", 1000))
            assert await opened.closed() == 1000
    finally:
        await listener.stop()


# Over ASGI a connection has tasks, and its server keeps what it likes.
@direct_only
async def test_idle_connection_has_no_task_and_keeps_nothing_of_its_handshake(
    gateway: Gateway,
) -> None:
    async with wire(gateway) as opened:
        assert await opened.is_alive()
    tasks = len(asyncio.all_tasks())
    async with contextlib.AsyncExitStack() as stack:
        with collector_off():
            for _ in range(5):
                opened = await stack.enter_async_context(wire(gateway))
                assert await opened.is_alive()

            async def is_settled() -> bool:
                return len(asyncio.all_tasks()) == tasks and not kept_of_handshakes()

            await eventually(is_settled)
        assert [type(found) for found in gc.get_objects()].count(direct.DirectTransport) == 5


def kept_of_handshakes() -> list[str]:
    names = ("RelayWebSocketProtocol", "ServerProtocol", "FrameReader", "WebSocket")
    return [name for found in gc.get_objects() if (name := type(found).__name__) in names]


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Leave what refers to itself in circles where it is; what others left is gone before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_peer_that_vanishes_leaves_nothing_behind(gateway: Gateway, server: str) -> None:
    reset = struct.pack("ii", 1, 0)
    for data in (b"", sent(Opcode.TEXT, b"half")[:-2], sent(Opcode.TEXT, b"x", first=0)):
        for hard in (False, True):
            async with wire(gateway) as opened:
                opened.writer.write(data)
                await opened.writer.drain()
                if hard:
                    raw = opened.writer.get_extra_info("socket")
                    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, reset)

    async def is_empty() -> bool:
        return not len(gateway.pool) and len(gateway._wheel) == 0

    await eventually(is_empty)
    # An ASGI server need not tell a peer that left without a code from one that was lost.
    assert gateway.metrics.closed == {"1006" if server == "direct" else "1005": 6}
    assert gateway._public is not None
    assert not gateway._public.server_state.connections


@direct_only
async def test_peer_that_closes_and_does_not_read_is_cut_off(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "FLUSH_S", 0.2)
    async with Work(gateway.settings) as work, wire(gateway) as opened:
        opened.writer.transport.pause_reading()  # type: ignore[attr-defined]
        [connection] = gateway.pool

        async def is_clogged() -> bool:
            await work.run(pieces=("x" * 200_000,))
            return connection._transport.stuck_at_ms is not None  # type: ignore[attr-defined]

        await eventually(is_clogged)
        opened.send(Opcode.CLOSE)
        assert gateway._public is not None
        connections = gateway._public.server_state.connections

        async def is_gone() -> bool:
            return not connections

        await eventually(is_gone)


async def test_noise_on_many_sockets_harms_nobody(gateway: Gateway) -> None:
    noise = random.Random(5)
    async with tab(gateway, "bob") as other:
        for _ in range(15):
            async with wire(gateway) as opened:
                for _ in range(5):
                    opened.writer.write(noise.randbytes(noise.randrange(1, 2_000)))
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await opened.until(Opcode.CLOSE)
        assert await other.is_alive()

    async def is_empty() -> bool:
        return not len(gateway.pool) and len(gateway._wheel) == 0

    await eventually(is_empty)


class Listening:
    """A connection above a transport that notes what it is told."""

    has_room = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.told: list[str] = []

    def receive(self, text: str | None) -> None:
        self.told.append(f"message {text}")

    def receive_ping(self) -> bool:
        return True

    def receive_pong(self, payload: bytes) -> bool:
        return False

    def clogged(self) -> None:
        self.told.append("clogged")

    def writable(self) -> None:
        if self.error is not None:
            raise self.error

    def ended(self, code: int, reason: str) -> None:
        self.told.append(f"ended {code}")

    def gone(self) -> None:
        self.told.append("gone")


async def test_connection_that_fails_in_a_tick_takes_none_with_it() -> None:
    loop = asyncio.get_running_loop()
    ticks = direct.TickWriter(GatewayMetrics())
    broken, whole = Listening(RuntimeError("a defect")), Listening()
    async with contextlib.AsyncExitStack() as stack:
        opened: list[direct.DirectTransport] = []
        peers: list[sockets.socket] = []
        for receiver in (broken, whole):
            near, far = sockets.socketpair()
            far.setblocking(False)
            stack.callback(far.close)
            peers.append(far)
            socket, _ = await loop.create_connection(asyncio.Protocol, sock=near)
            stack.callback(socket.abort)
            transport = direct.DirectTransport(
                socket, receiver, ticks, set(), max_bytes=1_000, budget_bytes=1_000
            )
            transport.begin(b"", is_clogged=False)
            opened.append(transport)
        for transport in opened:
            transport.send(b"{}", "")
            assert not transport.is_idle
        async with asyncio.timeout(5):
            assert await loop.sock_recv(peers[1], 100) == b"\x81\x02{}"
            # Its socket is closed: the client comes back, where otherwise it would wait for ever.
            while await loop.sock_recv(peers[0], 100):
                pass
        assert broken.told[-1] == "gone"
        assert whole.told == []


async def test_close_frames_that_do_not_wait_for_the_tick_are_counted() -> None:
    loop = asyncio.get_running_loop()
    metrics = GatewayMetrics()
    ticks = direct.TickWriter(metrics)
    seen_bytes = 0

    async def end(way: Callable[[direct.DirectTransport, sockets.socket], object]) -> bytes:
        near, far = sockets.socketpair()
        far.setblocking(False)
        socket, _ = await loop.create_connection(asyncio.Protocol, sock=near)
        transport = direct.DirectTransport(
            socket, Listening(), ticks, set(), max_bytes=1_000, budget_bytes=1_000
        )
        transport.begin(b"", is_clogged=False)
        transport.release()
        received = b""
        try:
            way(transport, far)
            async with asyncio.timeout(5):
                while data := await loop.sock_recv(far, 1_000):
                    received += data
        finally:
            socket.abort()
            far.close()
        return received

    ways: list[Callable[[direct.DirectTransport, sockets.socket], object]] = [
        lambda transport, far: transport.force_close(1012, "the end"),
        lambda transport, far: transport.shutdown(),
        # The peer's own close, and a frame that is not masked.
        lambda transport, far: far.send(b"\x88\x82\0\0\0\0\x03\xe8"),
        lambda transport, far: far.send(b"\x81\x02{}"),
    ]
    for frames, way in enumerate(ways, start=1):
        received = await end(way)
        assert received.startswith(b"\x88"), "a close frame alone"
        seen_bytes += len(received)
        assert (metrics.sent_frames, metrics.sent_bytes) == (frames, seen_bytes)
