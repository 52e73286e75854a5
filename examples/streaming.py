"""Streams a finished text piece by piece, at a pace that people can follow."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_worker import Run

# Words carry the white space behind them. Scripts without spaces, and very
# long words, are cut so that they stream as well.
_PIECE = re.compile(r"\S{1,24}\s*|\s+")


@dataclass(frozen=True, slots=True)
class Pace:
    """How quickly a text is streamed.

    Attributes:
        piece_ms: Time given to each piece; 0 streams as quickly as the relay takes it.
        longest_ms: Most time given to one text; a longer text is streamed faster.
    """

    piece_ms: float = 8.0
    longest_ms: float = 1_200.0

    def delay_s(self, piece_count: int) -> float:
        """Give the time from one piece to the next for a text of ``piece_count`` pieces."""
        if piece_count < 1:
            return 0.0
        return min(self.piece_ms, self.longest_ms / piece_count) / 1_000


def split_pieces(text: str) -> list[str]:
    """Cut ``text`` into words; joined, they are the text again, character by character."""
    return _PIECE.findall(text)


async def stream(run: Run, text: str, pace: Pace) -> None:
    """Publish ``text`` as deltas of ``run``, in pieces, at ``pace``.

    Time that publishing itself takes counts, so a slow connection is not slowed further.
    """
    pieces = split_pieces(text)
    delay_s = pace.delay_s(len(pieces))
    due_s = time.monotonic()
    for piece in pieces:
        await run.delta(piece)
        due_s += delay_s
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
