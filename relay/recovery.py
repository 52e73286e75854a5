"""Delivery's state machine: a feed with its cursors, without clock or I/O.

A **feed** is a gateway's view of one user's channel: how far it has been read without a gap (the
head) and a short ring of recent publications. A **cursor** is one connection's place in it. A
cursor is live while it has everything up to the head: a publication is then written to it as it
comes. In every other case it catches up, by reading from the ring or from history until it meets
the head. Nothing is ever queued for a cursor that is behind, so memory is bounded, and resume,
gap repair, slow clients and large events are one code path.

Inputs are methods; what has to be read or fetched is left in ``Feed.effects`` for the shell.
Docs: docs/delivery.md; the reasons stand in ADR 0001 and ADR 0002.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal, Protocol

from relay.codec import LiveBatch, Position, Publication, encode_part, splice
from relay.events import Kind

HEADER_ONLY = 2**53
"""Reading after this offset gives the channel's state and no publications."""

PART_THRESHOLD_BYTES = 256 * 1024
"""A larger event is sent in parts, other frames between them."""

PART_BYTES = 64 * 1024

PUBLICATION_OVERHEAD_BYTES = 400
"""What a kept publication costs beside its bytes: the object, its fields, its place in the ring."""

Since = Position | Literal["active", "now", "0"]


class ActiveRun(Protocol):
    """What the machine needs to know of an active or just-ended run."""

    @property
    def first_offset(self) -> int:
        """Offset of the run's first event."""


@dataclass(frozen=True, slots=True)
class TextMark:
    """How much of a message's text a reader has after a text publication."""

    name: str
    size_bytes: int
    chars: int


@dataclass(frozen=True, slots=True)
class Page:
    """An atomic read of a channel: its state and what lies in (after, covered].

    Attributes:
        offset: The channel's last offset at the time of the read.
        floor: Highest offset that is no longer in the log.
        previous: Earlier epochs with the offset that survived each, newest first.
        covered: The page holds everything after the offset asked for, up to here.
        publications: In offset order; a text stands whole, or from its known part on, at its
            last offset.
        marks: For each text publication's offset, what a reader knows after it.
        runs: Active and just-ended runs, where they were asked for.
    """

    epoch: str
    offset: int
    floor: int
    previous: Sequence[Position]
    covered: int
    publications: Sequence[Publication] = ()
    marks: Mapping[int, TextMark] = field(default_factory=dict)
    runs: Sequence[ActiveRun] = ()


class Sink(Protocol):
    """One client connection's outbox, as a cursor sees it. All calls are synchronous."""

    @property
    def has_room(self) -> bool:
        """Whether the outbox is within its budget."""

    @property
    def is_idle(self) -> bool:
        """Whether the socket has taken everything that was written."""

    def established(self, position: Position, recovered: bool, runs: Sequence[ActiveRun]) -> None:
        """Tell the client where it stands; events follow from there."""

    def write(self, publication: Publication) -> None:
        """Queue an event for the client."""

    def write_part(self, frame: bytes) -> None:
        """Queue a part of a large event."""

    def reset(self, position: Position, reason: str, runs: Sequence[ActiveRun]) -> None:
        """Tell the client to drop its state of runs; what follows is what is known now."""

    def reposition(self, position: Position) -> None:
        """Tell the client its position in a new epoch; nothing was lost."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Read a page of the channel and give it to ``requester.receive_page``.

    Attributes:
        epoch: The epoch that the rest counts in. In another one a text of the same name may be
            another text: what was ``known`` of it then counts for nothing.
        known: How much of which texts the reader has already.
        seen: Redis had shown this offset before the read was made.
    """

    requester: Feed | Cursor
    generation: int
    epoch: str
    after: int
    with_runs: bool = False
    known: Mapping[str, TextMark] = field(default_factory=dict)
    seen: int = 0

    @property
    def is_awaited(self) -> bool:
        """Whether an answer would still be used."""
        return self.generation == self.requester.generation


@dataclass(frozen=True, slots=True, eq=False)
class Rotate:
    """Begin a new epoch if ``epoch`` is still in force; then ``feed.receive_rotated``."""

    feed: Feed
    generation: int
    epoch: str

    @property
    def is_awaited(self) -> bool:
        """Whether an answer would still be used."""
        return self.generation == self.feed.generation


@dataclass(frozen=True, slots=True, eq=False)
class FetchBody:
    """Read bytes of a large event's body and give them to ``cursor.receive_body``.

    Only while ``epoch`` is in force and the body has this size; otherwise the answer is empty. In
    another epoch, or left over from a lost channel, another event's body may have this offset.
    """

    cursor: Cursor
    generation: int
    epoch: str
    offset: int
    size_bytes: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Advance:
    """Call ``cursor.advance`` once the machine's current step is over."""

    cursor: Cursor


