from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st
from streaming import Pace, split_pieces, stream

from tests.unit.examples.recorded_run import RecordedRun


@given(st.text())
def test_pieces_joined_are_the_text_again(text: str) -> None:
    pieces = split_pieces(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_words_stream_one_by_one_and_long_ones_are_cut() -> None:
    assert split_pieces("one two\n\nthree") == ["one ", "two\n\n", "three"]
    assert [len(piece) for piece in split_pieces("x" * 50)] == [24, 24, 2]


@given(st.integers(min_value=0, max_value=100_000))
def test_no_text_takes_longer_than_the_pace_allows(piece_count: int) -> None:
    pace = Pace(piece_ms=10, longest_ms=500)
    assert pace.delay_s(piece_count) * piece_count <= 0.5001
    assert pace.delay_s(piece_count) <= 0.01


async def test_a_text_arrives_whole_and_takes_its_time() -> None:
    run = RecordedRun("")
    started_s = time.monotonic()
    await stream(run, "a few words " * 5, Pace(piece_ms=2))
    assert run.text == "a few words " * 5
    assert len(run.deltas) == 15
    assert time.monotonic() - started_s >= 0.028
