"""The timetable of a drain: paced, spread, and never longer than it may be."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.drain import BATCH_INTERVAL_MS, LONGEST_MS, SPREAD_MS, timetable


def test_few_connections_are_closed_at_once() -> None:
    steps = list(timetable(3))
    assert [step.at_ms for step in steps] == [0, 0, 0]
    assert [step.after_ms for step in steps] == [0, 100, 200]


def test_nothing_to_drain() -> None:
    assert list(timetable(0)) == []


def test_rate_is_bounded() -> None:
    per_batch = Counter(step.at_ms for step in timetable(5_000))
    assert max(per_batch.values()) * 1000 / BATCH_INTERVAL_MS <= 1_000
    assert max(per_batch) < 5_000


@settings(deadline=None)
@given(st.integers(0, 60_000))
def test_every_connection_has_its_turn_in_time(count: int) -> None:
    steps = list(timetable(count))
    assert len(steps) == count
    assert all(step.at_ms <= LONGEST_MS for step in steps)
    assert all(0 <= step.after_ms < SPREAD_MS for step in steps)
    assert steps == sorted(steps, key=lambda step: step.at_ms)