Effect = Read | Rotate | FetchBody | Advance


class FeedState(Enum):
    """How far a feed can be trusted."""

    SUBSCRIBING = auto()
    SYNCING = auto()
    LIVE = auto()


class Feed:
    """One user's channel as this process sees it.

    Attributes:
        epoch: The channel's epoch, None before the first read.
        head: Everything up to here was delivered to the live cursors.
        cursors: The connections, in the order in which they came.
        effects: What the shell has to do; it empties the list.
        generation: Answers to what an earlier one asked for are dropped (rule 9).
    """

    def __init__(self, *, ring_bytes: int = 64 * 1024) -> None:
        self.state = FeedState.SUBSCRIBING
        self.epoch: str | None = None
        self.head = 0
        self.cursors: dict[Cursor, None] = {}
        self.effects: list[Effect] = []
        self._ring: deque[Publication] = deque()
        self._ring_from = 0
        self._ring_bytes = 0
        self._ring_budget = ring_bytes
        # Highest offset that Redis has shown in this epoch, by a page or a live message.
        self._seen = 0
        self._again = False
        self.generation = 0
        self._is_reading = False

    def attach(self, sink: Sink, since: Since) -> Cursor:
        """Add a connection. It is established once the feed is live."""
        cursor = Cursor(self, sink, since)
        self.cursors[cursor] = None
        cursor.advance()
        return cursor

    def lose(self) -> None:
        """Pub/sub is gone: from here on messages may be missing. Head and ring stay valid."""
        self.state = FeedState.SUBSCRIBING
        self.generation += 1
        self._is_reading = False

    def confirm(self) -> None:
        """The subscription stands: read what came before it."""
        if self.state is FeedState.SUBSCRIBING:
            self.state = FeedState.SYNCING
            self.sync()

    def sync(self) -> None:
        """Read on from the head, now or as soon as the read under way is back."""
        if self.state is FeedState.SUBSCRIBING:
            return
        self.state = FeedState.SYNCING
        if self._is_reading:
            self._again = True
            return
        self._again = False
        self._is_reading = True
        after = HEADER_ONLY if self.epoch is None else self.head
        self.effects.append(self.read_after(after, self, self.generation))

    def read_after(
        self,
        after: int,
        requester: Feed | Cursor,
        generation: int,
        *,
        with_runs: bool = False,
        known: Mapping[str, TextMark] | None = None,
    ) -> Read:
        """Describe a read of what lies after an offset, in this epoch and as of now."""
        epoch = self.epoch or ""
        return Read(requester, generation, epoch, after, with_runs, known or {}, self._seen)

    def receive_live(self, batch: LiveBatch) -> None:
        """Take a live message."""
        if self.state is FeedState.SUBSCRIBING:
            return
        last = batch.publications[-1].offset if batch.publications else None
        if self.state is FeedState.SYNCING:
            # Rule 7. What arrives now only says how far the read has to get.
            if batch.epoch != self.epoch:
                self._again = True
            elif last is not None:
                self._seen = max(self._seen, last)
            return
        if batch.epoch != self.epoch:
            self.sync()
            return
        for publication in batch.publications:
            if publication.offset <= self.head:
                if self._contradicts_ring(publication):
                    self._rotate()
                    return
            elif publication.offset > self.head + 1 or publication.is_claim:
                # Rule 8: a claim is a gap. Fetching its bytes aside would let later events
                # overtake it.
                self._seen = max(self._seen, batch.publications[-1].offset)
                self.sync()
                return
            else:
                self._deliver(publication)

    def receive_page(self, read: Read, page: Page) -> None:
        """Take the answer to a read of this feed's own."""
        # Rule 9: before anything else, even before noting that no read is under way.
        if read.generation != self.generation:
            return
        self._is_reading = False
        if page.epoch != self.epoch:
            self._adopt(page)
        elif page.offset < read.seen:
            # Redis has less than it showed us before, under the same epoch.
            self._rotate()
        elif page.floor > self.head:
            self._adopt(page)
        else:
            for publication in page.publications:
                self._deliver(publication)
            self.head = max(self.head, page.covered)
            self._seen = max(self._seen, page.offset)
            self._settle()

    def receive_rotated(self, rotate: Rotate) -> None:
        """The epoch was changed, by us or by somebody else: read what is in force."""
        if rotate.generation != self.generation:
            return
        self._is_reading = False
        self.sync()

    def _settle(self) -> None:
        if self.head < self._seen or self._again:
            self.sync()
            return
        self.state = FeedState.LIVE
        for cursor in list(self.cursors):
            cursor.advance()

    def _rotate(self) -> None:
        if self.epoch is None:
            self.sync()
            return
        self.state = FeedState.SYNCING
        self.generation += 1
        self._is_reading = True
        self.effects.append(Rotate(self, self.generation, self.epoch))

    def _adopt(self, page: Page) -> None:
        """Take over another history, or one whose beginning moved past our head."""
        for cursor in self.cursors:
            cursor.hold()
        surviving: int | None = HEADER_ONLY
        if self.epoch is not None and page.epoch != self.epoch:
            surviving = surviving_offset(page.previous, self.epoch)
        is_new_epoch = page.epoch != self.epoch
        self.generation += 1
        self.epoch = page.epoch
        self.head = page.offset
        self._seen = page.offset if is_new_epoch else max(self._seen, page.offset)
        self._ring.clear()
        self._ring_bytes = 0
        self._ring_from = self.head
        for cursor in list(self.cursors):
            cursor.rebase(surviving, is_new_epoch)
        self._settle()

    def _deliver(self, publication: Publication) -> None:
        if publication.offset <= self.head:
            return
        for cursor in tuple(self.cursors):
            if cursor.state is CursorState.LIVE:
                cursor.receive(publication)
        self.head = publication.offset
        self._seen = max(self._seen, self.head)
        self._ring.append(publication)
        self._ring_bytes += _kept_bytes(publication)
        while self._ring_bytes > self._ring_budget and self._ring:
            oldest = self._ring.popleft()
            self._ring_bytes -= _kept_bytes(oldest)
            self._ring_from = oldest.offset

    def _contradicts_ring(self, publication: Publication) -> bool:
        if publication.is_claim or publication.kind == Kind.TEXT:
            return False
        return any(
            held.offset == publication.offset
            and not held.is_claim
            and held.kind != Kind.TEXT
            and held.event != publication.event
            for held in self._ring
        )

    def recent(self, after: int) -> Sequence[Publication] | None:
        """Give all publications after an offset, None where the ring does not reach back."""
        if after < self._ring_from:
            return None
        return [publication for publication in self._ring if publication.offset > after]

    def accept(self, read: Read, page: Page) -> bool:
        """Say whether a cursor may use a page that it has read; if not, read for the feed.

        The feed calls the cursors back when it is live again. A page may be older than the head,
        by what was published while it was on its way, but no older than what had been seen.
        """
        is_current = page.epoch == self.epoch and page.offset >= read.seen
        if not is_current or page.floor > self.head:
            self.sync()
            return False
        self._seen = max(self._seen, page.offset)
        return True

    def distrust(self) -> None:
        """Redis has less than a client has seen under the same epoch."""
        if self.state is not FeedState.SUBSCRIBING:
            self._rotate()


