"""What a feed keeps of what it has delivered: little, unless somebody is behind."""

from relay.codec import Publication
from relay.events import Kind
from relay.recovery.ring import AT_REST_SHARE, PUBLICATION_OVERHEAD_BYTES, Ring

EVENT = b"x" * 100
KEPT_BYTES = 2 * len(EVENT) + PUBLICATION_OVERHEAD_BYTES
BUDGET_BYTES = 80 * KEPT_BYTES


def push(ring: Ring, first: int, last: int, *, is_awaited: bool) -> None:
    for offset in range(first, last + 1):
        ring.push(Publication(offset, 0, Kind.EVENT, "run_1", EVENT), is_awaited=is_awaited)


def kept(ring: Ring) -> list[int]:
    found = ring.after(ring.start)
    assert found is not None
    return [publication.offset for publication in found]


def test_at_rest_the_newest_is_kept_and_nothing_is_missing_before_it() -> None:
    ring = Ring(BUDGET_BYTES)
    ring.restart(6)
    for last in range(7, 20):
        push(ring, last, last, is_awaited=False)
        assert ring.start == last - 1
        assert kept(ring) == [last]


def test_at_rest_a_large_one_is_not_kept() -> None:
    ring = Ring(AT_REST_SHARE * KEPT_BYTES - 1)
    push(ring, 1, 3, is_awaited=False)
    assert ring.start == 3
    assert kept(ring) == []
    push(ring, 4, 5, is_awaited=True)
    assert ring.start == 3
    assert kept(ring) == [4, 5]


def test_who_is_behind_finds_everything_since_up_to_the_budget() -> None:
    ring = Ring(BUDGET_BYTES)
    push(ring, 1, 100, is_awaited=False)
    push(ring, 101, 160, is_awaited=True)
    found = ring.after(100)
    assert found is not None
    assert [publication.offset for publication in found] == list(range(101, 161))

    push(ring, 161, 400, is_awaited=True)

    assert ring.after(100) is None
    assert 40 <= len(kept(ring)) <= 80
    assert kept(ring)[-1] == 400


def test_what_nobody_waits_for_any_more_goes_with_the_next_one() -> None:
    ring = Ring(BUDGET_BYTES)
    push(ring, 1, 80, is_awaited=True)
    assert len(kept(ring)) == 80

    push(ring, 81, 81, is_awaited=False)

    assert ring.start == 80
    assert kept(ring) == [81]

    push(ring, 82, 160, is_awaited=True)
    assert kept(ring) == list(range(81, 161))


def test_one_publication_larger_than_all_leaves_an_empty_ring() -> None:
    ring = Ring(KEPT_BYTES)

    push(ring, 1, 1, is_awaited=False)

    assert ring.after(0) is None
    assert ring.after(1) == []
