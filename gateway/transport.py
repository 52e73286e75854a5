"""How frames get from a connection to its client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.types import Receive, Send
from starlette.websockets import WebSocketDisconnect

from gateway import direct
from gateway.clock import steady_ms
from gateway.direct import Receiver
from gateway.metrics import GatewayMetrics
from gateway.outbox import Outbox
from relay.codec import Publication


class Transport(Protocol):
    """Writes one connection's frames; nothing here blocks the caller.

    Attributes:
        has_pings: Whether it is for the connection to send pings.
    """

    @property
    def has_pings(self) -> bool:
        """Whether it is for the connection to find out by pings that a peer is gone."""

    @property
    def is_idle(self) -> bool:
        """Whether the socket took everything; if not, ``writable`` is called when it has."""

    @property
    def is_reading(self) -> bool:
        """Whether what the client sends is looked at."""

    @property
    def stuck_at_ms(self) -> int | None:
        """When the client will be too slow unless it takes something; None when it took all."""

    def is_stuck(self, now_ms: int) -> bool:
        """Whether something waits and the client has taken nothing for too long."""

    def write(self, publication: Publication) -> None:
        """Send an event, soon, together with what else comes now."""

    def write_all(self, publications: Sequence[Publication]) -> None:
        """Send several events in the same way."""

    def send(self, payload: bytes, position: str) -> None:
        """Send another frame; ``position`` is where to resume from after it, or empty."""

    def send_ping(self, payload: bytes) -> None:
        """Send a ping of the WebSocket protocol, where ``has_pings``."""

    def hold(self) -> None:
        """Take no further message from the client until ``release``."""

    def release(self) -> None:
        """Take messages again. They are held at the beginning."""

    def close(self, code: int, reason: str) -> None:
        """Close after the frames that wait have been written."""

    def force_close(self, code: int, reason: str) -> None:
        """Close now, whether or not the client reads."""


class OutboxTransport:
    """A transport whose frames are taken one by one, by somebody who waits for the socket.

    Args:
        receiver: The connection.
        metrics: Counts what was sent.
        budget_bytes: Above this there is no room for further events.
    """

    has_pings = False
    is_reading = True

    def __init__(self, receiver: Receiver, metrics: GatewayMetrics, budget_bytes: int) -> None:
        self._receiver = receiver
        self._metrics = metrics
        self._outbox = Outbox(budget_bytes)
        self._is_awaited = False
        self._has_work = asyncio.Event()
        self._may_read = asyncio.Event()
        self._closing: tuple[int, str] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes not yet taken by the socket."""
        return self._outbox.size_bytes

    @property
    def is_idle(self) -> bool:
        """Whether everything was taken."""
        self._is_awaited = not self._outbox.is_empty
        return not self._is_awaited

    @property
    def stuck_at_ms(self) -> int | None:
        """When the client will be too slow."""
        return self._outbox.stuck_at_ms

    def is_stuck(self, now_ms: int) -> bool:
        """Whether it is."""
        return self._outbox.is_stuck(now_ms)

    def write(self, publication: Publication) -> None:
        """Send an event."""
        if self._closing is None:
            self._metrics.delivered_events += 1
            self._add(self._block_of(publication))

    def _block_of(self, publication: Publication) -> bytes:
        """Give an event as it is sent."""
        return publication.frame

    def write_all(self, publications: Sequence[Publication]) -> None:
        """Send events."""
        for publication in publications:
            self.write(publication)

    def send(self, payload: bytes, position: str) -> None:
        """Send another frame."""
        self._add(payload)

    def send_ping(self, payload: bytes) -> None:
        """Nothing to do: the server below has pings of its own, or needs none."""

    def _add(self, frame: bytes) -> None:
        if self._closing is None:
            if self._outbox.add(frame, steady_ms()):
                self._has_work.set()
            self._receiver.has_room = self._outbox.has_room

    def _note_written(self, size_bytes: int) -> None:
        """Learn that the socket took a frame."""
        outbox = self._outbox
        self._metrics.sent_frames += 1
        self._metrics.sent_bytes += size_bytes
        may_go_on = outbox.written(size_bytes, steady_ms())
        self._receiver.has_room = outbox.has_room
        if may_go_on or (self._is_awaited and outbox.is_empty):
            self._is_awaited = False
            self._receiver.writable()

    def hold(self) -> None:
        """Let the reader wait."""
        self._may_read.clear()

    def release(self) -> None:
        """Let the reader go on."""
        self._may_read.set()

    def close(self, code: int, reason: str) -> None:
        """Let the writer close behind the frames that wait."""
        self._closing = (code, reason)
        self._has_work.set()
        self.release()


class AsgiTransport(OutboxTransport):
    """A transport over ASGI's ``send`` and ``receive``, for servers without the direct one.

    It costs a task more and a switch between tasks per event. Pings are the server's; a client
    that takes nothing keeps its socket for as long as the server lets it.

    Args:
        send: ASGI's; it returns when the socket's buffer has room again.
        receive: ASGI's.
        receiver: The connection.
        metrics: Counts what was sent.
        budget_bytes: Above this there is no room for further events.
    """

    def __init__(
        self,
        send: Send,
        receive: Receive,
        receiver: Receiver,
        metrics: GatewayMetrics,
        budget_bytes: int,
    ) -> None:
        super().__init__(receiver, metrics, budget_bytes)
        self._send = send
        self._receive = receive
        self._is_cut = False
        self._cut: Callable[[], object] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def force_close(self, code: int, reason: str) -> None:
        """Close past the frames that wait; where that cannot be sent, end the application.

        What the socket does then is up to the server.
        """
        self._is_cut = True
        self.close(code, reason)
        self._receiver.ended(code, reason)
        if self._cut is not None and self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(direct.FLUSH_S, self._cut)

    async def run(self) -> None:
        """Carry messages in both directions until either side closes."""
        code, reason = 1011, "handler failed"
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write(), name="connection-writer")
                reading = group.create_task(self._read(), name="connection-reader")
                self._cut = reading.cancel
                try:
                    await asyncio.wait([reading])
                finally:
                    writing.cancel()
                    reading.cancel()
                    if self._deadline is not None:
                        self._deadline.cancel()
            if not reading.cancelled():
                code, reason = reading.result()
        finally:
            self._receiver.ended(code, reason)
            self._receiver.gone()

    async def _read(self) -> tuple[int, str]:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return message.get("code") or 1005, message.get("reason") or "closed by the client"
            await self._may_read.wait()
            if self._closing is None:
                self._receiver.receive(message.get("text"))

    async def _write(self) -> None:
        try:
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                for frame in self._outbox.take():
                    if self._is_cut:
                        break
                    await self._send({"type": "websocket.send", "text": frame.decode()})
                    self._note_written(len(frame))
                is_last = self._is_cut or not self._has_work.is_set()
                if self._closing is not None and is_last:
                    code, reason = self._closing
                    await self._send({"type": "websocket.close", "code": code, "reason": reason})
                    return
        except (OSError, WebSocketDisconnect):
            # The peer is gone. The reader is told so too, and ends the connection.
            return
