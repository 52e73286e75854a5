"""Many clients in one process, each keeping everything that it ever received.

They are the relay's own Python client, so what is tested is how real clients notice a loss, wait,
come back and resume; only what comes in is written down before the client may ignore it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

import httpx

from relay.client import Connected, Disconnected, Event, RelayClient, Reset, SequenceHole, Update
from relay.client.state import ClientState, Fields, Reply
from relay.events import TERMINAL

if TYPE_CHECKING:
    from types import TracebackType

Frame = dict[str, Any]
Record = Callable[[Frame, Sequence[Update | Reply]], None]

OPEN_AT_ONCE = 40
OPEN_DEADLINE_S = 60.0
STREAM_RETRY_S = 0.2
CONTROL_TYPES = frozenset({"connection_established", "heartbeat", "reset", "reconnect", "degraded"})


@dataclass(frozen=True, slots=True)
class Outage:
    """A connection that was lost, from the client's noticing until it was live elsewhere."""

    noticed_s: float
    live_s: float
    reason: str

    @property
    def duration_ms(self) -> float:
        """How long the client was without a connection that it knew to be good."""
        return (self.live_s - self.noticed_s) * 1_000


class _RecordingState(ClientState):
    """A client's state that shows every frame before deciding what it is worth."""

    def __init__(
        self, since: str, record: Callable[[Frame, Sequence[Update | Reply]], None]
    ) -> None:
        super().__init__(since)
        self._record = record

    def _receive(self, kind: str, frame: Fields) -> list[Update | Reply]:
        updates = super()._receive(kind, frame)
        self._record(dict(frame), updates)
        return updates


@dataclass
class Texts:
    """Streamed messages of one run as a client puts them together: pieces at their positions."""

    pieces: dict[tuple[int, str], str] = field(default_factory=dict)
    frames: Counter[tuple[int, str]] = field(default_factory=Counter)

    def place(self, event: Frame) -> None:
        """Take a ``text_delta``.

        Raises:
            AssertionError: There is a hole before it, or it says something else than before.
        """
        data, key = event["data"], (event["attempt"], event["data"]["message_id"])
        known = self.pieces.get(key, "")
        position, text = data["position"], data["text"]
        assert position <= len(known), f"hole in {key}: {len(known)} known, piece at {position}"
        overlap = known[position : position + len(text)]
        assert overlap == text[: len(overlap)], f"{key} changed at {position}"
        self.pieces[key] = known[:position] + text + known[position + len(text) :]
        self.frames[key] += 1


