"""One connection to Redis for many script calls: raw commands out, answers in, no task between.

The client library makes the connection (address, TLS, password, database); from then on its
transport speaks to this protocol alone. An asyncio stream with its buffers, locks and wake-ups
costs more for each call than everything else about it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from relay.scripts import RedisLink, mapped_errors


class Pipeline(asyncio.Protocol):
    """A connection that is written to without waiting; answers come in the order of the commands.

    Args:
        link: Which Redis.
        on_reply: Gets each answer; errors that Redis answers come as exceptions.
        on_lost: Called once when the connection is gone, with the reason if there is one.
        on_writable: Called when more may be written after ``is_writable`` was False.

    Attributes:
        is_writable: Whether the socket takes more; what is written nevertheless is buffered.
        instance: The server's identity, as scripts want it.
    """

    def __init__(
        self,
        link: RedisLink,
        *,
        on_reply: Callable[[Any], None],
        on_lost: Callable[[Exception | None], None],
        on_writable: Callable[[], None],
    ) -> None:
        self.is_writable = True
        self.instance = ""
        self._link = link
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._on_writable = on_writable
        self._reader = hiredis.Reader(replyError=redis_errors.ResponseError)
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        """Make the connection.

        Raises:
            RedisUnavailable, RedisMisconfigured: It could not be made.
        """
        with mapped_errors(self._link.url):
            connection: AbstractConnection = self._link.pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
        self._connection = connection
        self.instance = self._link.instance_of(connection)
        writer = connection._writer  # noqa: SLF001 -- there is no other way to its transport
        if writer is None or writer.is_closing():
            await connection.disconnect(nowait=True)
            raise ConnectionError("the connection was lost as soon as it was made")
        self._transport = writer.transport  # type: ignore[assignment]
        writer.transport.set_protocol(self)

    def write(self, data: bytes) -> None:
        """Send commands."""
        if self._transport is not None:
            self._transport.write(data)

    async def aclose(self) -> None:
        """Cut the connection. ``on_lost`` is not called any more."""
        transport, self._transport = self._transport, None
        connection, self._connection = self._connection, None
        if transport is not None:
            transport.abort()
        if connection is not None:
            await connection.disconnect(nowait=True)

    def abort(self) -> None:
        """Cut the connection; ``on_lost`` follows."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---

    def data_received(self, data: bytes) -> None:
        """Take answers."""
        self._reader.feed(data)
        while self._transport is not None:
            reply = self._reader.gets()
            if reply is False:
                return
            self._on_reply(reply)

    def pause_writing(self) -> None:
        """Note that the socket takes no more for now."""
        self.is_writable = False

    def resume_writing(self) -> None:
        """Note that it does again."""
        self.is_writable = True
        self._on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that it is gone."""
        if self._transport is not None:
            self._transport = None
            self._on_lost(exc)
