"""One user's channel, as this process sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from relay.codec import Publication
from relay.recovery.cursor import Cursor, CursorState
from relay.recovery.effects import (
    NOTHING_KNOWN,
    Broken,
    Effect,
    FeedState,
    PageReader,
    Read,
    Rotate,
    Since,
    Sink,
)
from relay.recovery.pages import HEADER_ONLY, Page, TextMark, surviving_offset
from relay.recovery.ring import Ring

# Looked up for every event.
_LIVE: Final = FeedState.LIVE
_CURSOR_LIVE: Final = CursorState.LIVE


class Feed:
    """How far a channel has been read, what was read last, and who gets it.

    Attributes:
        epoch: The channel's epoch, None before the first read.
        head: Everything up to here was delivered to the live cursors.
        cursors: The connections, in the order in which they came; a new tuple on each change.
        effects: What the shell has to do; it empties the list.
        generation: Answers to what an earlier one asked for are dropped (rule 9).
    """

    # A gateway has one for each user: what an idle one costs decides how many it can hold.
    __slots__ = (
        "_again",
        "_is_reading",
        "_ring",
        "_seen",
        "cursors",
        "effects",
        "epoch",
        "generation",
        "head",
        "state",
    )

    def __init__(self, *, ring_bytes: int = 64 * 1024) -> None:
        self.state = FeedState.SUBSCRIBING
        self.epoch: str | None = None
        self.head = 0
        self.cursors: tuple[Cursor, ...] = ()
        self.effects: list[Effect] = []
        self.generation = 0
        self._ring = Ring(ring_bytes)
        # Highest offset that Redis has shown in this epoch, by a page or a live message.
        self._seen = 0
        self._again = False
        self._is_reading = False

    def attach(self, sink: Sink, since: Since) -> Cursor:
        """Add a connection. It is established once the feed is live."""
        cursor = Cursor(self, sink, since)
        self.cursors = (*self.cursors, cursor)
        cursor.advance()
        return cursor

    def detach(self, cursor: Cursor) -> None:
        """Deliver nothing more to a cursor."""
        self.cursors = tuple(other for other in self.cursors if other is not cursor)

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

    @property
    def can_start(self) -> bool:
        """Whether a cursor's first read, made now, misses nothing that comes live.

        A feed without a history yet takes over what its first page shows: the cursors read at the
        same time, and one answer serves both.
        """
        if self.epoch is None:
            return self.state is FeedState.SYNCING
        return self.state is FeedState.LIVE

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
        if self.epoch is not None:
            self.effects.append(self.read_after(self.head, self, self.generation))
            return
        self.effects.append(self.read_after(HEADER_ONLY, self, self.generation))
        self._let_all_advance()

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
        epoch = self.epoch or ""
        return Read(requester, generation, epoch, after, with_runs, known, self._seen)

    def receive_live(self, batch: tuple[str, Sequence[Publication]]) -> None:
        """Take a live message: its epoch, and its publications in offset order."""
        epoch, publications = batch
        if self.state is not _LIVE or epoch != self.epoch:
            self._receive_early(epoch, publications)
            return
        for publication in publications:
            if publication.offset == self.head + 1 and publication.event:
                self._deliver(publication)
            elif publication.offset > self.head:
                # Rule 8: a claim is a gap. Fetching its bytes aside would let later events
                # overtake it.
                self._seen = max(self._seen, publications[-1].offset)
                self.sync()
                return
            elif self._ring.contradicts(publication):
                self._rotate()
                return

    def _receive_early(self, epoch: str, publications: Sequence[Publication]) -> None:
        """Take a live message while it cannot be delivered."""
        if self.state is FeedState.SUBSCRIBING:
            return
        if self.state is FeedState.LIVE:
            self.sync()
        elif epoch != self.epoch:
            self._again = True
        elif publications:
            # Rule 7. What arrives now only says how far the read has to get.
            self._seen = max(self._seen, publications[-1].offset)

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
                if publication.offset > self.head:
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
        self._let_all_advance()

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
        old_epoch = self.epoch
        for cursor in self.cursors:
            cursor.hold()
        is_new_epoch = page.epoch != old_epoch
        self.generation += 1
        self.epoch = page.epoch
        self.head = page.offset
        self._seen = page.offset if is_new_epoch else max(self._seen, page.offset)
        self._ring.restart(self.head)
        if old_epoch is not None:
            surviving: int | None = HEADER_ONLY
            if is_new_epoch:
                surviving = surviving_offset(page.previous, old_epoch)
            self._rebase_all(surviving, is_new_epoch=is_new_epoch)
        # Otherwise nobody has started yet, and the cursors' first pages are under way.
        self._settle()

    def _deliver(self, publication: Publication) -> None:
        is_awaited = False
        for cursor in self.cursors:
            if cursor.state is _CURSOR_LIVE:
                try:
                    cursor.receive(publication)
                except Exception as error:  # noqa: BLE001 -- one broken connection, not all
                    self.give_up(cursor, error)
            if cursor.state is not _CURSOR_LIVE:
                is_awaited = True
        self.head = offset = publication.offset
        if offset > self._seen:
            self._seen = offset
        self._ring.push(publication, is_awaited=is_awaited)

    # --- Cursors, each on its own: what is wrong with one connection holds up no other ---

    def let_advance(self, cursor: Cursor) -> None:
        """Let a cursor go on."""
        try:
            cursor.advance()
        except Exception as error:  # noqa: BLE001 -- one broken connection, not all
            self.give_up(cursor, error)

    def give_up(self, cursor: Cursor, error: Exception) -> None:
        """Go on without a cursor whose connection failed."""
        cursor.close()
        self.effects.append(Broken(cursor, cursor.sink, error))

    def _let_all_advance(self) -> None:
        for cursor in self.cursors:
            self.let_advance(cursor)

    def _rebase_all(self, surviving: int | None, *, is_new_epoch: bool) -> None:
        for cursor in self.cursors:
            try:
                cursor.rebase(surviving, is_new_epoch)
            except Exception as error:  # noqa: BLE001 -- one broken connection, not all
                self.give_up(cursor, error)

    # --- What cursors ask of their feed ---

    def recent(self, after: int) -> Sequence[Publication] | None:
        """Give all publications after an offset, None where the ring does not reach back."""
        return self._ring.after(after)

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
