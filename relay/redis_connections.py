"""Connections of the Redis client that end with whoever waits for them.

redis-py writes each command through ``asyncio.wait_for``, which on Python 3.11 drops a cancellation
that comes in the moment in which the command has been written (fixed in 3.12,
https://github.com/python/cpython/issues/86296). Whoever was cancelled goes on: a loop for ever, and
``relay up`` in spite of the signal that should have ended it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, ConnectionPool


class CancellableSends(AbstractConnection):
    """How a connection sends, without ``wait_for``; beside one of redis-py's classes."""

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        """Send what is packed already.

        Raises:
            redis.exceptions.TimeoutError: It was not taken within ``socket_timeout``.
            redis.exceptions.ConnectionError: The connection has ended.
        """
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        if isinstance(command, str):
            command = command.encode()
        parts = [command] if isinstance(command, bytes) else command
        try:
            async with asyncio.timeout(self.socket_timeout):
                await self._send_packed_command(parts)
        except BaseException as error:
            # Half a command may have been sent: nothing else can follow it.
            await self.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise redis_errors.TimeoutError("Timeout writing to socket") from None
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                raise redis_errors.ConnectionError(f"Error while writing: {reason}.") from error
            raise


def obey_cancellation(pool: ConnectionPool) -> None:
    """Have the connections that a pool will make give up when their caller is cancelled.

    Args:
        pool: One that has no connections yet.
    """
    if sys.version_info < (3, 12):
        kind: type[Any] = pool.connection_class
        # Under the library's name: a pool keeps some, as it always did, and they are its own.
        names = {"__module__": kind.__module__}
        pool.connection_class = type(kind.__name__, (CancellableSends, kind), names)
