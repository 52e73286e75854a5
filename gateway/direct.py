"""The direct way to a WebSocket: bytes in, callbacks out, no task and no timer of its own.

After the handshake ``DirectTransport`` takes the place of the server's protocol class below the
socket, and whatever the handshake needed is let go. See ADR 0012.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, cast

import structlog

from gateway.clock import steady_ms
from gateway.metrics import GatewayMetrics
from gateway.outbox import Backlog
from gateway.wire import (
    FrameReader,
    Message,
    Opcode,
    ProtocolViolation,
    close_frame,
    frame,
    read_close,
    text_frame,
)
from relay.codec import Publication, splice
from relay.errors import CloseCode

FLUSH_S = 5.0
"""A peer that does not take what is left, and the close frame, within this time is cut off."""

LOST = 1006
"""RFC 6455's code for a connection that ended without a close frame."""

_TOLD = "closed by the client"

log = structlog.stdlib.get_logger(__name__)


class Receiver(Protocol):
    """The connection above a direct transport. Nothing here waits."""

    has_room: bool
    """Whether events may be written. The transport sets it."""

    def receive(self, text: str | None) -> None:
        """Take a message, None for a binary one."""

    def receive_ping(self) -> bool:
        """Take a ping or a pong that was not asked for; says whether to answer."""

    def receive_pong(self, payload: bytes) -> bool:
        """Take a pong; says whether it was asked for."""

    def clogged(self) -> None:
        """Learn that the socket does not take everything at once any more."""

    def writable(self) -> None:
        """Learn that the socket has taken everything."""

    def ended(self, code: int, reason: str) -> None:
        """Learn that nothing can be sent or received any more. May come more than once."""

    def gone(self) -> None:
        """Learn that the socket is closed. Comes once, at the very end."""


class TickWriter:
    """Gathers what the connections of a node have to send; one write per socket and loop tick.

    Args:
        metrics: Counts what was sent.

    Attributes:
        events: How many of the frames gathered in this tick are events.
    """

    __slots__ = ("_metrics", "_touched", "events")

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self.events = 0
        self._touched: list[DirectTransport] = []

    def touch(self, transport: DirectTransport) -> None:
        """Let a transport flush at the end of this tick, behind those that were touched before."""
        touched = self._touched
        if not touched:
            asyncio.get_running_loop().call_soon(self.flush)
        touched.append(transport)

    def flush(self) -> None:
        """Write what has been gathered. Also by whoever knows that nothing more will come now."""
        # What is touched meanwhile gets a turn of its own.
        touched, self._touched = self._touched, []
        frames = sent_bytes = 0
        for transport in touched:
            try:
                count, size = transport.flush()
            except Exception:
                # One broken connection, not all that wait behind it.
                log.exception("connection not written to")
                transport.abort()
                continue
            frames += count
            sent_bytes += size
        self._count(frames, sent_bytes)

    def flush_now(self, transport: DirectTransport) -> None:
        """Write what one transport has, without waiting for the end of the tick."""
        self._count(*transport.flush())

    def _count(self, frames: int, sent_bytes: int) -> None:
        self._metrics.sent_frames += frames
        self._metrics.sent_bytes += sent_bytes
        self._metrics.delivered_events += self.events
        self.events = 0


