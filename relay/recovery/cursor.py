"""One connection's place in its user's channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Protocol

from relay.codec import Position, Publication
from relay.recovery.effects import (
    NOTHING_KNOWN,
    Advance,
    Effect,
    FetchBody,
    PageReader,
    Read,
    ResetReason,
    Since,
    Sink,
)
from relay.recovery.pages import HEADER_ONLY, Page, TextMark, surviving_offset
from relay.recovery.parts import Parts


class History(Protocol):
    """A feed, as its cursors see it."""

    epoch: str | None
    head: int
    effects: list[Effect]

    @property
    def can_start(self) -> bool:
        """Whether a read made now misses nothing that comes live."""

    def detach(self, cursor: Cursor) -> None:
        """Deliver nothing more to a cursor."""

    def read_after(
        self,
        after: int,
        requester: PageReader,
        generation: int,
        *,
        with_runs: bool = False,
        known: Mapping[str, TextMark] = NOTHING_KNOWN,
    ) -> Read:
        """Describe a read of what lies after an offset, in this epoch and as of now."""

    def recent(self, after: int) -> Sequence[Publication] | None:
        """Give all publications after an offset, None where the ring does not reach back."""

    def accept(self, read: Read, page: Page) -> bool:
        """Say whether a cursor may use a page that it has read; if not, read for the feed."""

    def distrust(self) -> None:
        """Redis has less than a client has seen under the same epoch."""


class CursorState(Enum):
    """What a cursor is doing."""

    STARTING = auto()
    BEHIND = auto()
    BODY = auto()
    LIVE = auto()
    CLOSED = auto()


class Cursor:
    """One connection's place in its user's channel. Made by ``Feed.attach``.

    Attributes:
        sink: The connection.
    """

    __slots__ = (
        "_body",
        "_epoch",
        "_feed",
        "_is_reading",
        "_is_whole",
        "_known",
        "_lost_until",
        "_offset",
        "_owed",
        "_reset_reason",
        "_since",
        "generation",
        "is_established",
        "sink",
        "state",
    )

    def __init__(self, feed: History, sink: Sink, since: Since) -> None:
        self.state = CursorState.STARTING
        self._feed = feed
        self.sink = sink
        self._since = since
        self._reset_reason: ResetReason | None = None
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
        self._known: Mapping[str, TextMark] = NOTHING_KNOWN
        self._body: Parts | None = None
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
        self._feed.detach(self)

    def advance(self) -> None:
        """Go on where this is possible: the feed is live, the outbox has room again or is empty."""
        if self._is_reading:
            return
        if self.state is CursorState.STARTING:
            if self._feed.can_start:
                self._read(self._first_offset(), with_runs=True)
        elif self.state is CursorState.BODY:
            self._fetch()
        elif self.state is CursorState.BEHIND and self.sink.has_room:
            self._catch_up()

    def _first_offset(self) -> int:
        """Give where a start reads from, so that it mostly needs no second page."""
        since, epoch = self._since, self._feed.epoch
        if self._reset_reason is None:
            if since == "0":
                return 0
            if isinstance(since, Position) and epoch in (None, since.epoch):
                return since.offset
        return HEADER_ONLY

    def receive(self, publication: Publication) -> None:
        """Take a live publication; called for live cursors only."""
        offset = publication.offset
        if offset <= self._offset:
            return  # A page read after this was published has it already.
        if publication.event and self.sink.has_room:
            self.sink.write(publication)
            self._offset = offset
        else:
            self._fall_behind()

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
            self._start(page, read.after)
        elif page.floor > max(self._offset, self._owed):
            self._reset("history_trimmed")
        else:
            self._write_page(page)

    def _start(self, page: Page, read_after: int) -> None:
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
            self.sink.established(self.position, reason is None, page.runs)
        if reason is not None:
            self.sink.reset(self.position, reason, page.runs)
        self._reset_reason = None
        self._since = "active"
        if reason is None and self._offset == read_after:
            self._write_page(page)
        else:
            self.advance()

    def _resolve(self, page: Page) -> tuple[int, ResetReason | None] | None:
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
        self._read(self._offset, known=self._known)

    def _read(
        self,
        after: int,
        *,
        with_runs: bool = False,
        known: Mapping[str, TextMark] = NOTHING_KNOWN,
    ) -> None:
        self._is_reading = True
        read = self._feed.read_after(after, self, self.generation, with_runs=with_runs, known=known)
        self._feed.effects.append(read)

    def _write(self, publications: Sequence[Publication]) -> bool:
        """Write from the ring; tells whether all was written."""
        for publication in publications:
            if not self.sink.has_room:
                return False
            if publication.is_claim:
                self._begin_body(publication)
                return False
            self.sink.write(publication)
            self._offset = publication.offset
        return True

    def _write_page(self, page: Page) -> None:
        ready: list[Publication] = []
        last = self._offset
        for publication in page.publications:
            if publication.offset <= last:
                continue
            if publication.event:
                ready.append(publication)
                last = publication.offset
            elif publication.size_bytes:
                self._write_ready(ready, page)
                self._is_whole = False
                self._begin_body(publication)
                return
            elif publication.offset > self._lost_until:
                self._write_ready(ready, page)
                self._lost_until = publication.offset
                self._reset("event_lost")
                return
        self._write_ready(ready, page)
        self._offset = max(self._offset, page.covered)
        self._is_whole = page.covered >= page.offset
        if self._is_whole:
            self._known = NOTHING_KNOWN
        self.advance()

    def _write_ready(self, ready: Sequence[Publication], page: Page) -> None:
        if not ready:
            return
        self.sink.write_all(ready)
        self._offset = ready[-1].offset
        if page.marks:
            for publication in ready:
                mark = page.marks.get(publication.offset)
                if mark is not None:
                    self._know(mark)

    def _know(self, mark: TextMark) -> None:
        # A read under way keeps what was known when it was made.
        self._known = {**self._known, mark.name: mark}

    def _begin_body(self, publication: Publication) -> None:
        self.state = CursorState.BODY
        self._offset = max(self._offset, publication.offset - 1)
        self._body = Parts(publication)
        self._fetch()

    def _fetch(self) -> None:
        body = self._body
        if body is None or not self._has_room_for(body):
            return
        self._is_reading = True
        fetch = FetchBody(
            cursor=self,
            generation=self.generation,
            epoch=self._epoch,
            offset=body.publication.offset,
            size_bytes=body.stored_bytes,
            start=body.start,
            length=body.length,
            text=body.text,
        )
        self._feed.effects.append(fetch)

    def _has_room_for(self, body: Parts) -> bool:
        # A part waits for an idle socket: on a slow line, heartbeats would come late behind as
        # many parts as the budget takes.
        return self.sink.is_idle if body.is_parted else self.sink.has_room

    def receive_body(self, fetch: FetchBody, piece: bytes) -> None:
        """Take bytes of a large event or text; empty where it or its epoch is gone."""
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
        frame = body.receive(piece)
        if frame is not None:
            self.sink.write_part(frame, body.is_complete)
        if body.is_complete:
            if not body.is_parted:
                self.sink.write(body.assembled())
            self._offset = body.publication.offset
            if body.mark is not None:
                self._know(body.mark)
            self._body = None
            self.state = CursorState.BEHIND
        self.advance()

    def rebase(self, surviving: int | None, is_new_epoch: bool) -> None:
        """The feed took over another history.

        Args:
            surviving: Up to here the old offsets name the same events; None if unknown.
            is_new_epoch: Whether the client has to learn a new position.
        """
        if self.state is CursorState.CLOSED:
            return
        self.generation += 1
        self._is_reading = False
        self._body = None
        self._known = NOTHING_KNOWN
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
            self.sink.reposition(self.position)

    def _reset(self, reason: ResetReason) -> None:
        """Start over from the active runs; the client drops what it has."""
        self.generation += 1
        self._is_reading = False
        self._body = None
        self._known = NOTHING_KNOWN
        self._reset_reason = reason
        self.state = CursorState.STARTING
        self.advance()
