"""What the Python client makes of frames: position, order, parts, holes, resets."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.client.state import (
    ClientState,
    Complaint,
    Connected,
    Degraded,
    Event,
    Reply,
    Reset,
    SequenceHole,
    TokenExpiring,
    Update,
)
from relay.errors import DecodingFailed


def receive(state: ClientState, **frame: Any) -> list[Update | Reply]:
    return state.receive(json.dumps(frame))


def established(position: str = "e:0", **fields: Any) -> dict[str, Any]:
    return {
        "type": "connection_established",
        "connection_id": "con_1",
        "user_id": "alice",
        "node": "gw-1",
        "position": position,
        "recovered": True,
        "runs": [],
        "heartbeat_ms": 15_000,
        **fields,
    }


def event(
    offset: int, seq: int | None = None, kind: str = "custom", run_id: str = "r1"
) -> dict[str, Any]:
    frame: dict[str, Any] = {
        "type": kind,
        "offset": offset,
        "run_id": run_id,
        "data": {"n": offset},
    }
    return frame | ({"seq": seq} if seq is not None else {})


def connected(position: str = "e:0") -> ClientState:
    state = ClientState()
    receive(state, **established(position))
    return state


def offsets(updates: list[Update | Reply]) -> list[int]:
    return [update.offset for update in updates if isinstance(update, Event)]


# --- Position ---


def test_begins_where_it_is_told_to() -> None:
    assert ClientState().since == "active"
    assert ClientState("now").since == "now"


def test_resumes_after_the_last_event() -> None:
    state = connected("e:4")
    assert state.since == "e:4"
    receive(state, **event(5))
    assert state.since == state.position == "e:5"


def test_what_is_established_is_told_and_kept() -> None:
    state = ClientState()
    [update] = receive(state, **established("e:7", runs=[{"run_id": "r1"}], heartbeat_ms=100))
    assert isinstance(update, Connected)
    assert update.position == "e:7"
    assert update.node == "gw-1"
    assert update.runs == [{"run_id": "r1"}]
    assert state.heartbeat_ms == 100


def test_agents_are_told_and_may_be_absent() -> None:
    [update] = receive(ClientState(), **established(agents=[{"name": "a", "description": ""}]))
    assert isinstance(update, Connected)
    assert update.agents == [{"name": "a", "description": ""}]
    [update] = receive(ClientState(), **established())
    assert isinstance(update, Connected)
    assert update.agents == ()


def test_heartbeat_moves_the_position_forward_only() -> None:
    state = connected("e:4")
    receive(state, type="heartbeat", position="e:9")
    assert state.since == "e:9"
    receive(state, type="heartbeat", position="e:3")
    assert state.since == "e:9"


def test_heartbeat_of_another_epoch_renames_the_position() -> None:
    state = connected("e:90")
    assert receive(state, type="heartbeat", position="f:2") == []
    assert state.since == "f:2"
    assert offsets(receive(state, **event(3))) == [3]


def test_event_that_was_seen_is_ignored() -> None:
    state = connected("e:4")
    assert offsets(receive(state, **event(5, 1))) == [5]
    assert receive(state, **event(5, 1)) == []
    assert receive(state, **event(4, 1)) == []


def test_gaps_in_offsets_are_no_loss() -> None:
    state = connected()
    assert offsets(receive(state, **event(5, 1))) == [5]
    assert receive(state, **event(50, 2)) == [
        update for update in receive(connected(), **event(50, 2)) if isinstance(update, Event)
    ]


def test_event_before_the_connection_is_established_is_a_broken_gateway() -> None:
    with pytest.raises(DecodingFailed, match="before connection_established"):
        receive(ClientState(), **event(1))


# --- Completeness ---


def test_hole_in_a_runs_events_is_told_before_the_event() -> None:
    state = connected()
    receive(state, **event(1, 1))
    hole, late = receive(state, **event(4, 4))
    assert hole == SequenceHole("r1", expected=2, seen=4)
    assert isinstance(late, Event)
    assert offsets(receive(state, **event(5, 5))) == [5]


def test_run_may_be_joined_in_the_middle() -> None:
    assert len(receive(connected("e:40"), **event(41, 17))) == 1


def test_runs_are_counted_apart_and_text_is_not() -> None:
    state = connected()
    receive(state, **event(1, 1, run_id="r1"))
    receive(state, **event(2, 1, run_id="r2"))
    receive(state, **event(3, None, kind="text_delta"))
    assert len(receive(state, **event(4, 2, run_id="r1"))) == 1
    assert len(receive(state, **event(5, 2, run_id="r2"))) == 1


def test_count_goes_on_over_a_reconnect() -> None:
    state = connected()
    receive(state, **event(1, 1))
    state.opening()
    receive(state, **established("e:1"))
    [hole, _] = receive(state, **event(3, 3))
    assert isinstance(hole, SequenceHole)


def test_reset_begins_anew() -> None:
    state = connected("e:9")
    receive(state, **event(10, 5))
    [reset] = receive(state, type="reset", position="f:2", reason="trimmed", runs=[])
    assert reset == Reset("f:2", "trimmed", [])
    assert state.since == "f:2"
    assert len(receive(state, **event(3, 9))) == 1


def test_nothing_is_remembered_of_ended_runs() -> None:
    state = connected()
    for number in range(1, 2_001):
        receive(state, **event(number, 1, kind="agent_completed", run_id=f"r{number}"))
    assert not state._next_seq


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    lost=st.sets(st.integers(0, 30)),
)
def test_every_lost_event_before_a_seen_one_is_noticed(
    lengths: list[int], order: Any, lost: set[int]
) -> None:
    """Whatever is dropped on the way: a run's later event tells of it, or there is none later."""
    runs = [
        [(f"r{run}", seq) for seq in range(1, length + 1)] for run, length in enumerate(lengths)
    ]
    sent = []
    while any(runs):
        sent.append(order.choice([run for run in runs if run]).pop(0))
    state = connected()
    seen: dict[str, list[int]] = {}
    holes: set[str] = set()
    for offset, (run_id, seq) in enumerate(sent, 1):
        if offset in lost:
            continue
        for update in receive(state, **event(offset, seq, run_id=run_id)):
            if isinstance(update, SequenceHole):
                holes.add(update.run_id)
        seen.setdefault(run_id, []).append(seq)
    for run_id, seqs in seen.items():
        has_hole = seqs != list(range(seqs[0], seqs[-1] + 1))
        assert (run_id in holes) == has_hole