class DirectTransport(asyncio.Protocol):
    """One connection's socket, from the end of the handshake to the end of the connection.

    The transport below is told to report when it holds anything back, and when that is gone. So
    ``has_room`` turns false at the budget, and true when the socket has taken everything: the
    kernel still has enough to send while the next page is read.

    Args:
        transport: The socket's.
        receiver: The connection.
        ticks: The node's.
        connections: Where the server looks for what to shut down.
        max_bytes: The largest message that is read.
        budget_bytes: Above this there is no room for further events.
    """

    __slots__ = (
        "_backlog",
        "_budget",
        "_close",
        "_connections",
        "_is_awaited",
        "_is_deaf",
        "_is_held",
        "_max_bytes",
        "_pending",
        "_reader",
        "_receiver",
        "_size",
        "_ticks",
        "_transport",
    )

    has_pings = True

    def __init__(
        self,
        transport: asyncio.Transport,
        receiver: Receiver,
        ticks: TickWriter,
        connections: set[Any],
        *,
        max_bytes: int,
        budget_bytes: int,
    ) -> None:
        self._transport: asyncio.Transport | None = transport
        self._receiver = receiver
        self._ticks = ticks
        self._connections = connections
        self._max_bytes = max_bytes
        self._budget = budget_bytes
        # What goes out with this tick: nothing, one frame, or several.
        self._pending: bytes | list[bytes] | None = None
        # Bytes not yet taken by the socket, as far as is known.
        self._size = 0
        # While the socket holds something back.
        self._backlog: Backlog | None = None
        # Whether somebody wants to know when the socket has taken everything.
        self._is_awaited = False
        # While a frame is incomplete, or waits.
        self._reader: FrameReader | None = None
        # Requests wait until the connection is established, and while one is being answered.
        self._is_held = True
        # After a violation nothing more is understood; it is read all the same, and thrown away.
        self._is_deaf = False
        # Code and reason, from the moment on that no further frame is taken.
        self._close: tuple[int, str] | None = None

    def begin(self, early: bytes, *, is_clogged: bool) -> None:
        """Take over the socket.

        Args:
            early: What came behind the handshake's request.
            is_clogged: Whether the socket holds something back already.
        """
        transport = self._transport
        if transport is None:
            raise RuntimeError("the transport has ended")
        self._connections.add(self)
        transport.set_protocol(self)
        # One byte rather than none: TLS would take zero for always full.
        transport.set_write_buffer_limits(high=1, low=0)
        if is_clogged:
            self.pause_writing()
        if early:
            self.data_received(early)

    # --- Out ---

    @property
    def size_bytes(self) -> int:
        """Bytes not yet taken by the socket."""
        return self._size

    @property
    def is_idle(self) -> bool:
        """Whether the socket took everything; if not, ``writable`` is called when it has."""
        if self._pending is None and self._backlog is None:
            return True
        self._is_awaited = True
        return False

    def write(self, publication: Publication) -> None:
        """Send an event."""
        data = publication.wire
        if data is None:
            data = publication.wire = text_frame(
                splice(publication.event, publication.offset, publication.seq)
            )
        if self._close is None:
            self._ticks.events += 1
            self._add(data)

    def write_all(self, publications: Sequence[Publication]) -> None:
        """Send the events of a page: what each would cost beside its frame is paid once."""
        if self._close is not None:
            return
        frames: list[bytes] = []
        for publication in publications:
            data = publication.wire
            if data is None:
                data = publication.wire = text_frame(
                    splice(publication.event, publication.offset, publication.seq)
                )
            frames.append(data)
        self._ticks.events += len(frames)
        # The last one goes the usual way, which looks at the sum.
        last = frames.pop()
        if frames:
            self._gather(frames)
        self._add(last)

    def _gather(self, frames: list[bytes]) -> None:
        pending = self._pending
        if pending is None:
            self._pending = frames
            self._ticks.touch(self)
        elif type(pending) is list:
            pending.extend(frames)
        else:
            self._pending = [cast("bytes", pending), *frames]
        self._size += sum(map(len, frames))

    def send(self, payload: bytes, position: str) -> None:
        """Send another frame of ``relay.v1``."""
        if self._close is None:
            self._add(text_frame(payload))

    def send_ping(self, payload: bytes) -> None:
        """Ask the peer for a sign of life."""
        if self._close is None:
            self._add(frame(Opcode.PING, payload))

    def _add(self, data: bytes) -> None:
        pending = self._pending
        if pending is None:
            self._pending = data
            self._ticks.touch(self)
        elif type(pending) is list:
            pending.append(data)
        else:
            self._pending = [cast("bytes", pending), data]
        self._size += len(data)
        if self._size >= self._budget:
            self._receiver.has_room = False
            self._is_awaited = True

    def flush(self) -> tuple[int, int]:
        """Give the socket what waits.

        Returns:
            How many frames and bytes it was.
        """
        pending, transport = self._pending, self._transport
        if pending is None or transport is None:
            return 0, 0
        self._pending = None
        if type(pending) is list:
            count, data = len(pending), b"".join(pending)
        else:
            count, data = 1, cast("bytes", pending)
        if self._backlog is not None:
            self._backlog.add(len(data))
        # It takes what it can at once, and calls pause_writing if that is not all.
        transport.write(data)
        if self._backlog is None:
            self._size = 0
            if self._is_awaited or self._close is not None:
                self._drained()
        else:
            self._size = transport.get_write_buffer_size()
        return count, len(data)

    def _drained(self) -> None:
        self._is_awaited = False
        if self._close is None:
            self._receiver.has_room = True
            self._receiver.writable()
        else:
            self._receiver.ended(*self._close)

    def pause_writing(self) -> None:
        """Learn from the socket that it holds something back."""
        if self._backlog is None and self._transport is not None:
            self._backlog = Backlog(self._transport.get_write_buffer_size(), steady_ms())
            self._receiver.clogged()

    def resume_writing(self) -> None:
        """Learn from the socket that it has taken everything."""
        self._backlog = None
        # What came within this tick follows with its flush, which looks again.
        if self._pending is None:
            self._size = 0
            self._drained()

    def is_stuck(self, now_ms: int) -> bool:
        """Whether something waits and the socket has taken nothing for too long."""
        if self._backlog is None or self._transport is None:
            return False
        self._backlog.look(self._transport.get_write_buffer_size(), now_ms)
        return self._backlog.is_stuck(now_ms)

    @property
    def stuck_at_ms(self) -> int | None:
        """When it will count as stuck unless the socket takes something; None when it took all."""
        return None if self._backlog is None else self._backlog.stuck_at_ms

    # --- In ---

    def hold(self) -> None:
        """Take no further message until ``release``."""
        self._is_held = True

    def release(self) -> None:
        """Take messages again."""
        self._is_held = False
        if self._reader is not None:
            # Not from within: the caller may be in the middle of what a message would change.
            asyncio.get_running_loop().call_soon(self._read_on)

    @property
    def is_reading(self) -> bool:
        """Whether what the peer sends is looked at: only then does silence say anything."""
        return not self._is_held or self._reader is None

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer."""
        if self._is_deaf:
            return
        if self._reader is None:
            self._reader = FrameReader(self._max_bytes)
        self._reader.feed(data)
        self._read_on()

    def _read_on(self) -> None:
        reader, transport = self._reader, self._transport
        if reader is None or transport is None:
            return
        try:
            while not self._is_held and not self._is_deaf:
                message = reader.next()
                if message is None:
                    break
                self._take(message)
        except ProtocolViolation as violation:
            self._fail(violation)
        if self._is_held:
            transport.pause_reading()
            return
        transport.resume_reading()
        if self._is_deaf or reader.is_at_rest:
            self._reader = None

    def _take(self, message: Message) -> None:
        match message.opcode:
            case Opcode.TEXT:
                if self._close is None:
                    self._receiver.receive(message.data.decode())
            case Opcode.BINARY:
                if self._close is None:
                    self._receiver.receive(None)
            case Opcode.PING:
                if self._close is None and self._receiver.receive_ping():
                    self._add(frame(Opcode.PONG, message.data))
            case Opcode.PONG:
                if self._close is None and not self._receiver.receive_pong(message.data):
                    self._receiver.receive_ping()
            case _:
                self._answer_close(message.data)

    def _answer_close(self, payload: bytes) -> None:
        code, reason = read_close(payload)
        self._is_deaf = True
        if self._close is None:
            self._close = code, reason or _TOLD
            self._add(frame(Opcode.CLOSE, payload[:2]))
            self._ticks.flush_now(self)
            self._receiver.ended(*self._close)
        self._hang_up()

    def _fail(self, violation: ProtocolViolation) -> None:
        self._is_deaf = True
        transport = self._transport
        if self._close is None:
            self._say_close(violation.code, violation.reason)
            if transport is not None and transport.can_write_eof() and not transport.is_closing():
                # Closing a socket with unread bytes resets it, and a reset may overtake the
                # close frame. The peer, which gets both, closes from its side.
                transport.write_eof()
                asyncio.get_running_loop().call_later(FLUSH_S, transport.abort)
                return
        self._hang_up()

    # --- The end ---

    def close(self, code: int, reason: str) -> None:
        """Close after what waits has been sent.

        It ends with the peer's answer, or with ``force_close`` when the caller's patience does.
        """
        if self._close is None:
            self._close = code, reason
            self._add(close_frame(code, reason))
            # The peer's answer must be read.
            self.release()

    def force_close(self, code: int, reason: str) -> None:
        """Close whether or not the peer reads or answers; it is gone in ``FLUSH_S``.

        What was written in this tick is not sent any more.
        """
        if self._close is None:
            self._pending = None
            self._say_close(code, reason)
        self._receiver.ended(*self._close or (code, reason))
        self._hang_up()

    def abort(self) -> None:
        """Cut the connection; ``ended`` and ``gone`` follow."""
        if self._transport is not None:
            self._transport.abort()

    def shutdown(self) -> None:
        """Close because the server ends. Called by the server."""
        self.force_close(CloseCode.DRAIN, "this gateway is shutting down")

    def _say_close(self, code: int, reason: str) -> None:
        self._close = code, reason
        self._add(close_frame(code, reason))
        self._ticks.flush_now(self)
        self._receiver.ended(code, reason)

    def _hang_up(self) -> None:
        transport = self._transport
        if transport is None:
            return
        self._ticks.flush_now(self)
        transport.close()
        if transport.get_write_buffer_size():
            # close() waits for what the peer does not take, which may be for ever.
            asyncio.get_running_loop().call_later(FLUSH_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Learn that the socket is closed."""
        self._transport = self._reader = self._pending = self._backlog = None
        self._connections.discard(self)
        if self._close is None:
            is_defect = exc is not None and not isinstance(exc, OSError)
            self._close = (CloseCode.INTERNAL, "handler failed") if is_defect else (LOST, "lost")
        self._receiver.ended(*self._close)
        self._receiver.gone()