class FleetClient:
    """One client that resumes by itself and forgets nothing.

    Attributes:
        name: For reports; the ``client_id`` too.
        frames: Every frame received, with the time of its arrival, over all connections.
        events: Every event received, in order, parts joined, with a ``reset`` frame where one came.
        arrived_at_s: When each of ``events`` came, as a time of day.
        outages: Lost connections.
        holes: What the client itself believes to have missed.
    """

    def __init__(
        self, name: str, user_id: str, urls: Sequence[str], token: str, since: str = "active"
    ) -> None:
        self.name = name
        self.user_id = user_id
        self.urls = list(urls)
        self.since = since
        self.frames: list[tuple[float, Frame]] = []
        self.events: list[Frame] = []
        self.arrived_at_s: list[float] = []
        self.outages: list[Outage] = []
        self.holes: list[SequenceHole] = []
        self.nodes: list[str] = []
        self.closed_at_s: list[tuple[float, str]] = []
        self._token = token
        self._client: RelayClient | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._lost: tuple[float, str] | None = None

    async def start(self, since: str | None = None) -> None:
        """Connect, from where the client was when it left; return when established."""
        since = since or self.position or self.since
        client = RelayClient(
            self.urls,
            self._token,
            since=since,
            client_id=self.name,
            connect_timeout_s=OPEN_DEADLINE_S,
        )
        client._link.state = _RecordingState(since, self._record)
        await client.__aenter__()
        self._client = client
        self._reading = asyncio.create_task(self._read(client), name=f"fleet {self.name}")

    async def leave(self) -> None:
        """Disconnect, as a closed tab does; ``start`` comes back."""
        client, self._client = self._client, None
        if client is not None:
            self.since = client.position or self.since
            await client.aclose()
        if self._reading is not None:
            await self._reading
            self._reading = None

    @property
    def client(self) -> RelayClient:
        """The connection that stays, to send on."""
        assert self._client is not None, f"{self.name} is not connected"
        return self._client

    @property
    def position(self) -> str | None:
        """Where the next event follows."""
        return self._client.position if self._client is not None else None

    @property
    def offset(self) -> int:
        """The position's offset, -1 before the first connection."""
        return -1 if self.position is None else int(self.position.rpartition(":")[2])

    @property
    def is_connected(self) -> bool:
        """Whether a connection is established right now."""
        return self._client is not None and self._client.is_connected

    @property
    def resets(self) -> list[Frame]:
        """The ``reset`` frames so far."""
        return [event for event in self.events if event["type"] == "reset"]

    @property
    def current(self) -> list[Frame]:
        """The events since the last reset: what the client's state is made of."""
        for index in range(len(self.events) - 1, -1, -1):
            if self.events[index]["type"] == "reset":
                return self.events[index + 1 :]
        return self.events

    def texts(self, run_id: str) -> Texts:
        """Put a run's messages together from what came since the last reset."""
        texts = Texts()
        for event in self.current:
            if event["type"] == "text_delta" and event["run_id"] == run_id:
                texts.place(event)
        return texts

    def lifecycle(self, run_id: str) -> list[tuple[int, str]]:
        """Give seq and type of a run's lifecycle events since the last reset."""
        return [
            (event["seq"], event["type"])
            for event in self.current
            if event.get("run_id") == run_id and "seq" in event
        ]

    def has_ended(self, run_id: str) -> bool:
        """Whether a terminal event of the run has come."""
        return any(event["type"] in TERMINAL and event["run_id"] == run_id for event in self.events)

    def delay_s(self, index: int, *, since: int | None = None) -> float:
        """Give how long after it was sent an event arrived.

        Args:
            index: Which of ``events``.
            since: Count from when this one was sent instead.
        """
        sent = self.events[index if since is None else since]["timestamp"]
        return self.arrived_at_s[index] - datetime.fromisoformat(sent).timestamp()

    async def until(self, what: Callable[[FleetClient], bool], deadline_s: float = 20.0) -> float:
        """Wait until something is true of what has come; gives the seconds that it took."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                while not what(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            last = [(event["type"], event.get("offset")) for event in self.events[-5:]]
            raise AssertionError(
                f"{self.name} still waits after {deadline_s:g} s; connected: {self.is_connected}, "
                f"at {self.position}, last events {last}, outages {self.outages[-3:]}, "
                f"lost {self._lost}"
            ) from None
        return time.monotonic() - began_s

    def _record(self, frame: Frame, updates: Sequence[Update | Reply]) -> None:
        now_s = time.monotonic()
        self.frames.append((now_s, frame))
        if frame["type"] == "event_part":
            self.events += [dict(item.raw) for item in updates if isinstance(item, Event)]
        elif frame["type"] == "reset" or "offset" in frame:
            self.events.append(frame)
        while len(self.arrived_at_s) < len(self.events):
            self.arrived_at_s.append(time.time())
        self.holes += [item for item in updates if isinstance(item, SequenceHole)]
        if frame["type"] == "connection_established":
            self.nodes.append(frame["node"])
            if self._lost is not None:
                self.outages.append(Outage(self._lost[0], now_s, self._lost[1]))
                self._lost = None
        self._changed.set()

    def _note_loss(self, reason: str) -> None:
        now_s = time.monotonic()
        self.closed_at_s.append((now_s, reason))
        if self._lost is None:
            self._lost = (now_s, reason)
        self._changed.set()

    async def _read(self, client: RelayClient) -> None:
        async for update in client.updates():
            if isinstance(update, Disconnected):
                self._note_loss(update.reason)
            elif isinstance(update, Connected | Reset):
                self._changed.set()


class EventStreamClient(FleetClient):
    """A client of ``/v1/events`` that resumes with ``Last-Event-ID``."""

    def __init__(
        self, name: str, user_id: str, urls: Sequence[str], token: str, since: str = "active"
    ) -> None:
        super().__init__(name, user_id, urls, token, since)
        self._state = _RecordingState(since, self._record)
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
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
