"""The honest health check: what is published must come back through pub/sub."""

from __future__ import annotations

import asyncio
import secrets
import time

from relay.errors import RelayError
from relay.scripts import RedisLink, mapped_errors

PROBE_PREFIX = b"probe:"


class Probe:
    """Publishes to a channel of its own process and expects the message back.

    The owner of the subscriber passes what arrives on the channel to ``receive``.

    Args:
        link: Which Redis.
        channel: A channel that this process is subscribed to.
        deadline_s: How long a round trip may take.
    """

    def __init__(self, link: RedisLink, channel: str, *, deadline_s: float = 2.0) -> None:
        self.channel = channel
        self.deadline_s = deadline_s
        self.last_round_trip_ms: float | None = None
        self.last_error: str | None = "no probe has been made yet"
        self._link = link
        self._waiting: dict[bytes, asyncio.Future[None]] = {}

    def receive(self, payload: bytes) -> bool:
        """Take a message of the channel; tells whether it was a probe's."""
        if not payload.startswith(PROBE_PREFIX):
            return False
        waiter = self._waiting.pop(payload, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        return True

    async def check(self) -> bool:
        """Make one round trip; tells whether it came back in time."""
        payload = PROBE_PREFIX + secrets.token_hex(8).encode()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[payload] = waiter
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.deadline_s):
                with mapped_errors(self._link.url):
                    await self._link.client.publish(self.channel, payload)
                await waiter
        except TimeoutError:
            self.last_error = (
                f"a message published to Redis did not come back within {self.deadline_s:g} s"
            )
        except RelayError as error:
            self.last_error = str(error)
        else:
            self.last_error = None
            self.last_round_trip_ms = (time.monotonic() - started) * 1000
        finally:
            self._waiting.pop(payload, None)
        return self.last_error is None
