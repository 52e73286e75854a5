from __future__ import annotations

from typing import Any

import orjson
import pytest

from relay.testing import SequenceChecker


def established(position: str = "e1:0", *, recovered: bool = True) -> dict[str, Any]:
    return {
        "type": "connection_established",
        "position": position,
        "recovered": recovered,
        "user_id": "alice",
    }


def event(kind: str, offset: int, seq: int | None = None, **data: Any) -> dict[str, Any]:
    frame = {
        "type": kind,
        "offset": offset,
        "run_id": "r1",
        "user_id": "alice",
        "attempt": 1,
        "data": data,
    }
    return frame if seq is None else frame | {"seq": seq}


QUEUED = event("agent_queued", 1, 1, message_id="m", content="hi", metadata={})
STARTED = event("agent_started", 2, 2)
TEXT = event("text_delta", 3, message_id="m1", position=0, text="ab")
MORE = event("text_delta", 4, message_id="m1", position=2, text="c")
COMPLETED = event("agent_completed", 5, 3, result=1, duration_ms=1)
WHOLE = [QUEUED, STARTED, TEXT, MORE, COMPLETED]


def check(*frames: dict[str, Any], sees_all: bool = True) -> SequenceChecker:
    checker = SequenceChecker()
    for frame in WHOLE:
        if "seq" in frame:
            checker.published("alice", "r1", frame["type"], frame["data"])
    checker.streamed("alice", "r1", "ab")
    checker.streamed("alice", "r1", "c")
    checker.client("tab", "alice", sees_all=sees_all)
    for frame in frames:
        checker.received("tab", "alice", frame)
    return checker


def kinds(checker: SequenceChecker) -> list[str]:
    return [problem.kind for problem in checker.problems()]


def test_a_complete_run_has_no_problems() -> None:
    check(established(), *WHOLE).verify()


def test_joined_text_is_the_same_text() -> None:
    joined = event("text_delta", 4, message_id="m1", position=0, text="abc")
    check(established(), QUEUED, STARTED, TEXT, joined, COMPLETED).verify()


def test_a_lost_event_is_named_with_its_hole() -> None:
    checker = check(established(), QUEUED, TEXT, MORE, COMPLETED)
    assert set(kinds(checker)) == {"lost", "hole", "grammar"}
    with pytest.raises(AssertionError, match=r"lost: tab: agent_started of run r1"):
        checker.verify()


def test_a_lost_end_is_named() -> None:
    assert kinds(check(established(), *WHOLE[:-1])) == ["lost"]


def test_an_event_twice_is_named_also_across_reconnects() -> None:
    checker = check(established(), *WHOLE, established("e1:5"), COMPLETED)
    assert kinds(checker) == ["twice"]


def test_a_published_event_that_appears_at_two_offsets_is_named() -> None:
    again = event("agent_started", 3, 3)
    assert "twice" in kinds(check(established(), QUEUED, STARTED, again, *WHOLE[3:]))


def test_reordering_is_named() -> None:
    checker = check(established(), QUEUED, MORE, STARTED)
    assert "out_of_order" in kinds(checker)


def test_a_foreign_event_is_named() -> None:
    checker = check(established(), *WHOLE, event("custom", 6) | {"user_id": "bob"})
    assert kinds(checker) == ["foreign"]


def test_a_foreign_run_under_ones_own_name_is_named() -> None:
    checker = check(established(), *WHOLE)
    checker.published("bob", "r2", "agent_started")
    checker.received("tab", "alice", event("agent_started", 6, 2) | {"run_id": "r2"})
    assert "foreign" in kinds(checker)


def test_a_step_after_the_end_is_named() -> None:
    assert "grammar" in kinds(
        check(established(), *WHOLE, event("custom", 6, 4, name="x", value=1))
    )


def test_text_with_a_hole_and_changed_text_are_named() -> None:
    assert kinds(check(established(), QUEUED, STARTED, MORE, COMPLETED)) == ["text"]
    changed = event("text_delta", 4, message_id="m1", position=1, text="x")
    assert "text" in kinds(check(established(), QUEUED, STARTED, TEXT, changed, COMPLETED))


def test_after_a_reset_only_what_follows_counts() -> None:
    reset = {"type": "reset", "position": "e2:0", "reason": "history_rewound", "runs": []}
    check(established("e1:9"), reset, *WHOLE).verify()
    reread = check(established(), *WHOLE, reset, QUEUED, STARTED, TEXT, MORE)
    assert kinds(reread) == ["lost"]


def test_one_that_joined_later_is_held_to_what_follows() -> None:
    check(established("e1:1"), *WHOLE[1:], sees_all=False).verify()
    without_end = check(established("e1:1"), STARTED, TEXT, MORE, sees_all=False)
    assert kinds(without_end) == ["lost"]


def test_another_epoch_may_count_the_same_offsets_again() -> None:
    position = {"type": "heartbeat", "position": "e2:2"}
    check(established(), QUEUED, STARTED, position, *WHOLE[2:]).verify()
    checker = check(established(), *WHOLE, {"type": "heartbeat", "position": "e1:3"})
    assert kinds(checker) == ["protocol"]


def test_parts_are_joined() -> None:
    text = orjson.dumps(COMPLETED).decode()
    parts = [
        {"type": "event_part", "offset": 5, "index": index, "total": 2, "text": piece}
        for index, piece in enumerate((text[:20], text[20:]))
    ]
    check(established(), *WHOLE[:-1], *parts).verify()
    assert "protocol" in kinds(check(established(), *WHOLE[:-1], parts[1]))


def test_a_reloaded_page_starts_over() -> None:
    checker = check(established(), *WHOLE)
    checker.reloaded("tab")
    for frame in (established(), *WHOLE):
        checker.received("tab", "alice", frame)
    checker.verify()
