"""The ASGI transport: what it does when the peer leaves at the worst moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from gateway import direct
from gateway.metrics import GatewayMetrics
from gateway.transport import AsgiTransport


class Connected:
    """A connection that has nothing to say but what a test lets it."""

    def __init__(self) -> None:
        self.has_room = True
        self.received: list[str | None] = []
        self.writable_calls = 0
        self.ends: list[tuple[int, str]] = []
        self.is_gone = False

    def receive(self, text: str | None) -> None:
        self.received.append(text)

    def receive_ping(self) -> bool:
        return True

    def receive_pong(self, payload: bytes) -> bool:
        return True

    def clogged(self) -> None:
        pass

    def writable(self) -> None:
        self.writable_calls += 1

    def ended(self, code: int, reason: str) -> None:
        self.ends.append((code, reason))

    def gone(self) -> None:
        self.is_gone = True


async def nothing_comes() -> Any:
    await asyncio.Event().wait()


def make(
    send: Any, receive: Any = nothing_comes, budget_bytes: int = 100
) -> tuple[AsgiTransport, Connected]:
    connected = Connected()
    return AsgiTransport(send, receive, connected, GatewayMetrics(), budget_bytes), connected


def messages(*given: Any) -> Any:
    """Give an ASGI receive with these messages, then a disconnect."""
    waiting = [*given, {"type": "websocket.disconnect", "code": 1001, "reason": "away"}]

    async def receive() -> Any:
        await asyncio.sleep(0)
        return waiting.pop(0) if waiting else await nothing_comes()

    return receive


async def test_frames_leave_in_order_and_the_close_comes_last() -> None:
    sent: list[dict[str, Any]] = []
    closed = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "websocket.close":
            closed.set()

    async def receive() -> Any:
        await closed.wait()
        return {"type": "websocket.disconnect", "code": 1012}

    transport, connected = make(send, receive)
    transport.send(b"a", "")
    transport.send("é".encode(), "")
    transport.close(1012, "bye")
    transport.send(b"too late", "")
    await transport.run()
    assert [message.get("text") for message in sent] == ["a", "é", None]
    assert sent[-1] == {"type": "websocket.close", "code": 1012, "reason": "bye"}
    assert transport.size_bytes == 0
    assert connected.ends == [(1012, "closed by the client")]
    assert connected.is_gone


async def test_room_ends_at_the_budget_and_whoever_asked_learns_that_all_was_taken() -> None:
    may_send = asyncio.Event()

    async def send(message: Any) -> None:
        await may_send.wait()

    transport, connected = make(send)
    assert transport.is_idle
    transport.send(b"x" * 60, "")
    assert connected.has_room
    assert not transport.is_idle
    transport.send(b"x" * 60, "")
    assert not connected.has_room
    running = asyncio.create_task(transport.run())
    may_send.set()
    async with asyncio.timeout(1):
        while transport.size_bytes:
            await asyncio.sleep(0)
    assert connected.has_room
    assert connected.writable_calls == 1
    assert transport.is_idle
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert connected.is_gone


async def test_messages_wait_until_they_are_wanted() -> None:
    async def send(_: Any) -> None: ...

    text = {"type": "websocket.receive", "text": "one"}
    binary = {"type": "websocket.receive", "bytes": b"two"}
    transport, connected = make(send, messages(text, binary))
    running = asyncio.create_task(transport.run())
    for _ in range(5):
        await asyncio.sleep(0)
    assert connected.received == []
    transport.release()
    await running
    assert connected.received == ["one", None]
    assert connected.ends == [(1001, "away")]


@pytest.mark.parametrize("error", [OSError(), ConnectionResetError(), WebSocketDisconnect(1006)])
async def test_peer_that_is_gone_ends_the_writer_quietly(error: Exception) -> None:
    async def send(_: Any) -> None:
        raise error

    transport, connected = make(send, messages())
    transport.send(b"a", "")
    await transport.run()
    assert connected.ends == [(1001, "away")]


async def test_defect_of_the_writer_ends_the_reader_too() -> None:
    async def send(_: Any) -> None:
        raise RuntimeError("defect")

    transport, connected = make(send)
    transport.send(b"a", "")
    with pytest.raises(ExceptionGroup) as caught:
        await transport.run()
    assert caught.group_contains(RuntimeError, match="defect")
    assert connected.ends == [(1011, "handler failed")]


async def test_end_of_the_reader_ends_a_writer_that_waits_for_the_socket() -> None:
    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    transport, connected = make(send, messages())
    transport.send(b"a", "")
    async with asyncio.timeout(1):
        await transport.run()
    assert connected.is_gone


async def test_forced_close_does_not_wait_for_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "FLUSH_S", 0.01)

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    transport, connected = make(send)
    transport.send(b"a", "")
    running = asyncio.create_task(transport.run())
    await asyncio.sleep(0)
    transport.force_close(4410, "too slow")
    async with asyncio.timeout(1):
        await running
    assert connected.is_gone


async def test_forced_close_sends_nothing_of_what_waits() -> None:
    sent: list[dict[str, Any]] = []
    may_send = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message)
        await may_send.wait()

    transport, connected = make(send)
    transport.send(b"a", "")
    running = asyncio.create_task(transport.run())
    await asyncio.sleep(0.001)
    transport.send(b"b", "")
    transport.force_close(4401, "revoked")
    transport.send(b"c", "")
    may_send.set()
    while len(sent) < 2:
        await asyncio.sleep(0)
    assert [message.get("text") for message in sent] == ["a", None]
    assert sent[1] == {"type": "websocket.close", "code": 4401, "reason": "revoked"}
    assert connected.ends == [(4401, "revoked")]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
