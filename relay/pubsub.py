"""A connection to Redis that carries subscriptions: chunks in, messages out, nothing awaited.

redis-py makes the connection (address, TLS, user, database); from there on this reads it with
hiredis' parser. All messages of a chunk are handed over in one callback: a task switch and two
layers of coroutines for each would cost several times what the message itself does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import hiredis
import structlog
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

CHUNK_BYTES = 64 * 1024
"""Read at a time; what is in one chunk is handled before the loop turns to others."""

PIECE_BYTES: Final = 16 * 1024
"""Given to the parser at a time: after each kilobyte it moves all that is left to its beginning."""

_INCOMPLETE: Final = object()

log = structlog.stdlib.get_logger(__name__)


class PubSubConnection(asyncio.BufferedProtocol):
    """Owns a connection's transport from ``take_over`` on. RESP2 and RESP3 alike.

    Args:
        on_message: Gets channel and payload of each message, in the order of arrival.
        on_subscribed: Gets the channel of each confirmed subscription.

    Attributes:
        lost: Ends with the reason when the connection is gone.
        heard_at_s: When bytes came last, in the loop's time.
    """

    def __init__(
        self,
        on_message: Callable[[bytes, bytes], None],
        on_subscribed: Callable[[bytes], None],
    ) -> None:
        self.on_message = on_message
        self._on_subscribed = on_subscribed
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[BaseException] = self._loop.create_future()
        self.heard_at_s = self._loop.time()
        self._buffer = bytearray(CHUNK_BYTES)
        # asyncio's TLS reads into slices of what it is given; those of a bytearray are copies.
        self._view = memoryview(self._buffer)
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        # Redis answers in order: the oldest ping is the one that a pong belongs to.
        self._pings: deque[asyncio.Future[bool] | None] = deque()

    def take_over(self, connection: AbstractConnection) -> None:
        """Go on where redis-py has connected and authenticated; no answer may be outstanding."""
        writer = connection._writer  # noqa: SLF001 -- it has no public way to its transport
        if writer is None or writer.is_closing():
            raise redis_errors.ConnectionError("Connection closed by server.")
        transport = writer.transport
        # Loops choose how to read when reading starts.
        transport.pause_reading()  # type: ignore[attr-defined]
        transport.set_protocol(self)
        transport.resume_reading()  # type: ignore[attr-defined]
        self._transport = transport  # type: ignore[assignment]

    # --- Sending ---

    def send(self, command: bytes, names: Iterable[bytes] = ()) -> None:
        """Send a command."""
        if self._transport is not None:
            self._transport.write(_pack(command, names))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._pings.append(None)
        self.send(b"PING")

    async def barrier(self) -> bool:
        """Wait until everything that Redis had sent before this call has been handed over.

        Returns:
            Whether that is so; False where the connection was lost first.
        """
        if self.lost.done():
            return False
        passed: asyncio.Future[bool] = self._loop.create_future()
        self._pings.append(passed)
        self.send(b"PING")
        return await passed

    def end(self, reason: BaseException) -> None:
        """Give the connection up. Nothing is handed over after this."""
        if not self.lost.done():
            self.lost.set_result(reason)
        for ping in self._pings:
            if ping is not None and not ping.done():
                ping.set_result(False)
        self._pings.clear()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    # --- Receiving (asyncio) ---

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give asyncio where to put what it reads."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Hand over all that the chunk completes."""
        self.heard_at_s = self._loop.time()
        try:
            for start in range(0, nbytes, PIECE_BYTES):
                # Any buffer will do, other than hiredis' own types say.
                self._reader.feed(self._buffer, start, min(PIECE_BYTES, nbytes - start))  # type: ignore[arg-type]
                if not self._hand_over():
                    return
        except hiredis.HiredisError as error:
            self.end(redis_errors.InvalidResponse(str(error)))

    def _hand_over(self) -> bool:
        """Hand over all that is complete; says whether to go on."""
        reader, on_message = self._reader, self.on_message
        while (reply := reader.gets()) is not _INCOMPLETE:
            if not isinstance(reply, list) or reply[0] != b"message":
                self._receive(reply)
                if self._transport is None:
                    return False
                continue
            try:
                on_message(reply[1], reply[2])
            except Exception:
                # The rest of the chunk belongs to others.
                log.exception("message not handled", channel=reply[1].decode())
        return True

    def _receive(self, reply: Any) -> None:
        if isinstance(reply, list) and reply[0] == b"subscribe":
            self._on_subscribed(reply[1])
        elif reply == b"PONG" or (isinstance(reply, list) and reply[0] == b"pong"):
            ping = self._pings.popleft() if self._pings else None
            if ping is not None and not ping.done():
                ping.set_result(True)
        elif isinstance(reply, Exception):
            self.end(redis_errors.ResponseError(str(reply)))

    def eof_received(self) -> None:
        """Redis closed."""
        self.end(redis_errors.ConnectionError("Connection closed by server."))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection broke."""
        self.end(exc or redis_errors.ConnectionError("Connection closed by server."))


def _pack(command: bytes, names: Iterable[bytes]) -> bytes:
    parts = [command, *names]
    head = b"*%d\r\n" % len(parts)
    return head + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])
