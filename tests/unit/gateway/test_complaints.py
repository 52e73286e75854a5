"""What stays wrong is said from time to time, not each time."""

from __future__ import annotations

from gateway.complaints import MOST_KEPT, REPEAT_S, Complaints


def test_each_trouble_is_told_once_in_a_while() -> None:
    complaints = Complaints()
    assert complaints.is_due("alice", 0)
    assert not complaints.is_due("alice", REPEAT_S - 1)
    assert complaints.is_due("bob", REPEAT_S - 1)
    assert complaints.is_due("alice", REPEAT_S)


def test_trouble_of_everybody_is_bounded_and_old_trouble_makes_room() -> None:
    complaints = Complaints()
    told = [complaints.is_due(f"user-{number}", 0) for number in range(MOST_KEPT + 5)]
    assert told.count(True) == MOST_KEPT
    assert complaints.is_due("new", REPEAT_S)
