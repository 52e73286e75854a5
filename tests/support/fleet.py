"""Many clients in one process, each keeping everything that it ever received."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import httpx

from relay.testing.recording import OPEN_DEADLINE_S, Frame, Outage, RecordingState
from relay.testing.utility import WebSocketTestUtility as FleetClient

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["EventStreamClient", "Fleet", "FleetClient", "Frame", "for_each", "percentile"]

STREAM_RETRY_S = 0.2
OPEN_AT_ONCE = 40


class EventStreamClient(FleetClient):
    """A client of ``/v1/events`` that resumes with ``Last-Event-ID``."""

    def __init__(
        self, name: str, user_id: str, urls: Sequence[str], token: str, since: str = "active"
    ) -> None:
        super().__init__(name, user_id, urls, token, since)
        self._state = RecordingState(since, self._record)
        self._last_id = ""
        self._is_open = False

    @property
    def position(self) -> str | None:
        """Where the next event follows."""
        return self._state.position

    @property
    def is_connected(self) -> bool:
        """Whether a stream is established right now."""
        return self._is_open

    async def start(self, since: str | None = None) -> None:
        """Connect; return when established."""
        if since is not None or not self._beginnings:
            self._begin_stream()
        self.since = since or self.since
        self._reading = asyncio.create_task(self._keep_reading(), name=f"stream {self.name}")
        await self.until(lambda one: one.is_connected, OPEN_DEADLINE_S)

    async def leave(self) -> None:
        """Disconnect, as a closed tab does; ``start`` comes back."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _keep_reading(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=OPEN_DEADLINE_S) as client:
            for url in itertools.cycle(self.urls):
                reason = "the stream ended"
                try:
                    await self._read_stream(client, url)
                except httpx.TransportError as error:
                    reason = repr(error)
                finally:
                    self._is_open = False
                self._note_loss(reason)
                await asyncio.sleep(STREAM_RETRY_S)

    async def _read_stream(self, client: httpx.AsyncClient, url: str) -> None:
        headers = {"Authorization": f"Bearer {self._token}"}
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        query = {"since": self.since, "client_id": self.name}
        self._state.opening()
        async with client.stream(
            "GET", f"{url}/v1/events", params=query, headers=headers
        ) as answer:
            if answer.status_code != httpx.codes.OK:
                return
            rest = bytearray()
            async for chunk in answer.aiter_bytes():
                rest += chunk
                # An end of a block can only be in what is new, or at the seam before it.
                if b"\n\n" in rest[-len(chunk) - 1 :]:
                    *blocks, rest = rest.split(b"\n\n")
                    for block in blocks:
                        self._take_block(bytes(block))

    def _take_block(self, block: bytes) -> None:
        fields = dict(line.split(b": ", 1) for line in block.split(b"\n"))
        if b"event" in fields:
            return
        self._last_id = fields.get(b"id", self._last_id.encode()).decode()
        self._is_open = True
        self._state.receive(fields[b"data"])


class Fleet:
    """All clients of a test; disconnected with the ``async with`` block.

    Args:
        urls: The gateways. Each client has them in an order of its own, as behind a load balancer.
        token: Gives a user's token.
        seed: For those orders.
    """

    def __init__(self, urls: Sequence[str], token: Callable[[str], str], *, seed: int = 0) -> None:
        self.urls = list(urls)
        self.clients: list[FleetClient] = []
        self._token = token
        self._random = random.Random(seed)

    async def __aenter__(self) -> Self:
        # Everything that ever came is kept. A collector that looks through it again and again
        # stops all clients at once, for up to half a second in a full round.
        gc.disable()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.enable()
        await asyncio.gather(*(client.leave() for client in self.clients))

    def add(
        self,
        user_id: str,
        *,
        since: str = "active",
        name: str | None = None,
        urls: Sequence[str] | None = None,
        kind: type[FleetClient] = FleetClient,
    ) -> FleetClient:
        """Add a client that is not yet connected."""
        order = list(urls) if urls is not None else self._random.sample(self.urls, len(self.urls))
        client = kind(
            name or f"{user_id}/{len(self.clients)}", user_id, order, self._token(user_id), since
        )
        self.clients.append(client)
        return client

    async def connect(self, clients: Iterable[FleetClient] | None = None) -> None:
        """Connect clients, a bounded number at a time."""
        await for_each(clients if clients is not None else self.clients, lambda one: one.start())

    def outages(self) -> list[Outage]:
        """Give all clients' lost connections."""
        return [outage for client in self.clients for outage in client.outages]


async def for_each(
    clients: Iterable[FleetClient],
    work: Callable[[FleetClient], Any],
    at_once: int = OPEN_AT_ONCE,
) -> None:
    """Do something with each client, a bounded number at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(client: FleetClient) -> None:
        async with places:
            await work(client)

    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(one(client))


def percentile(values: Sequence[float], share: float) -> float:
    """Give the smallest value that ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