class CursorState(Enum):
    """What a cursor is doing."""

    STARTING = auto()
    BEHIND = auto()
    BODY = auto()
    LIVE = auto()
    CLOSED = auto()


class Cursor:
    """One connection's place in its user's channel. Made by ``Feed.attach``."""

    def __init__(self, feed: Feed, sink: Sink, since: Since) -> None:
        self.state = CursorState.STARTING
        self._feed = feed
        self._sink = sink
        self._since = since
        self._reset_reason: str | None = None
        self.is_established = False
        # The client's position, as it has been told. Until a reset is on its way to the client,
        # this keeps the epoch that the client counts in, which may not be the feed's any more.
        self._epoch = ""
        self._offset = 0
        self._owed = 0
        self.generation = 0
        self._is_reading = False
        # Whole: of every message the client has all text up to its offset. Not so after a page
        # that ended before the channel's offset, where a text may stand further on.
        self._is_whole = False
        self._known: dict[str, TextMark] = {}
        self._body: _Body | None = None
        # Lost bodies up to here were announced by a reset; each is announced once.
        self._lost_until = 0

    @property
    def offset(self) -> int:
        """The client has everything up to here."""
        return (
            max(self._offset, self._feed.head) if self.state is CursorState.LIVE else self._offset
        )

    @property
    def position(self) -> Position:
        """The client's position; resuming from it loses nothing."""
        return Position(self._epoch, self.offset)

    def close(self) -> None:
        """The connection is gone. Its truth is the last position that the client received."""
        self.state = CursorState.CLOSED
        self.generation += 1
        self._feed.cursors.pop(self, None)

    def advance(self) -> None:
        """Go on where this is possible: the feed is live, the outbox has room again or is empty."""
        if self._is_reading:
            return
        if self.state is CursorState.STARTING:
            if self._feed.state is FeedState.LIVE:
                self._read(HEADER_ONLY, with_runs=True)
        elif self.state is CursorState.BODY:
            self._fetch()
        elif self.state is CursorState.BEHIND and self._sink.has_room:
            self._catch_up()

    def receive(self, publication: Publication) -> None:
        """Take a live publication; called for live cursors only."""
        if publication.offset <= self._offset:
            return  # A page read after this was published has it already.
        if publication.is_claim or not self._sink.has_room:
            self._fall_behind()
        else:
            self._sink.write(publication)
            self._offset = publication.offset

    def hold(self) -> None:
        """Stop moving with the feed's head."""
        if self.state is CursorState.LIVE:
            self._offset = self.offset
            self.state = CursorState.BEHIND

    def _fall_behind(self) -> None:
        self.hold()
        # A large event needs reading even where the outbox has room.
        self._feed.effects.append(Advance(self))

    def receive_page(self, read: Read, page: Page) -> None:
        """Take the answer to a read of this cursor's own."""
        if read.generation != self.generation:
            return
        self._is_reading = False
        if not self._feed.accept(read, page):
            return  # Rule 10: the feed first.
        if self.state is CursorState.STARTING:
            self._start(page)
        elif page.floor > max(self._offset, self._owed):
            self._reset("history_trimmed")
        else:
            self._write_page(page)

    def _start(self, page: Page) -> None:
        start = self._resolve(page)
        if start is None:
            return
        self._epoch = page.epoch
        self._offset, reason = start
        self._owed = min(page.offset, max(self._offset, page.floor))
        # A client that comes back may have left after a page that was cut: only where the channel
        # has nothing further on, nothing can be missing.
        self._is_whole = self._offset >= page.offset
        self.state = CursorState.BEHIND
        if not self.is_established:
            self.is_established = True
            self._sink.established(self.position, reason is None, page.runs)
        if reason is not None:
            self._sink.reset(self.position, reason, page.runs)
        self._reset_reason = None
        self._since = "active"
        self.advance()

    def _resolve(self, page: Page) -> tuple[int, str | None] | None:
        """Give the offset to start from and why it is a reset, None to wait for the feed."""
        # Runs that began after the page was read are not in its list, and not before its offset.
        last = min(self._feed.head, page.offset)
        active = max(0, min((run.first_offset - 1 for run in page.runs), default=last))
        active = min(active, last)
        since = self._since
        if self._reset_reason is not None:
            return active, self._reset_reason
        if since == "active":
            return active, None
        if since == "now":
            return last, None
        if since == "0" or not isinstance(since, Position):
            return 0, None
        if since.epoch != page.epoch:
            surviving = surviving_offset(page.previous, since.epoch)
            if since.offset > (surviving or 0):
                return active, "unknown_epoch" if surviving is None else "history_rewound"
        elif since.offset > page.offset:
            self._feed.distrust()
            return None
        if since.offset < page.floor:
            return active, "history_trimmed"
        return since.offset, None

    def _catch_up(self) -> None:
        feed = self._feed
        if self._is_whole:
            if self._offset >= feed.head:
                self.state = CursorState.LIVE
                return
            recent = feed.recent(self._offset)
            if recent is not None:
                if self._write(recent):
                    self._offset = max(self._offset, feed.head)
                    self.state = CursorState.LIVE
                return
        self._read(self._offset, known=dict(self._known))

    def _read(
        self, after: int, *, with_runs: bool = False, known: Mapping[str, TextMark] | None = None
    ) -> None:
        self._is_reading = True
        read = self._feed.read_after(after, self, self.generation, with_runs=with_runs, known=known)
        self._feed.effects.append(read)

    def _write(self, publications: Sequence[Publication]) -> bool:
        """Write from the ring; tells whether all was written."""
        for publication in publications:
            if not self._sink.has_room:
                return False
            if publication.is_claim:
                self._begin_body(publication)
                return False
            self._sink.write(publication)
            self._offset = publication.offset
        return True

    def _write_page(self, page: Page) -> None:
        for publication in page.publications:
            if publication.offset <= self._offset:
                continue
            if publication.is_claim:
                if not publication.size_bytes:
                    if publication.offset > self._lost_until:
                        self._lost_until = publication.offset
                        self._reset("event_lost")
                        return
                    continue
                self._is_whole = False
                self._begin_body(publication)
                return
            self._sink.write(publication)
            self._offset = publication.offset
            mark = page.marks.get(publication.offset)
            if mark is not None:
                self._known[mark.name] = mark
        self._offset = max(self._offset, page.covered)
        self._is_whole = page.covered >= page.offset
        if self._is_whole:
            self._known.clear()
        self.advance()

    def _begin_body(self, publication: Publication) -> None:
        self.state = CursorState.BODY
        self._offset = max(self._offset, publication.offset - 1)
        self._body = _Body(publication)
        self._fetch()

    def _fetch(self) -> None:
        body = self._body
        if body is None or not self._has_room_for(body):
            return
        self._is_reading = True
        length = PART_BYTES if body.is_parted else body.size_bytes
        fetch = FetchBody(
            cursor=self,
            generation=self.generation,
            epoch=self._epoch,
            offset=body.publication.offset,
            size_bytes=body.size_bytes,
            start=body.received,
            length=length,
        )
        self._feed.effects.append(fetch)

    def _has_room_for(self, body: _Body) -> bool:
        # A part waits for an idle socket: on a slow line, heartbeats would come late behind as
        # many parts as the budget takes.
        return self._sink.is_idle if body.is_parted else self._sink.has_room

    def receive_body(self, fetch: FetchBody, piece: bytes) -> None:
        """Take bytes of a large event's body; empty where it or its epoch is gone."""
        if fetch.generation != self.generation:
            return
        self._is_reading = False
        body = self._body
        if body is None:
            return
        if not piece:
            # Trimmed or lost since it was announced; the next page says which.
            self._body = None
            self.state = CursorState.BEHIND
            self._is_whole = False
            self.advance()
            return
        for frame in body.receive(piece):
            self._sink.write_part(frame)
        if body.is_complete:
            publication = body.publication
            if not body.is_parted:
                self._sink.write(body.assembled())
            self._offset = publication.offset
            self._body = None
            self.state = CursorState.BEHIND
        self.advance()

    def rebase(self, surviving: int | None, is_new_epoch: bool) -> None:
        """The feed took over another history.

        Args:
            surviving: Up to here the old offsets name the same events; None if unknown.
            is_new_epoch: Whether the client has to learn a new position.
        """
        self.generation += 1
        self._is_reading = False
        self._body = None
        self._known.clear()
        self._is_whole = False
        if is_new_epoch:
            self._lost_until = 0
        if self.state is CursorState.STARTING:
            return
        self.state = CursorState.BEHIND
        if self._offset > (surviving or 0):
            # Whoever has received nothing yet cannot have lost any of it.
            self._reset("history_rewound" if surviving is not None else "unknown_epoch")
        elif is_new_epoch:
            self._epoch = self._feed.epoch or ""
            self._sink.reposition(self.position)

    def _reset(self, reason: str) -> None:
        """Start over from the active runs; the client drops what it has."""
        self.generation += 1
        self._is_reading = False
        self._body = None
        self._known.clear()
        self._reset_reason = reason
        self.state = CursorState.STARTING
        self.advance()


