"""A world around the delivery machine: Redis, gateways and clients in memory, and faults.

The machine is the real one (``relay.recovery``). Redis is modelled by what ``publish.lua`` and
``read.lua`` promise; the network drops, delays and cuts; Redis falls back to older copies and loses
keys; clients are slow, leave at any moment and come back elsewhere. A history is a list of
operations, each with a seed of its own, so that a failing one can be shortened and replayed.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from relay.codec import LiveBatch, Position, Publication
from relay.events import Kind
from relay.recovery import (
    Advance,
    Broken,
    Cursor,
    CursorState,
    Feed,
    FeedState,
    FetchBody,
    LargeText,
    Page,
    Read,
    Request,
    RequestQueue,
    Rotate,
    SharedRequest,
    TextMark,
    parts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from relay.recovery import ActiveRun, Since

BODY_BYTES = 60
PART_THRESHOLD = 140
PART_BYTES = 48
LARGE_TEXT_BYTES = 70
PAGE_BYTES = 160
PAGE_ENTRIES = 5
RING_BYTES = (1_700, 13_600)
"""Of the gateways in turn. The first keeps nothing while nobody is behind, the second a few."""

OUTBOX_BYTES = 260
MAX_PREVIOUS = 8
REPLIES_UNTIL_SETTLED = 4_000


class Violation(AssertionError):
    """A promise was broken."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


@contextlib.contextmanager
def small_parts() -> Iterator[None]:
    """Make events count as large early, so that short histories have all sizes."""
    before = parts.PART_THRESHOLD_BYTES, parts.PART_BYTES
    parts.PART_THRESHOLD_BYTES, parts.PART_BYTES = PART_THRESHOLD, PART_BYTES
    try:
        yield
    finally:
        parts.PART_THRESHOLD_BYTES, parts.PART_BYTES = before


# --- Redis ---


@dataclass
class Run:
    run_id: str
    first_offset: int
    attempt: int = 1
    message: int = 0
    is_in_message: bool = False
    result_offset: int | None = None
    is_completed: bool = False
    is_listed: bool = True


@dataclass
class Text:
    last: int
    content: str = ""
    is_lost: bool = False


class Store:
    """One user's channel in Redis, and beside it the ledger of what was acknowledged."""

    def __init__(self) -> None:
        self.epoch = "e0"
        self.offset = self.floor = 0
        self.instance = 0
        self.previous: list[Position] = []
        self.log: list[tuple[int, int, str, bytes]] = []
        self.bodies: dict[int, bytes] = {}
        self.texts: dict[str, Text] = {}
        self.runs: dict[str, Run] = {}
        # The ledger. It follows a rewind, since what Redis lost nobody can get.
        self.events: dict[int, int] = {}
        self.terminals: dict[int, str] = {}
        self.streamed: dict[str, list[tuple[int, str]]] = {}

    def copy(self) -> Store:
        other = copy.copy(self)
        other.previous = list(self.previous)
        other.log = list(self.log)
        other.bodies = dict(self.bodies)
        other.texts = {name: copy.copy(text) for name, text in self.texts.items()}
        other.runs = {name: copy.copy(run) for name, run in self.runs.items()}
        other.events = dict(self.events)
        other.terminals = dict(self.terminals)
        other.streamed = {name: list(pieces) for name, pieces in self.streamed.items()}
        return other

    def active_runs(self) -> list[Run]:
        return [run for run in self.runs.values() if run.result_offset is None]

    def read(self, after: int, known: Mapping[str, TextMark], with_runs: bool) -> Page:
        """Answer as ``read.lua`` and ``relay.history`` do."""
        stored = [entry for entry in self.log if entry[0] > after][:PAGE_ENTRIES]
        log_end = stored[-1][0] if len(stored) == PAGE_ENTRIES else self.offset
        items: list[tuple[int, int, Publication | None, TextMark | None]] = []
        for offset, seq, run_id, event in stored:
            body = b"" if event else self.bodies.get(offset, b"")
            publication = Publication(
                offset, seq, Kind.EVENT, run_id, event, len(event) or len(body)
            )
            items.append((offset, len(event), publication, None))
        for name, text in self.texts.items():
            if after < text.last <= log_end:
                items.append((text.last, *self._read_text(name, text, known)))
        items.sort(key=lambda item: item[0])
        publications, marks, total, covered = [], {}, 0, log_end
        for offset, size, publication, mark in items:
            if total + size > PAGE_BYTES and total > 0:
                covered = offset - 1
                break
            total += size
            if publication is not None:
                publications.append(publication)
            if mark is not None:
                marks[offset] = mark
        return Page(
            epoch=self.epoch,
            offset=self.offset,
            floor=self.floor,
            previous=list(self.previous),
            covered=max(covered, after),
            publications=publications,
            marks=marks,
            runs=[copy.copy(run) for run in self.runs.values() if run.is_listed]
            if with_runs
            else (),
        )

    def _read_text(
        self, name: str, text: Text, known: Mapping[str, TextMark]
    ) -> tuple[int, Publication | None, TextMark | None]:
        run_id, attempt, _ = name.split(":")
        run = self.runs.get(run_id)
        if run is None or run.attempt != int(attempt) or text.is_lost:
            return 0, None, None
        if run.result_offset is not None and run.result_offset <= self.floor:
            return 0, None, None
        before = known.get(name, TextMark(name, 0, 0))
        rest = text.content.encode()[before.size_bytes :].decode()
        if not rest:
            return 0, None, None
        mark = TextMark(name, len(text.content.encode()), len(text.content))
        if len(rest.encode()) > LARGE_TEXT_BYTES:
            large = LargeText(
                text.last,
                run_id,
                name,
                start=before,
                size_bytes=len(rest.encode()),
                opening=text_event(name, before.chars, "")[: -len(TEXT_END)],
                closing=TEXT_END,
            )
            return 0, large, mark
        event = text_event(name, before.chars, rest)
        return len(event), Publication(text.last, 0, Kind.TEXT, run_id, event), mark


