"""One large event or text on its way to one client."""

from __future__ import annotations

import codecs

import orjson

from relay.codec import Publication, encode_part, splice
from relay.keys import LARGE_TEXT_BYTES
from relay.recovery.pages import LargeText, TextMark

PART_THRESHOLD_BYTES = LARGE_TEXT_BYTES
"""A larger event or text is sent in parts, other frames between them."""

PART_BYTES = 64 * 1024


class Parts:
    """What has been received of a body, and the frames that it makes.

    Args:
        publication: A claim that says where the bytes are.

    Attributes:
        received: How many bytes have come.
        is_parted: Whether each piece is a frame of its own.
    """

    __slots__ = (
        "_chars",
        "_decoder",
        "_index",
        "_pieces",
        "_total",
        "is_parted",
        "publication",
        "received",
    )

    def __init__(self, publication: Publication) -> None:
        size_bytes = publication.size_bytes
        self.publication = publication
        self.received = 0
        self.is_parted = size_bytes > PART_THRESHOLD_BYTES or isinstance(publication, LargeText)
        self._pieces: list[bytes] = []
        self._index = 0
        self._total = -(-size_bytes // PART_BYTES)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._chars = 0

    @property
    def text(self) -> str:
        """Name of the text, empty for an event's body."""
        return self.publication.name if isinstance(self.publication, LargeText) else ""

    @property
    def start(self) -> int:
        """Where the next piece begins in what is stored."""
        publication = self.publication
        before = publication.start_bytes if isinstance(publication, LargeText) else 0
        return before + self.received

    @property
    def stored_bytes(self) -> int:
        """How large what is stored has to be."""
        return self.start - self.received + self.publication.size_bytes

    @property
    def length(self) -> int:
        """How long the next piece is at most."""
        left = self.publication.size_bytes - self.received
        return min(PART_BYTES, left) if self.is_parted else left

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come."""
        return self.received >= self.publication.size_bytes

    def receive(self, piece: bytes) -> bytes | None:
        """Take the next bytes; gives the part frame that they make, if it goes in parts."""
        is_first = self.received == 0
        self.received += len(piece)
        if not self.is_parted:
            self._pieces.append(piece)
            return None
        publication = self.publication
        if isinstance(publication, LargeText):
            text = self._receive_text(publication, piece, is_first=is_first)
        else:
            if is_first:
                piece = splice(piece, publication.offset, publication.seq)
            text = self._decoder.decode(piece, final=self.is_complete)
        frame = encode_part(publication.offset, self._index, self._total, text)
        self._index += 1
        return frame

    def _receive_text(self, publication: LargeText, piece: bytes, *, is_first: bool) -> str:
        chars = self._decoder.decode(piece, final=self.is_complete)
        self._chars += len(chars)
        # The text stands in the event as JSON writes it.
        text = orjson.dumps(chars)[1:-1].decode()
        if is_first:
            text = splice(publication.opening, publication.offset, 0).decode() + text
        if self.is_complete:
            text += publication.closing.decode()
        return text

    def assembled(self) -> Publication:
        """Give the event with its bytes, where it goes in one."""
        publication = self.publication
        return Publication(
            publication.offset,
            publication.seq,
            publication.kind,
            publication.run_id,
            b"".join(self._pieces),
        )

    @property
    def mark(self) -> TextMark | None:
        """What a reader of a text knows after its last part."""
        publication = self.publication
        if not isinstance(publication, LargeText):
            return None
        return TextMark(publication.name, self.start, publication.start_chars + self._chars)
