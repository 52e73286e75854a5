"""What a read of a channel's history gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relay.codec import Position, Publication
from relay.events import Kind

HEADER_ONLY = 2**53
"""Reading after this offset gives the channel's state and no publications."""


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


class LargeText(Publication):
    """A message's text that was not read along: its bytes are fetched piece by piece.

    A text only grows, so its bytes up to ``size_bytes`` stay what they were when it was announced.

    Attributes:
        name: ``run:attempt:message``.
        start_bytes: What the reader has already.
        start_chars: The same in characters.
        opening: The event's bytes up to the first character of the text.
        closing: Those behind its last.
    """

    __slots__ = ("closing", "name", "opening", "start_bytes", "start_chars")

    def __init__(
        self,
        offset: int,
        run_id: str,
        name: str,
        *,
        start: TextMark,
        size_bytes: int,
        opening: bytes,
        closing: bytes,
    ) -> None:
        super().__init__(offset, 0, Kind.TEXT, run_id, b"", size_bytes)
        self.name = name
        self.start_bytes = start.size_bytes
        self.start_chars = start.chars
        self.opening = opening
        self.closing = closing


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
