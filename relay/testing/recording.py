"""A client that keeps everything that it ever received.

It is the relay's own Python client, so what is tested is how real clients notice a loss, wait, come
back and resume; only what comes in is written down before the client may ignore it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from relay.client import (
    Connected,
    ConnectionEnded,
    Disconnected,
    Event,
    RelayClient,
    Reset,
    SequenceHole,
    Update,
)
from relay.client.state import ClientState, Fields, Reply
from relay.events import TERMINAL
from relay.testing import streams
from relay.testing.timeline import tell

Frame = dict[str, Any]
Record = Callable[[Frame, Sequence[Update | Reply]], None]

OPEN_DEADLINE_S = 60.0


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


class RecordingState(ClientState):
    """A client's state that shows every frame before deciding what it is worth."""

    def __init__(self, since: str, record: Record) -> None:
        super().__init__(since)
        self._record = record

    def _receive(self, kind: str, frame: Fields) -> list[Update | Reply]:
        updates = super()._receive(kind, frame)
        self._record(dict(frame), updates)
        return updates


class RecordedConnection(RelayClient):
    """The real client, with a state that shows its frames and a connection that can be broken."""

    def __init__(self, urls: Sequence[str], token: str, record: Record, **options: Any) -> None:
        super().__init__(urls, token, **options)
        self._link.state = RecordingState(options["since"], record)

    def drop(self) -> None:
        """Break the connection as a lost network does."""
        self._link.drop()


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
        if position > len(known):
            raise AssertionError(f"hole in {key}: {len(known)} known, piece at {position}")
        overlap = known[position : position + len(text)]
        if overlap != text[: len(overlap)]:
            raise AssertionError(f"{key} changed at {position}")
        self.pieces[key] = known[:position] + text + known[position + len(text) :]
        self.frames[key] += 1


class RecordingClient:
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
        self._client: RecordedConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._lost: tuple[float, str] | None = None
        self._beginnings: list[int] = []
        self._ended: ConnectionEnded | None = None

    async def start(self, since: str | None = None) -> None:
        """Connect, from where the client was when it left; return when established."""
        if since is not None or not self._beginnings:
            self._begin_stream()
        since = since or self.position or self.since
        client = RecordedConnection(
            self.urls,
            self._token,
            self._record,
            since=since,
            client_id=self.name,
            connect_timeout_s=OPEN_DEADLINE_S,
        )
        await client.__aenter__()
        self._client = client
        self._reading = asyncio.create_task(self._read(client), name=f"client {self.name}")

    def _begin_stream(self) -> None:
        # Whoever begins anew, as a reloaded page does, may be told again what it had been told.
        number = len(self._beginnings)
        self._beginnings.append(len(self.frames))

        def frames() -> list[Frame]:
            ends = [*self._beginnings[1:], len(self.frames)]
            return [frame for _, frame in self.frames[self._beginnings[number] : ends[number]]]

        streams.record(self.name, self.user_id, frames)

    async def leave(self) -> None:
        """Disconnect, as a closed tab does; ``start`` comes back.

        Raises:
            ConnectionEnded: The gateway had ended the connection for good; ``wait_ended`` is for
                those who expect it.
        """
        client, self._client = self._client, None
        if client is not None:
            self.since = client.position or self.since
            await client.aclose()
        if self._reading is not None:
            await self._reading
            self._reading = None
        ended, self._ended = self._ended, None
        if ended is not None:
            raise ended

    @property
    def client(self) -> RecordedConnection:
        """The connection that stays, to send on."""
        if self._client is None:
            raise RuntimeError(f"{self.name} has not connected, or has left")
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

    async def until(
        self, what: Callable[[RecordingClient], bool], deadline_s: float = 20.0
    ) -> float:
        """Wait until something is true of what has come; gives the seconds that it took."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                while not what(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                self._complaint(f"{self.name} still waits after {deadline_s:g} s")
            ) from None
        return time.monotonic() - began_s

    def _complaint(self, text: str) -> str:
        connected = "connected" if self.is_connected else "not connected"
        return f"{text} ({connected}, at {self.position}). {self.timeline()}"

    def timeline(self, run_id: str | None = None) -> str:
        """Tell what came, a line for each event, with the seconds since the first one.

        Args:
            run_id: Leaves out other runs.
        """
        return tell(self.name, self.frames, self.closed_at_s, self.events, run_id)

    async def wait_ended(self, timeout_s: float = 20.0) -> ConnectionEnded:
        """Wait until the gateway ends the connection for good, as for an expired token."""
        await self.until(lambda _: self._ended is not None, timeout_s)
        ended, self._ended = self._ended, None
        if ended is None:
            raise RuntimeError(f"{self.name} is awaited twice")
        return ended

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
        try:
            async for update in client.updates():
                if isinstance(update, Disconnected):
                    self._note_loss(update.reason)
                elif isinstance(update, Connected | Reset):
                    self._changed.set()
        except ConnectionEnded as ended:
            self._ended = ended
            self._note_loss(str(ended))
