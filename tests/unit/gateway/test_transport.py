"""The ASGI transport: what it does when the peer leaves at the worst moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from gateway.transport import AsgiTransport, run_beside
from gateway.websocket import FORCE_CLOSE


class Frames:
    """A source with some frames, which remembers what was taken."""

    def __init__(self, *frames: bytes) -> None:
        self.waiting = list(frames)
        self.written = 0

    def take_frames(self) -> list[bytes]:
        frames, self.waiting = self.waiting, []
        return frames

    def frame_written(self, size_bytes: int) -> None:
        self.written += size_bytes


def make(send: Any, source: Frames, forced: list[tuple[int, str]] | None = None) -> AsgiTransport:
    forced = [] if forced is None else forced
    return AsgiTransport(send, {FORCE_CLOSE: lambda *args: forced.append(args)}, source)


async def test_frames_leave_in_order_and_the_close_comes_last() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    source = Frames(b"a", "é".encode())
    transport = make(send, source)
    transport.wake()
    transport.close(1012, "bye")
    await transport.run()
    assert [message.get("text") for message in sent] == ["a", "é", None]
    assert sent[-1] == {"type": "websocket.close", "code": 1012, "reason": "bye"}
    assert source.written == 3


@pytest.mark.parametrize("error", [OSError(), ConnectionResetError(), WebSocketDisconnect(1006)])
async def test_peer_that_is_gone_ends_the_writer_quietly(error: Exception) -> None:
    async def send(_: Any) -> None:
        raise error

    transport = make(send, Frames(b"a"))
    transport.wake()
    await transport.run()


async def test_defect_of_the_writer_ends_the_reader_too() -> None:
    async def send(_: Any) -> None:
        raise RuntimeError("defect")

    transport = make(send, Frames(b"a"))
    transport.wake()
    with pytest.raises(ExceptionGroup) as caught:
        await run_beside(transport.run(), asyncio.Event().wait())  # type: ignore[arg-type]
    assert caught.group_contains(RuntimeError, match="defect")


async def test_end_of_the_reader_ends_a_writer_that_waits_for_the_socket() -> None:
    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    transport = make(send, Frames(b"a"))
    transport.wake()

    async def read() -> None:
        await asyncio.sleep(0.01)

    async with asyncio.timeout(1):
        await run_beside(transport.run(), read())


async def test_forced_close_does_not_wait_for_the_writer() -> None:
    forced: list[tuple[int, str]] = []

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    make(send, Frames(b"a"), forced).force_close(4410, "too slow")
    assert forced == [(4410, "too slow")]