TEXT_END = b'"}'


def text_event(name: str, position: int, text: str) -> bytes:
    return orjson.dumps({"k": "t", "n": name, "p": position, "t": text})


# --- Clients ---


@dataclass
class Client:
    """What one browser knows; it survives its connections."""

    name: str
    since: Since
    epoch: str | None = None
    offset: int = 0
    # Everything above this is owed to the client since it started or was last reset.
    owed: int = 0
    events: dict[int, int] = field(default_factory=dict)
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    # Texts of which a part was published before the client's start: a client that asked for
    # "now" does not get it.
    began_at: int = 0
    is_now: bool = False
    resets: int = 0
    resets_at_start: int = 0
    parts: list[str] = field(default_factory=list)
    parts_of: int = 0
    connection: Connection | None = None

    def fork(self) -> Client:
        other = copy.copy(self)
        other.events = dict(self.events)
        other.texts = {name: dict(text) for name, text in self.texts.items()}
        other.parts = list(self.parts)
        other.connection = None
        return other

    def resume_since(self) -> Since:
        return self.since if self.epoch is None else Position(self.epoch, self.offset)

    def apply(self, frame: tuple[Any, ...]) -> None:
        match frame:
            case ("established", Position() as position, is_recovered, owed):
                self._establish(position, is_recovered, owed)
            case ("reset", Position() as position, owed):
                self._start(position, owed)
                self.resets += 1
                self.is_now = False
            case ("position", Position() as position):
                if position.epoch == self.epoch:
                    require(
                        position.offset >= self.offset,
                        f"{self.name}: heartbeat goes back from {self.offset} to {position}",
                    )
                self.epoch, self.offset = position
            case ("event", offset, event):
                self._receive(offset, orjson.loads(event))
            case ("part", part):
                self._receive_part(orjson.loads(part))
            case _:
                raise AssertionError(frame)

    def _establish(self, position: Position, is_recovered: bool, owed: int) -> None:
        self.parts.clear()
        if self.epoch is None:
            self._start(position, owed)
        elif is_recovered:
            require(
                position.offset == self.offset,
                f"{self.name}: resumed at {position} instead of {self.epoch}:{self.offset}",
            )
            self.epoch = position.epoch
        # Not recovered: a reset follows; until it has come, the old position stays the truth.

    def _start(self, position: Position, owed: int) -> None:
        self.epoch, self.offset = position
        self.began_at = position.offset
        self.owed = max(position.offset, owed)
        self.events.clear()
        self.texts.clear()
        self.parts.clear()

    def _receive(self, offset: int, event: dict[str, Any]) -> None:
        require(self.epoch is not None, f"{self.name}: event {offset} before it was established")
        require(
            offset > self.offset,
            f"{self.name}: event at {offset} although it is at {self.epoch}:{self.offset}",
        )
        self.offset = offset
        if event["k"] == "e":
            self.events[offset] = event["id"]
        elif event["k"] == "t":
            text = self.texts.setdefault(event["n"], {})
            for index, char in enumerate(event["t"], event["p"]):
                require(
                    text.setdefault(index, char) == char,
                    f"{self.name}: text {event['n']} changes at {index}",
                )

    def _receive_part(self, part: dict[str, Any]) -> None:
        if part["index"] == 0:
            self.parts.clear()
            self.parts_of = part["offset"]
        require(
            part["index"] == len(self.parts) and part["offset"] == self.parts_of,
            f"{self.name}: part {part['index']} of {part['offset']} after {len(self.parts)} parts",
        )
        self.parts.append(part["text"])
        if len(self.parts) == part["total"]:
            event = orjson.loads("".join(self.parts))
            self.parts.clear()
            require(event["offset"] == part["offset"], f"{self.name}: joined another event")
            self._receive(event["offset"], event)


