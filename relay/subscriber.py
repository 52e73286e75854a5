"""One pub/sub connection for all channels of a process.

Pub/sub forgets: whatever was published while the connection was down is gone. So every loss of
the connection is reported, every confirmed subscription is reported, and between the two nobody
may believe to be up to date (DELIVERY rule 6).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import structlog
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from relay.cancellation import end_tasks
from relay.errors import RedisMisconfigured, RedisUnavailable
from relay.scripts import RedisLink, mapped_errors

PING_EVERY_S = 1.0
SILENCE_S = 3.0
"""Without an answer for this long the connection counts as dead: a cut network sends no reset."""

SUBSCRIBE_CHUNK = 512
"""Channels in one SUBSCRIBE; thousands in one command would hold Redis up for milliseconds."""

_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 2.0
_SETTLED_S = 0.5
"""A connection that has lasted this long was a good one: the next loss is a new story.

Who is refused is refused at once. A longer time would add up the pauses of a Redis that closes
subscriptions every second, and all clients would wait for them.
"""

log = structlog.stdlib.get_logger(__name__)


class Subscriber:
    """Keeps the subscriptions of a process through reconnects.

    All callbacks are called on the event loop and must return quickly.

    Args:
        link: Which Redis.
        on_message: Gets channel and payload of each message, in the order of arrival.
        on_lost: Called when the connection breaks: messages may be missing from here on.
        on_confirmed: Called when Redis has confirmed the subscription of a channel on the
            current connection: messages are complete from here on.
    """

    def __init__(
        self,
        link: RedisLink,
        *,
        on_message: Callable[[str, bytes], None],
        on_lost: Callable[[], None],
        on_confirmed: Callable[[str], None],
    ) -> None:
        self._link = link
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_confirmed = on_confirmed
        self._wanted: set[str] = set()
        self._changes: dict[str, bool] = {}
        # Confirmations still to come for a channel: only the last one counts, the earlier
        # belong to subscriptions that were given up in between.
        self._unconfirmed: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None
        self._heard_at_s = 0.0
        self.is_connected = False

    async def start(self) -> None:
        """Connect once and keep connected from then on.

        Raises:
            RedisUnavailable, RedisMisconfigured: The first connection could not be made.
        """
        await self._connect()
        self._task = asyncio.create_task(self._run(), name="subscriber")

    async def aclose(self) -> None:
        """Disconnect. No callback is called after this."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None
        await self._disconnect()

    def subscribe(self, channel: str) -> None:
        """Ask for a channel; ``on_confirmed`` follows, also after every reconnect.

        Asking again for a channel confirms it again.
        """
        self._wanted.add(channel)
        self._changes[channel] = True
        self._changed.set()

    def unsubscribe(self, channel: str) -> None:
        """Give up a channel. Messages already on their way may still come."""
        self._wanted.discard(channel)
        self._changes[channel] = False
        self._changed.set()

    async def _connect(self) -> None:
        with mapped_errors(self._link.url):
            connection: AbstractConnection = self._link.pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
        self._connection = connection
        self._changes = dict.fromkeys(self._wanted, True)
        self._unconfirmed = {}
        self._changed.set()
        self._heard_at_s = asyncio.get_running_loop().time()
        self.is_connected = True

    async def _disconnect(self) -> None:
        self.is_connected = False
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        retry_s = _RETRY_FIRST_S
        while True:
            if self._connection is not None:
                served_from_s = loop.time()
                error = await self._serve(self._connection)
                log.warning("subscription connection lost", error=str(error))
                await self._disconnect()
                self._on_lost()
                if loop.time() - served_from_s >= _SETTLED_S:
                    retry_s = _RETRY_FIRST_S
                else:
                    # Redis takes connections but refuses what we ask of them: without the pause
                    # this would be a busy loop.
                    await asyncio.sleep(retry_s)
                    retry_s = min(retry_s * 2, _RETRY_MOST_S)
            try:
                await self._connect()
            except (RedisUnavailable, RedisMisconfigured) as error:
                log.debug("subscription connection not made", error=str(error))
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))  # noqa: S311
                retry_s = min(retry_s * 2, _RETRY_MOST_S)

    async def _serve(self, connection: AbstractConnection) -> BaseException:
        """Use a connection until it breaks; gives the reason."""
        tasks = [
            asyncio.create_task(self._read(connection), name="subscriber-read"),
            asyncio.create_task(self._write(connection), name="subscriber-write"),
            asyncio.create_task(self._watch(connection), name="subscriber-watch"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(tasks)
        error = next(iter(done)).exception()
        if error is None or not isinstance(
            error, redis_errors.RedisError | OSError | asyncio.TimeoutError
        ):
            raise error or RuntimeError("a subscriber task ended")
        return error

    async def _read(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            response = await connection.read_response(timeout=float("inf"))
            self._heard_at_s = loop.time()
            self._receive(response)

    def _receive(self, response: Any) -> None:
        match response:
            case [b"message", channel, payload]:
                self._on_message(channel.decode(), payload)
            case [b"subscribe", channel, _]:
                name = channel.decode()
                left = self._unconfirmed.get(name, 1) - 1
                if left:
                    self._unconfirmed[name] = left
                    return
                self._unconfirmed.pop(name, None)
                # A change that has not been sent yet means that this answers an earlier one.
                if name in self._wanted and name not in self._changes:
                    self._on_confirmed(name)

    async def _write(self, connection: AbstractConnection) -> None:
        while True:
            await self._changed.wait()
            # One turn of the loop gathers what a burst of new connections asks for.
            await asyncio.sleep(0)
            self._changed.clear()
            changes, self._changes = self._changes, {}
            for command, is_wanted in ((b"SUBSCRIBE", True), (b"UNSUBSCRIBE", False)):
                names = [name for name, wanted in changes.items() if wanted is is_wanted]
                if is_wanted:
                    for name in names:
                        self._unconfirmed[name] = self._unconfirmed.get(name, 0) + 1
                for start in range(0, len(names), SUBSCRIBE_CHUNK):
                    chunk = names[start : start + SUBSCRIBE_CHUNK]
                    await connection.send_command(command, *chunk, check_health=False)

    async def _watch(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_EVERY_S)
            if loop.time() - self._heard_at_s > SILENCE_S:
                raise redis_errors.TimeoutError(f"no answer for {SILENCE_S:g} s")
            await connection.send_command(b"PING", check_health=False)
