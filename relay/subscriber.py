"""One pub/sub connection for all channels of a process.

Pub/sub forgets: whatever was published while the connection was down is gone. So every loss of
the connection is reported, every confirmed subscription is reported, and between the two nobody
may believe to be up to date (DELIVERY rule 6).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import islice

import structlog
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from relay.cancellation import end_tasks
from relay.errors import RedisMisconfigured, RedisUnavailable
from relay.pubsub import PubSubConnection
from relay.scripts import RedisLink, mapped_errors

PING_EVERY_S = 1.0
SILENCE_S = 3.0
"""Pings without an answer for this long: the connection is dead. A cut network sends no reset."""

SUBSCRIBE_CHUNK = 512
"""Channels in one SUBSCRIBE, and asked for in one turn of the loop.

Thousands at once would hold Redis up for milliseconds, and us.
"""

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

    Attributes:
        is_connected: Whether there is a connection at the moment.
        failure: The defect that ended this; no connection is made any more.
    """

    def __init__(
        self,
        link: RedisLink,
        *,
        on_message: Callable[[bytes, bytes], None],
        on_lost: Callable[[], None],
        on_confirmed: Callable[[bytes], None],
    ) -> None:
        self._link = link
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_confirmed = on_confirmed
        self._wanted: set[bytes] = set()
        # What has to be asked for, or given up, and has not been sent yet.
        self._changes: dict[bytes, bool] = {}
        self._is_sending = False
        # Confirmations still to come for a channel: only the last one counts, the earlier
        # belong to subscriptions that were given up in between.
        self._unconfirmed: dict[bytes, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._redis: AbstractConnection | None = None
        self._connection: PubSubConnection | None = None
        self.is_connected = False
        self.failure: Exception | None = None

    async def start(self) -> None:
        """Connect once and keep connected from then on.

        Raises:
            RedisUnavailable, RedisMisconfigured: The first connection could not be made.
        """
        await self._connect()
        self._task = asyncio.create_task(self._run_loudly(), name="subscriber")

    async def watch(self) -> None:
        """Wait for the end of a started subscriber, which does not end before ``aclose``.

        Raises:
            Exception: The defect that ended it all the same.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
        if self.failure is not None:
            raise self.failure

    async def aclose(self) -> None:
        """Disconnect. No callback is called after this."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None
        await self._disconnect()

    def subscribe(self, channel: bytes) -> None:
        """Ask for a channel; ``on_confirmed`` follows, also after every reconnect.

        Asking again for a channel confirms it again.
        """
        self._wanted.add(channel)
        self._change(channel, is_wanted=True)

    def unsubscribe(self, channel: bytes) -> None:
        """Give up a channel. Messages already on their way may still come."""
        self._wanted.discard(channel)
        self._change(channel, is_wanted=False)

    async def barrier(self) -> bool:
        """Wait until everything published before this call has been given to ``on_message``.

        Redis sends the answer to a ping behind the messages that it had for us by then. So a
        message that has not come although this returned is lost, however slow we are.

        Returns:
            Whether that is so; False where the connection was lost first.
        """
        return self._connection is not None and await self._connection.barrier()

    async def _connect(self) -> None:
        with mapped_errors(self._link.url):
            redis: AbstractConnection = self._link.pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await redis.connect()  # type: ignore[no-untyped-call]
                connection = PubSubConnection(self._on_message, self._confirm)
                connection.take_over(redis)
            except BaseException:
                await redis.disconnect(nowait=True)
                raise
        self._redis, self._connection = redis, connection
        self._unconfirmed = {}
        self._changes = dict.fromkeys(self._wanted, True)
        self.is_connected = True
        self._send_soon()

    async def _disconnect(self) -> None:
        self.is_connected = False
        connection, self._connection = self._connection, None
        redis, self._redis = self._redis, None
        if connection is not None:
            connection.end(redis_errors.ConnectionError("closed by us"))
        if redis is not None:
            await redis.disconnect(nowait=True)

    async def _run_loudly(self) -> None:
        try:
            await self._run()
        except Exception as error:
            # Whoever only looks whether there is a connection must not see one that nobody watches.
            log.critical("subscriber failed: nothing arrives any more", exc_info=True)
            self.failure = error
            await self._disconnect()

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

    async def _serve(self, connection: PubSubConnection) -> BaseException:
        """Watch over a connection until it breaks; gives the reason."""
        loop = asyncio.get_running_loop()
        unanswered = 0
        while True:
            asked_s = loop.time()
            connection.ping()
            done, _ = await asyncio.wait([connection.lost], timeout=PING_EVERY_S)
            if done:
                return connection.lost.result()
            # Pings are counted, not seconds. A pause of the loop or of the process is our own
            # silence, and uvloop runs timers before it reads what came meanwhile: a pause makes
            # one ping look unanswered at most, for each wait reads at least once.
            unanswered = 0 if connection.heard_at_s >= asked_s else unanswered + 1
            if unanswered * PING_EVERY_S >= SILENCE_S:
                return redis_errors.TimeoutError(f"no answer for {SILENCE_S:g} s")

    def _change(self, channel: bytes, *, is_wanted: bool) -> None:
        self._changes[channel] = is_wanted
        if self.is_connected:
            self._send_soon()

    def _send_soon(self) -> None:
        # One turn of the loop gathers what a burst of new connections asks for.
        if not self._is_sending and self._changes:
            self._is_sending = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._is_sending = False
        connection = self._connection
        if connection is None:
            return  # Whatever is wanted is asked for anew on the next one.
        changes = {name: self._changes.pop(name) for name in _first(self._changes)}
        wanted = [name for name, is_wanted in changes.items() if is_wanted]
        for name in wanted:
            self._unconfirmed[name] = self._unconfirmed.get(name, 0) + 1
        if wanted:
            connection.send(b"SUBSCRIBE", wanted)
        if len(wanted) < len(changes):
            connection.send(b"UNSUBSCRIBE", changes.keys() - set(wanted))
        self._send_soon()

    def _confirm(self, channel: bytes) -> None:
        left = self._unconfirmed.get(channel, 1) - 1
        if left:
            self._unconfirmed[channel] = left
            return
        self._unconfirmed.pop(channel, None)
        # A change that has not been sent yet means that this answers an earlier one.
        if channel in self._wanted and channel not in self._changes:
            self._on_confirmed(channel)


def _first(changes: dict[bytes, bool]) -> list[bytes]:
    return list(islice(changes, SUBSCRIBE_CHUNK))