class Connection:
    """A client's connection to a gateway: the sink of its cursor, with its outbox."""

    def __init__(self, world: World, client: Client, gateway: Gateway) -> None:
        self.world = world
        self.client = client
        self.gateway = gateway
        self.frames: deque[tuple[int, tuple[Any, ...]]] = deque()
        self.transcript: list[tuple[Client, tuple[Any, ...]]] = []
        self.size = 0
        self.is_full = False
        self.excess = 0
        self.is_established = False
        self.cursor: Cursor = gateway.feed.attach(self, client.resume_since())

    @property
    def has_room(self) -> bool:
        return not self.is_full

    @property
    def is_idle(self) -> bool:
        return not self.frames

    def _add(self, size: int, frame: tuple[Any, ...], *, is_event: bool = True) -> None:
        require(self.client.connection in (self, None), f"{self.client.name}: write after close")
        if is_event:
            require(self.is_established, f"{self.client.name}: {frame} before it was established")
            if self.is_full:
                self.excess += size
                bound = PAGE_BYTES + self.world.largest
                require(
                    self.excess <= bound,
                    f"{self.client.name}: {self.excess} bytes written without room",
                )
        self.frames.append((size, frame))
        self.size += size
        if self.size >= OUTBOX_BYTES and not self.is_full:
            self.is_full = True
            self.excess = 0

    def established(self, position: Position, recovered: bool, runs: Sequence[ActiveRun]) -> None:
        require(not self.is_established, f"{self.client.name}: established twice")
        self.is_established = True
        self._add(1, ("established", position, recovered, self._owed(position)), is_event=False)

    def _owed(self, position: Position) -> int:
        owed = self.cursor._owed
        require(
            owed <= max(position.offset, self.world.highest_floor),
            f"{self.client.name} is owed only what lies above {owed}",
        )
        return owed

    def write(self, publication: Publication) -> None:
        require(bool(publication.event), f"{self.client.name}: a claim without its bytes")
        frame = ("event", publication.offset, publication.event)
        self._add(len(publication.event), frame)

    def write_all(self, publications: Sequence[Publication]) -> None:
        for publication in publications:
            self.write(publication)

    def write_part(self, frame: bytes, is_last: bool) -> None:
        parts = [queued for _, (kind, *queued) in self.frames if kind == "part"]
        require(not parts, f"{self.client.name}: a part behind a part")
        self._add(len(frame), ("part", frame))

    def reset(self, position: Position, reason: str, runs: Sequence[ActiveRun]) -> None:
        self._add(1, ("reset", position, self._owed(position)), is_event=False)

    def reposition(self, position: Position) -> None:
        self._add(1, ("position", position), is_event=False)

    def heartbeat(self) -> None:
        if self.is_established:
            self._add(1, ("position", self.cursor.position), is_event=False)

    def drain(self, count: int) -> None:
        for _ in range(min(count, len(self.frames))):
            size, frame = self.frames.popleft()
            self.size -= size
            self.client.apply(frame)
            if self.world.keeps_transcripts:
                self.transcript.append((self.client.fork(), frame))
        if self.is_full and self.size <= OUTBOX_BYTES // 2:
            self.is_full = False
            self.cursor.advance()
        elif not self.frames:
            self.cursor.advance()

    def close(self) -> None:
        """The client has received a prefix; what waits here is gone."""
        self.cursor.close()
        self.client.connection = None
        self.gateway.connections.remove(self)


# --- Gateways ---