# --- Parts ---


def parts(frame: dict[str, Any], count: int) -> list[dict[str, Any]]:
    text = json.dumps(frame)
    size = -(-len(text) // count)
    return [
        {
            "type": "event_part",
            "offset": frame["offset"],
            "index": index,
            "total": count,
            "text": text[index * size : (index + 1) * size],
        }
        for index in range(count)
    ]


def test_parts_become_one_event() -> None:
    state = connected()
    first, second, third = parts(event(1, 1), 3)
    assert receive(state, **first) == []
    assert receive(state, **second) == []
    assert state.since == "e:0"
    assert receive(state, type="heartbeat", position="e:0") == []
    [whole] = receive(state, **third)
    assert isinstance(whole, Event)
    assert whole.data == {"n": 1}
    assert state.since == "e:1"


def test_parts_of_a_lost_connection_are_forgotten() -> None:
    state = connected()
    first, second = parts(event(1, 1), 2)
    receive(state, **first)
    state.opening()
    receive(state, **established("e:0"))
    assert receive(state, **second) == []
    assert offsets(receive(state, **first)) == [1]


def test_parts_that_begin_anew_are_of_the_new_event() -> None:
    state = connected()
    old, new = parts(event(1, 1), 3), parts(event(1, 1, run_id="r2"), 2)
    for frame in old[:2]:
        receive(state, **frame)
    receive(state, type="heartbeat", position="f:0")
    assert receive(state, **new[0]) == []
    [whole] = receive(state, **new[1])
    assert isinstance(whole, Event)
    assert whole.run_id == "r2"


def test_until_the_reset_has_come_the_old_position_is_asked_for() -> None:
    state = connected("e:7")
    receive(state, **established("f:2", recovered=False))
    assert state.since == "e:7"
    receive(state, type="reset", position="f:2", reason="history_rewound", runs=[])
    assert state.since == "f:2"


def test_part_beyond_its_total_is_a_broken_gateway() -> None:
    frame = parts(event(1), 2)[1] | {"index": 2}
    with pytest.raises(DecodingFailed, match="event_part"):
        receive(connected(), **frame)


# --- Other frames ---


@pytest.mark.parametrize(
    ("frame", "update"),
    [
        ({"type": "degraded", "reason": "Redis"}, Degraded("Redis")),
        ({"type": "degraded", "ended": True}, Degraded(None)),
        ({"type": "token_expiring", "expires_at": "t"}, TokenExpiring("t")),
        (
            {"type": "error", "code": "invalid_json", "message": "No.", "retryable": False},
            Complaint("invalid_json", "No."),
        ),
    ],
)
def test_frames_become_updates(frame: dict[str, Any], update: Update) -> None:
    assert receive(connected(), **frame) == [update]


@pytest.mark.parametrize("kind", ["ack", "error"])
def test_answers_carry_their_request(kind: str) -> None:
    frame = {"type": kind, "id": "m1", "code": "x"}
    assert receive(connected(), **frame) == [Reply("m1", frame)]


def test_pong_answers_and_moves_the_position() -> None:
    state = connected("e:4")
    [reply] = receive(state, type="pong", id="p", position="e:6")
    assert isinstance(reply, Reply)
    assert state.since == "e:6"


def test_frames_of_a_newer_gateway_are_ignored() -> None:
    assert receive(connected(), type="from_the_future", x=1) == []


def test_event_types_of_a_newer_gateway_are_delivered() -> None:
    [update] = receive(connected(), **event(1, 1, kind="from_the_future"))
    assert isinstance(update, Event)
    assert not update.is_terminal


def test_reconnect_is_remembered_until_the_next_connection() -> None:
    state = connected()
    receive(state, type="reconnect", after_ms=120, reason="drain")
    assert state.reconnect_after_ms == 120
    state.opening()
    assert state.reconnect_after_ms is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "{}",
        '{"type": 1}',
        '{"type": "heartbeat"}',
        '{"type": "ack"}',
        '{"type": "heartbeat", "position": "nonsense"}',
        '{"type": "x", "offset": "y"}',
    ],
)
def test_broken_frames_are_named(text: str) -> None:
    with pytest.raises(DecodingFailed):
        connected().receive(text)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with contextlib.suppress(DecodingFailed):
        connected().receive(raw)