class _Body:
    """A large event on its way to one client."""

    def __init__(self, publication: Publication) -> None:
        self.publication = publication
        self.received = 0
        self.size_bytes = publication.size_bytes
        self.is_parted = publication.size_bytes > PART_THRESHOLD_BYTES
        self._pieces: list[bytes] = []
        self._index = 0
        self._total = -(-self.size_bytes // PART_BYTES)
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come."""
        return self.received >= self.size_bytes

    def receive(self, piece: bytes) -> list[bytes]:
        """Take the next bytes; gives the part frames that they make."""
        is_first = self.received == 0
        self.received += len(piece)
        if not self.is_parted:
            self._pieces.append(piece)
            return []
        publication = self.publication
        if is_first:
            piece = splice(piece, publication.offset, publication.seq)
        text = self._decoder.decode(piece, final=self.is_complete)
        frame = encode_part(publication.offset, self._index, self._total, text)
        self._index += 1
        return [frame]

    def assembled(self) -> Publication:
        """Give the event with its bytes."""
        publication = self.publication
        return Publication(
            publication.offset,
            publication.seq,
            publication.kind,
            publication.run_id,
            b"".join(self._pieces),
        )


def _kept_bytes(publication: Publication) -> int:
    """Give what a publication in the ring costs: its bytes are held twice, stored and framed."""
    return 2 * len(publication.event) + PUBLICATION_OVERHEAD_BYTES


def surviving_offset(previous: Sequence[Position], epoch: str) -> int | None:
    """Give up to where an earlier epoch's offsets name the same events as now.

    Epochs between then and now count too: history may have been cut more than once since.
    """
    surviving: int | None = None
    for entry in previous:
        surviving = entry.offset if surviving is None else min(surviving, entry.offset)
        if entry.epoch == epoch:
            return surviving
    return None