class Gateway:
    """A gateway process: one feed, its pub/sub connection, its reads under way."""

    def __init__(self, world: World, ring_bytes: int) -> None:
        self.world = world
        self.ring_bytes = ring_bytes
        self.connections: list[Connection] = []
        self.begin()

    def begin(self) -> None:
        self.feed = Feed(ring_bytes=self.ring_bytes)
        self.messages: deque[LiveBatch] = deque()
        self.is_subscription_due = False
        self.is_subscribed = False
        self.is_confirmation_due = False
        self.is_loss_due = False
        self.waiting: RequestQueue[str] = RequestQueue()
        self.sent: list[SharedRequest[str]] = []
        self.replies: list[tuple[SharedRequest[str], Any]] = []

    def perform(self) -> None:
        effects = self.feed.effects
        while effects:
            batch, effects[:] = list(effects), []
            for effect in batch:
                if isinstance(effect, Advance):
                    effect.cursor.advance()
                elif isinstance(effect, Broken):
                    raise effect.error
                else:
                    self.waiting.add("user", effect)

    def subscribe(self) -> None:
        """The subscription is asked for; Redis has not taken it."""
        self.is_subscription_due = True

    def take_subscription(self) -> None:
        """Redis takes the subscription; the confirmation is on its way, before all messages."""
        self.is_subscription_due = False
        self.is_subscribed = True
        self.is_confirmation_due = True

    def disconnect(self) -> None:
        """The pub/sub connection breaks; the gateway notices later."""
        self.is_subscribed = False
        self.is_loss_due = True

    def notice_loss(self) -> None:
        self.is_loss_due = False
        self.is_subscribed = False
        self.is_confirmation_due = False
        self.messages.clear()
        self.feed.lose()
        self.perform()

    def confirm(self) -> None:
        self.is_confirmation_due = False
        self.feed.confirm()
        self.perform()

    def receive_message(self) -> None:
        self.feed.receive_live(self.messages.popleft())
        self.perform()

    @property
    def has_requests(self) -> bool:
        return len(self.waiting) + len(self.sent) > 0

    def execute(self, rng: random.Random | None = None) -> None:
        """Redis carries out a request; the answer is on its way."""
        # What is sent can be joined no more; several connections overtake each other.
        self.sent += self.waiting.take(rng.choice((0, 1, 64)) if rng and self.sent else 64)
        shared = self.sent.pop(rng.randrange(len(self.sent)) if rng else 0)
        self.replies.append((shared, self.world.answer(shared.first)))

    def receive_reply(self, index: int) -> None:
        shared, answer = self.replies.pop(index)
        self.world.replies += 1
        for request in shared.waiting:
            self.receive_answer(request, answer)
        self.perform()

    def receive_answer(self, request: Request, answer: Any) -> None:
        if isinstance(request, Rotate):
            request.feed.receive_rotated(request)
        elif isinstance(request, FetchBody):
            request.cursor.receive_body(request, answer)
        else:
            request.requester.receive_page(request, answer)

    def audit(self) -> None:
        """What ``FeedHub`` does every few seconds."""
        feed, store = self.feed, self.world.store
        if feed.state is FeedState.LIVE and (
            (store.epoch, store.offset) != (feed.epoch, feed.head)
        ):
            feed.sync()
            self.perform()


# --- The world ---


