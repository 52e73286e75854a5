"""The outbox: bounded, with two marks, and a sense of progress."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.outbox import NO_PROGRESS_LIMIT_MS, Backlog, Outbox

NOW = 1_000_000


def test_frames_leave_in_order_and_together() -> None:
    outbox = Outbox(1_000)
    assert outbox.add(b"a", NOW)
    assert not outbox.add(b"b", NOW)
    assert outbox.take() == [b"a", b"b"]
    assert outbox.take() == []
    assert outbox.size_bytes == 2
    assert outbox.add(b"c", NOW)


def test_room_ends_at_the_budget_and_returns_at_half_of_it() -> None:
    outbox = Outbox(100)
    outbox.add(b"x" * 60, NOW)
    assert outbox.has_room
    outbox.add(b"x" * 40, NOW)
    assert not outbox.has_room
    outbox.take()
    assert not outbox.written(40, NOW)
    assert not outbox.has_room
    assert outbox.written(20, NOW)
    assert outbox.has_room
    assert not outbox.written(40, NOW)
    assert outbox.is_empty


def test_one_frame_above_the_budget_is_taken_alone() -> None:
    outbox = Outbox(100)
    assert outbox.has_room
    outbox.add(b"x" * 500, NOW)
    assert not outbox.has_room


def test_nothing_waiting_is_never_stuck() -> None:
    outbox = Outbox(100)
    assert outbox.stuck_at_ms is None
    assert not outbox.is_stuck(NOW + 10 * NO_PROGRESS_LIMIT_MS)
    outbox.add(b"x", NOW)
    assert not outbox.is_stuck(NOW + NO_PROGRESS_LIMIT_MS - 1)
    assert outbox.is_stuck(NOW + NO_PROGRESS_LIMIT_MS)


def test_any_progress_starts_the_clock_again_and_more_frames_do_not() -> None:
    outbox = Outbox(100)
    outbox.add(b"xx", NOW)
    outbox.take()
    outbox.written(1, NOW + 50_000)
    outbox.add(b"y", NOW + 80_000)
    assert outbox.stuck_at_ms == NOW + 50_000 + NO_PROGRESS_LIMIT_MS
    assert not outbox.is_stuck(NOW + 80_000)
    assert outbox.is_stuck(NOW + 110_000)


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 500))
def test_bound_is_the_budget_and_one_frame(sizes: list[int], budget: int) -> None:
    outbox, wakes, sent = Outbox(budget), 0, 0
    for size in sizes:
        if outbox.has_room:
            before = outbox.size_bytes
            assert before < budget
            outbox.add(b"x" * size, NOW)
            assert outbox.size_bytes <= budget + size
        else:
            frame_sizes = [len(frame) for frame in outbox.take()] or [outbox.size_bytes]
            for part in frame_sizes:
                wakes += outbox.written(part, NOW)
                sent += part
            assert outbox.has_room
    assert outbox.size_bytes >= 0


def test_backlog_that_shrinks_is_progress_and_one_that_only_grows_is_not() -> None:
    backlog = Backlog(1_000, NOW)
    backlog.add(500)
    backlog.look(1_500, NOW + 30_000)
    assert backlog.stuck_at_ms == NOW + NO_PROGRESS_LIMIT_MS
    assert not backlog.is_stuck(NOW + NO_PROGRESS_LIMIT_MS - 1)
    # More than at first, and yet something was taken.
    backlog.look(1_499, NOW + 40_000)
    assert not backlog.is_stuck(NOW + NO_PROGRESS_LIMIT_MS)
    assert backlog.stuck_at_ms == NOW + 40_000 + NO_PROGRESS_LIMIT_MS
    backlog.look(1_499, NOW + 90_000)
    assert backlog.is_stuck(NOW + 100_000)
