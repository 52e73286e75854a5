"""The wheel: nobody early, nobody forgotten, nobody twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wheel import TICK_MS, Wheel

NOW = 50_000


def test_item_comes_once_and_not_early() -> None:
    wheel: Wheel[str] = Wheel(NOW)
    wheel.schedule("a", NOW + 250)
    assert wheel.turn(NOW + 249) == []
    assert wheel.turn(NOW + 300) == ["a"]
    assert wheel.turn(NOW + 10_000) == []
    assert len(wheel) == 0


def test_rescheduling_replaces_the_time() -> None:
    wheel: Wheel[str] = Wheel(NOW)
    wheel.schedule("a", NOW + 100)
    wheel.schedule("a", NOW + 500)
    assert wheel.turn(NOW + 400) == []
    assert wheel.turn(NOW + 500) == ["a"]


def test_removed_item_leaves_no_residue() -> None:
    wheel: Wheel[str] = Wheel(NOW)
    wheel.schedule("a", NOW + 100)
    wheel.remove("a")
    wheel.remove("a")
    assert wheel.turn(NOW + 1_000) == []
    assert not wheel._slots
    assert not wheel._slot_of


def test_time_that_has_passed_is_due_at_the_next_turn() -> None:
    wheel: Wheel[str] = Wheel(NOW)
    wheel.schedule("a", NOW - 5_000)
    assert wheel.turn(NOW + TICK_MS) == ["a"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 900)), max_size=40))
def test_everything_comes_exactly_once_at_its_time(steps: list[tuple[int, int]]) -> None:
    wheel: Wheel[int] = Wheel(NOW)
    now, due_at, seen = NOW, {}, []
    for item, (delay, pause) in enumerate(steps):
        wheel.schedule(item, now + delay)
        due_at[item] = now + delay
        now += pause
        for found in wheel.turn(now):
            assert due_at[found] <= now
            seen.append(found)
        late = [i for i, due in due_at.items() if due <= now - 2 * TICK_MS and i not in seen]
        assert not late
    seen += wheel.turn(now + 10_000)
    assert sorted(seen) == list(due_at)