class World:
    """All of it, and the operations that random histories are made of."""

    def __init__(self, *, gateways: int = 2, keeps_transcripts: bool = False) -> None:
        self.store = Store()
        self.copies: list[Store] = []
        # Events whose bodies were lost: gone for good to whoever had not got them by then.
        self.lost_events: set[int] = set()
        self.lost_texts: set[str] = set()
        self.highest_floor = 0
        # Something happened that only the audit can notice.
        self.needs_audit = False
        self.epochs = 0
        self.instance = 0
        self.event_ids = 0
        self.run_ids = 0
        self.client_ids = 0
        self.replies = 0
        self.largest = PAGE_BYTES
        self.keeps_transcripts = keeps_transcripts
        self.clients: list[Client] = []
        rings = itertools.islice(itertools.cycle(RING_BYTES), gateways)
        self.gateways = [Gateway(self, ring_bytes) for ring_bytes in rings]

    # Redis' side.

    def broadcast(self, batch: LiveBatch) -> None:
        for gateway in self.gateways:
            if gateway.is_subscribed:
                gateway.messages.append(batch)

    def new_epoch(self) -> str:
        self.epochs += 1
        return f"e{self.epochs}"

    def begin_epoch(self) -> None:
        store = self.store
        store.previous.insert(0, Position(store.epoch, store.offset))
        del store.previous[MAX_PREVIOUS:]
        store.epoch = self.new_epoch()
        store.instance = self.instance
        for run in store.active_runs():
            for name, text in store.texts.items():
                if name.startswith(f"{run.run_id}:{run.attempt}:") and not text.is_lost:
                    store.offset += 1
                    text.last = store.offset
        self.broadcast(LiveBatch(store.epoch, []))

    def open_channel(self) -> Store:
        if self.store.instance != self.instance:
            self.begin_epoch()
        return self.store

    def answer(self, effect: Read | Rotate | FetchBody) -> Any:
        store = self.open_channel() if not isinstance(effect, FetchBody) else self.store
        if isinstance(effect, Rotate):
            if store.epoch == effect.epoch:
                self.begin_epoch()
            return None
        if isinstance(effect, FetchBody):
            # Another epoch's body at this offset is another event.
            text = store.texts.get(effect.text)
            body = store.bodies.get(effect.offset, b"")
            if effect.text:
                body = text.content.encode() if text and not text.is_lost else b""
            is_whole = len(body) == effect.size_bytes or (
                effect.text and len(body) > effect.size_bytes
            )
            if store.epoch != effect.epoch or not is_whole:
                return b""
            return body[effect.start : effect.start + effect.length]
        known = effect.known if store.epoch == effect.epoch else {}
        return store.read(effect.after, known, effect.with_runs)

    def _append(self, run: Run, kind: Kind, event: bytes, seq: int = 0) -> Publication:
        store = self.store
        store.offset += 1
        self.largest = max(self.largest, len(event))
        if kind is Kind.EVENT:
            is_large = len(event) > BODY_BYTES
            if is_large:
                store.bodies[store.offset] = event
            store.log.append((store.offset, seq, run.run_id, b"" if is_large else event))
        return Publication(store.offset, seq, kind, run.run_id, event)

    def _append_event(self, run: Run, size: int = 0) -> Publication:
        self.event_ids += 1
        event: dict[str, Any] = {"k": "e", "id": self.event_ids}
        if size:
            event["x"] = "é" * size
        run.is_in_message = False
        publication = self._append(run, Kind.EVENT, orjson.dumps(event), 1)
        self.store.events[publication.offset] = self.event_ids
        return publication

    def _append_text(self, run: Run, piece: str) -> Publication:
        store = self.store
        if not run.is_in_message:
            run.message += 1
            run.is_in_message = True
        name = f"{run.run_id}:{run.attempt}:m{run.message}"
        pieces = store.streamed.setdefault(name, [])
        position = sum(len(text) for _, text in pieces)
        publication = self._append(run, Kind.TEXT, text_event(name, position, piece))
        pieces.append((publication.offset, piece))
        text = store.texts.get(name)
        if text is None:
            store.texts[name] = Text(publication.offset, piece)
        else:
            text.content += piece
            text.last = publication.offset
        self.largest = max(self.largest, 4 * len(store.texts[name].content) + 40)
        return publication

    def publish(self, rng: random.Random, *, size: int | None = None) -> None:
        store = self.open_channel()
        active = store.active_runs()
        batch: list[Publication] = []
        if not active or (len(active) < 3 and rng.random() < 0.1):
            self.run_ids += 1
            run = Run(f"r{self.run_ids}", store.offset + 1)
            store.runs[run.run_id] = run
            batch.append(self._append_event(run))
        else:
            run = rng.choice(active)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
            choice = rng.random()
            if choice < 0.55:
                piece = rng.choice(("a", "bé", "日本", "cdefg", "🙂x")) * rng.choice((1, 1, 1, 4))
                batch.append(self._append_text(run, piece))
            elif choice < 0.62:
                batch.append(self._append(run, Kind.PROGRESS, b'{"k":"p"}'))
            elif choice < 0.92:
                large = size if size is not None else rng.choice((0, 0, 0, 0, 0, 15, 30, 60, 100))
                batch.append(self._append_event(run, large))
            elif choice < 0.95:
                batch.append(self._append_event(run))
                run.attempt += 1
                run.message = 0
            else:
                last = self._append_event(run, rng.choice((0, 0, 0, 60)))
                batch.append(last)
                run.result_offset = last.offset
                run.is_completed = rng.random() < 0.6
                store.terminals[last.offset] = run.run_id
                break
        if sum(len(publication.event) for publication in batch) > 2 * BODY_BYTES:
            batch = [
                Publication(item.offset, item.seq, item.kind, item.run_id, b"") for item in batch
            ]
        self.broadcast(LiveBatch(store.epoch, batch))

    def trim(self, count: int) -> None:
        store = self.open_channel()
        for _ in range(min(count, len(store.log) - 1)):
            offset, _, _, event = store.log.pop(0)
            store.floor = offset
            self.highest_floor = max(self.highest_floor, offset)
            if not event:
                store.bodies.pop(offset, None)

    def expire(self, rng: random.Random) -> None:
        """Time passes: ended runs leave the list, texts of completed runs go."""
        for run in self.store.runs.values():
            if run.result_offset is not None and rng.random() < 0.5:
                run.is_listed = False
                if run.is_completed:
                    for name, text in self.store.texts.items():
                        if name.startswith(run.run_id + ":"):
                            text.is_lost = True
                            self.lost_texts.add(name)

    def lose_key(self, rng: random.Random) -> None:
        store = self.store
        what = rng.choice(("log", "channel", "body", "body", "text"))
        if what == "log" and store.log:
            store.floor = store.log[-1][0]
            self.highest_floor = max(self.highest_floor, store.floor)
            store.log.clear()
        elif what == "channel":
            self.needs_audit = True
            lost = store
            self.store = Store()
            self.store.instance = self.instance
            self.store.epoch = self.new_epoch()
            # Bodies are not cleaned up; they expire. The runs' hashes stay.
            self.store.bodies = lost.bodies
            self.store.events = {}
        elif what == "body" and (kept := sorted(store.bodies.keys() & store.events.keys())):
            offset = rng.choice(kept)
            del store.bodies[offset]
            self.lost_events.add(store.events[offset])
        elif what == "text" and store.texts:
            name = rng.choice(sorted(store.texts))
            store.texts[name].is_lost = True
            self.lost_texts.add(name)

    def fail_over(self, rng: random.Random) -> None:
        """Redis is replaced by an older copy, or restarts with all it had."""
        self.instance += 1
        if self.copies and rng.random() < 0.7:
            self.store = rng.choice(self.copies).copy()
        for gateway in self.gateways:
            if gateway.is_subscribed and rng.random() < 0.8:
                gateway.disconnect()
            # Otherwise a proxy hides it, subscribes again, and nobody says so.
            self.needs_audit = True

    def rewind_unnoticed(self, rng: random.Random) -> None:
        """Redis has less under the same epoch and nothing tells. Noticed as long as it is less."""
        copies = [kept for kept in self.copies if kept.epoch == self.store.epoch]
        if not copies or self.store.instance != self.instance:
            return
        self.quiesce()
        chosen = rng.choice(copies)
        # The others are of another branch now, which nothing tells apart under the same epoch.
        self.copies = [chosen]
        self.store = chosen.copy()
        self.needs_audit = True
        self.quiesce()

    # The clients' side.

    def connect(self, client: Client, gateway: Gateway) -> None:
        if not (gateway.is_subscription_due or gateway.is_subscribed or gateway.is_loss_due):
            gateway.subscribe()
        connection = Connection(self, client, gateway)
        client.connection = connection
        gateway.connections.append(connection)
        gateway.perform()

    def new_client(self, since: Since) -> Client:
        self.client_ids += 1
        client = Client(f"c{self.client_ids}", since)
        client.is_now = since == "now"
        self.clients.append(client)
        return client

    # Operations by name. Each takes randomness of its own and the gateway that it concerns.

    def step(self, name: str, seed: int) -> None:
        rng = random.Random(seed)
        operation: Callable[[random.Random, Gateway], None] = getattr(self, f"do_{name}")
        operation(rng, rng.choice(self.gateways))

    def do_publish(self, rng: random.Random, gateway: Gateway) -> None:
        self.publish(rng)

    def do_message(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.is_subscription_due:
            gateway.take_subscription()
        elif gateway.is_confirmation_due:
            gateway.confirm()
        elif gateway.messages:
            gateway.receive_message()

    def do_execute(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.has_requests:
            gateway.execute(rng)

    def do_reply(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.replies:
            gateway.receive_reply(rng.randrange(len(gateway.replies)))

    def do_work(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.has_requests:
            gateway.execute(rng)
            gateway.receive_reply(len(gateway.replies) - 1)

    def do_drain(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.connections:
            rng.choice(gateway.connections).drain(rng.choice((1, 1, 2, 4, 100)))
            gateway.perform()

    def do_connect(self, rng: random.Random, gateway: Gateway) -> None:
        away = [client for client in self.clients if client.connection is None]
        if away and (rng.random() < 0.7 or len(self.clients) > 5):
            self.connect(rng.choice(away), gateway)
        elif len(self.clients) <= 5:
            since = rng.choice(("active", "active", "0", "now"))
            self.connect(self.new_client(since), gateway)

    def do_close(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.connections:
            connection = rng.choice(gateway.connections)
            connection.drain(rng.choice((0, 0, 1, 2)))
            gateway.perform()
            connection.close()

    def do_heartbeat(self, rng: random.Random, gateway: Gateway) -> None:
        for connection in gateway.connections:
            connection.heartbeat()

    def do_audit(self, rng: random.Random, gateway: Gateway) -> None:
        gateway.audit()

    def do_drop(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.messages:
            self.needs_audit = True
            del gateway.messages[rng.randrange(len(gateway.messages))]

    def do_lose(self, rng: random.Random, gateway: Gateway) -> None:
        if gateway.is_loss_due:
            gateway.notice_loss()
            gateway.subscribe()
        elif gateway.is_subscribed:
            gateway.disconnect()

    def do_trim(self, rng: random.Random, gateway: Gateway) -> None:
        self.trim(rng.choice((1, 2, 4)))

    def do_expire(self, rng: random.Random, gateway: Gateway) -> None:
        self.expire(rng)

    def do_copy(self, rng: random.Random, gateway: Gateway) -> None:
        self.copies.append(self.store.copy())
        del self.copies[:-3]

    def do_fail_over(self, rng: random.Random, gateway: Gateway) -> None:
        self.fail_over(rng)

    def do_rewind(self, rng: random.Random, gateway: Gateway) -> None:
        self.rewind_unnoticed(rng)

    def do_lose_key(self, rng: random.Random, gateway: Gateway) -> None:
        self.lose_key(rng)

    def do_restart_gateway(self, rng: random.Random, gateway: Gateway) -> None:
        for connection in list(gateway.connections):
            connection.close()
        gateway.begin()

    # Quiescence.

    def settle(self) -> None:
        """Let everything under way arrive, in order, until nothing moves."""
        limit = self.replies + REPLIES_UNTIL_SETTLED
        is_moving = True
        while is_moving:
            is_moving = False
            for gateway in self.gateways:
                if gateway.is_loss_due:
                    gateway.notice_loss()
                    gateway.subscribe()
                if gateway.is_subscription_due:
                    gateway.take_subscription()
                if gateway.is_confirmation_due:
                    gateway.confirm()
                while gateway.messages:
                    gateway.receive_message()
                while gateway.has_requests or gateway.replies:
                    is_moving = True
                    require(self.replies < limit, "the machine does not come to rest")
                    if gateway.has_requests:
                        gateway.execute()
                    if gateway.replies:
                        gateway.receive_reply(0)
                for connection in list(gateway.connections):
                    if connection.frames:
                        is_moving = True
                        connection.drain(len(connection.frames))
                        gateway.perform()

    def quiesce(self) -> None:
        """Stop all faults: everybody comes back, everything arrives. Then check everything."""
        for client in self.clients:
            if client.connection is None:
                self.connect(client, self.gateways[0])
        self.settle()
        if self.needs_audit:
            for gateway in self.gateways:
                gateway.audit()
            self.settle()
        self.needs_audit = False
        for gateway in self.gateways:
            self._check_gateway(gateway)
        for client in self.clients:
            self.check_client(client)

    def _check_gateway(self, gateway: Gateway) -> None:
        feed, store = gateway.feed, self.store
        if not gateway.connections:
            return
        require(feed.state is FeedState.LIVE, f"a feed rests in {feed.state}")
        require(
            (feed.epoch, feed.head) == (store.epoch, store.offset),
            f"a feed rests at {feed.epoch}:{feed.head}, Redis has {store.epoch}:{store.offset}",
        )
        for connection in gateway.connections:
            cursor = connection.cursor
            require(
                cursor.state is CursorState.LIVE,
                f"{connection.client.name} rests in {cursor.state}",
            )
            require(
                cursor.position == (store.epoch, store.offset),
                f"{connection.client.name} rests at {cursor.position}",
            )

    def check_client(self, client: Client) -> None:
        store = self.store
        for offset, event_id in client.events.items():
            require(
                store.events.get(offset) == event_id,
                f"{client.name} keeps event {event_id} at {offset}, which Redis has lost",
            )
        ended = {store.terminals[offset] for offset in client.events if offset in store.terminals}
        for offset, event_id in store.events.items():
            if offset <= client.owed or offset in client.events:
                continue
            if event_id in self.lost_events:
                require(client.resets > 0, f"{client.name} was not told that {offset} is lost")
                continue
            raise Violation(f"{client.name} has not got event {event_id} at {offset}")
        for name, pieces in store.streamed.items():
            self._check_text(client, name, pieces, ended)
        for name in client.texts:
            require(name in store.streamed, f"{client.name} keeps text {name}, which is lost")

    def _check_text(
        self, client: Client, name: str, pieces: list[tuple[int, str]], ended: set[str]
    ) -> None:
        store = self.store
        run_id, attempt, _ = name.split(":")
        run = store.runs[run_id]
        whole = "".join(piece for _, piece in pieces)
        has = client.texts.get(name, {})
        for index, char in has.items():
            require(
                index < len(whole) and whole[index] == char,
                f"{client.name} has another text {name} at {index}",
            )
        is_superseded = run.attempt != int(attempt) or (run.is_completed and run_id in ended)
        text = store.texts[name]
        if is_superseded or name in self.lost_texts or text.last <= client.owed:
            return
        if run.result_offset is not None and run.result_offset <= store.floor:
            return
        start = 0
        if client.is_now:
            start = sum(len(piece) for offset, piece in pieces if offset <= client.began_at)
        missing = [index for index in range(start, len(whole)) if index not in has]
        require(not missing, f"{client.name} lacks {len(missing)} of {len(whole)} of {name}")


# --- Histories ---

BASE_WEIGHTS = {
    "publish": 30,
    "message": 26,
    "execute": 10,
    "reply": 10,
    "work": 16,
    "drain": 16,
    "connect": 8,
    "close": 3,
    "heartbeat": 3,
    "audit": 2,
}
FAULT_WEIGHTS = {
    "drop": 5,
    "lose": 5,
    "trim": 5,
    "expire": 3,
    "copy": 3,
    "fail_over": 2,
    "rewind": 1,
    "lose_key": 2,
    "restart_gateway": 1,
}

History = list[tuple[str, int]]


Focus = Mapping[str, float]


def random_history(seed: int, length: int = 90, focus: Focus | None = None) -> History:
    """Give a history with a random choice of faults, so that rare ones meet often enough.

    Args:
        seed: Decides everything.
        length: Number of operations.
        focus: Weights of operations that matter for what is searched; their faults always occur.
    """
    rng = random.Random(seed)
    faults = {name: weight for name, weight in FAULT_WEIGHTS.items() if rng.random() < 0.45}
    weights: dict[str, float] = dict(BASE_WEIGHTS | faults)
    for name in BASE_WEIGHTS:
        weights[name] *= rng.choice((0.1, 0.3, 1, 1, 2))
    weights |= focus or {}
    if "fail_over" in weights or "rewind" in weights:
        weights.setdefault("copy", FAULT_WEIGHTS["copy"])
    names = rng.choices(list(weights), list(weights.values()), k=length)
    return [(name, rng.getrandbits(32)) for name in names]


def replay(history: History, *, gateways: int = 2) -> World:
    """Run a history and let it come to rest.

    Raises:
        Violation: A promise was broken.
    """
    with small_parts():
        world = World(gateways=gateways)
        for name, seed in history:
            world.step(name, seed)
        world.quiesce()
    return world


def failure_of(history: History) -> str | None:
    """Say what a history breaks; None if nothing."""
    try:
        replay(history)
    except Violation as violation:
        return str(violation)
    except Exception as error:  # noqa: BLE001 -- a defect of the machine is a finding, too
        return f"{type(error).__name__}: {error}"
    return None


def shorten(history: History) -> History:
    """Leave out operations for as long as something still breaks."""
    size = len(history) // 2
    while size:
        start = 0
        while start < len(history):
            shorter = history[:start] + history[start + size :]
            if failure_of(shorter) is not None:
                history = shorter
            else:
                start += size
        size //= 2
    return history


def search(seeds: range, length: int = 90, focus: Focus | None = None) -> tuple[int, str] | None:
    """Give the first seed whose history breaks something, and what it breaks."""
    for seed in seeds:
        failure = failure_of(random_history(seed, length, focus))
        if failure is not None:
            return seed, failure
    return None


def describe(history: History) -> str:
    """Give a failing history in its shortest form, fit for a failure message."""
    history = shorten(history)
    steps = "\n".join(f"    ({name!r}, {number})," for name, number in history)
    return f"{failure_of(history)}\n[\n{steps}\n]"


def main() -> None:
    """Search many histories: ``python -m tests.unit.relay.delivery_model FIRST COUNT LENGTH``."""
    first, count, length = (int(text) for text in sys.argv[1:4])
    found = search(range(first, first + count), length)
    if found is None:
        print(f"{count} histories of {length} operations, nothing broken")
    else:
        print(f"seed {found[0]}: {describe(random_history(found[0], length))}")


if __name__ == "__main__":
    main()
