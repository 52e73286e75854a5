"""How frames get from a connection to its socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from starlette.types import Send
from starlette.websockets import WebSocketDisconnect

from gateway.websocket import FORCE_CLOSE


class FrameSource(Protocol):
    """Where a transport takes frames from: the connection and its outbox."""

    def take_frames(self) -> Sequence[bytes]:
        """Give all frames that wait, in order."""

    def frame_written(self, size_bytes: int) -> None:
        """Learn that the socket took a frame of this size."""


class Transport(Protocol):
    """Writes one connection's frames; nothing here blocks the caller."""

    def wake(self) -> None:
        """Learn that frames wait; they are taken in one go, soon."""

    def close(self, code: int, reason: str) -> None:
        """Close after the frames that wait have been written."""

    def force_close(self, code: int, reason: str) -> None:
        """Close now, whether or not the peer reads."""


class AsgiTransport:
    """A transport over ASGI's ``send``: one task writes, woken once for all frames of a tick.

    Args:
        send: ASGI's; it returns when the socket's buffer has room again.
        extensions: Those of the ASGI scope.
        source: Where the frames are.
    """

    def __init__(self, send: Send, extensions: dict[str, Any], source: FrameSource) -> None:
        self._send = send
        self._force_close: Callable[[int, str], None] = extensions[FORCE_CLOSE]
        self._source = source
        self._has_work = asyncio.Event()
        self._closing: tuple[int, str] | None = None

    def wake(self) -> None:
        """Let the writer take what waits."""
        self._has_work.set()

    def close(self, code: int, reason: str) -> None:
        """Let the writer close behind the frames that wait."""
        self._closing = (code, reason)
        self._has_work.set()

    def force_close(self, code: int, reason: str) -> None:
        """Close past the writer, which may be waiting for a socket that takes nothing."""
        self._force_close(code, reason)

    async def run(self) -> None:
        """Write until the connection is closed, by either side, or this is cancelled."""
        try:
            await self._write()
        except (OSError, WebSocketDisconnect):
            # The peer is gone. The reader is told so too, and ends the connection.
            return

    async def _write(self) -> None:
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            for frame in self._source.take_frames():
                await self._send({"type": "websocket.send", "text": frame.decode()})
                self._source.frame_written(len(frame))
            if self._closing is not None and not self._has_work.is_set():
                code, reason = self._closing
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
                return


async def run_beside(writer: Coroutine[Any, Any, None], reader: Coroutine[Any, Any, None]) -> None:
    """Run a connection's reader with its writer beside it; the reader's end is the end of both."""
    async with asyncio.TaskGroup() as group:
        writing = group.create_task(writer, name="connection-writer")
        try:
            await reader
        finally:
            writing.cancel()
