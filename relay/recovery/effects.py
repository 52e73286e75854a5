"""What the delivery machine asks of its shell, and what it needs to be given."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal, Protocol

from relay.codec import Position, Publication
from relay.recovery.pages import HEADER_ONLY, ActiveRun, Page, TextMark

Since = Position | Literal["active", "now", "0"]

NOTHING_KNOWN: Mapping[str, TextMark] = {}


class FeedState(Enum):
    """How far a feed can be trusted."""

    SUBSCRIBING = auto()
    SYNCING = auto()
    LIVE = auto()


ResetReason = Literal["history_trimmed", "history_rewound", "unknown_epoch", "event_lost"]
"""Why a client has to start over; ``docs/protocol.md`` says what each means."""


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

    def write_all(self, publications: Sequence[Publication]) -> None:
        """Queue the events of a page."""

    def write_part(self, frame: bytes, is_last: bool) -> None:
        """Queue a part of a large event, ``is_last`` where it is complete with it."""

    def reset(self, position: Position, reason: ResetReason, runs: Sequence[ActiveRun]) -> None:
        """Tell the client to drop its state of runs; what follows is what is known now."""

    def reposition(self, position: Position) -> None:
        """Tell the client its position in a new epoch; nothing was lost."""


class Requester(Protocol):
    """Who asks, and may meanwhile have lost interest."""

    @property
    def generation(self) -> int:
        """Answers to what an earlier one asked for are dropped (rule 9)."""


class PageReader(Requester, Protocol):
    """Who asks for a page."""

    def receive_page(self, read: Read, page: Page) -> None:
        """Take the answer."""


class BodyReader(Requester, Protocol):
    """Who asks for a piece of a body."""

    def receive_body(self, fetch: FetchBody, piece: bytes) -> None:
        """Take the answer."""


class EpochHolder(Requester, Protocol):
    """Who asks for a new epoch."""

    def receive_rotated(self, rotate: Rotate) -> None:
        """Take the answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Read a page of the channel and give it to ``requester.receive_page``.

    Attributes:
        epoch: The epoch that the rest counts in. In another one a text of the same name may be
            another text: what was ``known`` of it then counts for nothing.
        known: How much of which texts the reader has already.
        seen: Redis had shown this offset before the read was made.
    """

    requester: PageReader
    generation: int
    epoch: str
    after: int
    with_runs: bool = False
    known: Mapping[str, TextMark] = field(default_factory=lambda: NOTHING_KNOWN)
    seen: int = 0

    @property
    def is_awaited(self) -> bool:
        """Whether an answer would still be used."""
        return self.generation == self.requester.generation

    @property
    def question(self) -> Hashable:
        """Equal for reads that one answer serves; None where it serves nobody else."""
        return None if self.known else (self.after, self.with_runs)

    @property
    def is_header_only(self) -> bool:
        """Whether any page of the channel would do."""
        return self.after == HEADER_ONLY


@dataclass(frozen=True, slots=True, eq=False)
class Rotate:
    """Begin a new epoch if ``epoch`` is still in force; then ``feed.receive_rotated``."""

    feed: EpochHolder
    generation: int
    epoch: str

    @property
    def is_awaited(self) -> bool:
        """Whether an answer would still be used."""
        return self.generation == self.feed.generation

    @property
    def question(self) -> Hashable:
        """Equal for requests that one answer serves."""
        return ("rotate", self.epoch)


@dataclass(frozen=True, slots=True, eq=False)
class FetchBody:
    """Read bytes of a large event or text and give them to ``cursor.receive_body``.

    Only while ``epoch`` is in force and the body has this size, a text at least this size;
    otherwise the answer is empty. In another epoch, or left over from a lost channel, another
    event's body may have this offset.

    Attributes:
        text: Name of the text; empty for the body of the event at ``offset``.
    """

    cursor: BodyReader
    generation: int
    epoch: str
    offset: int
    size_bytes: int
    start: int
    length: int
    text: str = ""

    @property
    def is_awaited(self) -> bool:
        """Whether an answer would still be used."""
        return self.generation == self.cursor.generation

    @property
    def question(self) -> Hashable:
        """Equal for requests that one answer serves."""
        return (
            self.epoch,
            self.text or self.offset,
            self.size_bytes,
            self.start,
            self.length,
        )


class Advancing(Protocol):
    """Who can go on."""

    def advance(self) -> None:
        """Go on where this is possible."""

    def close(self) -> None:
        """Take no further part."""


@dataclass(frozen=True, slots=True, eq=False)
class Advance:
    """Call ``feed.let_advance`` for this cursor once the machine's current step is over."""

    cursor: Advancing


@dataclass(frozen=True, slots=True, eq=False)
class Broken:
    """A sink failed. Its cursor is closed; the client must be sent away, to resume elsewhere."""

    cursor: Advancing
    sink: Sink
    error: Exception


Request = Read | Rotate | FetchBody
"""What Redis has to answer."""

Effect = Request | Advance | Broken
