from __future__ import annotations

from typing import Any

import msgpack
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.codec import (
    EventEncoder,
    Position,
    Publication,
    RunEnvelope,
    Task,
    decode_live,
    decode_task,
    encode_part,
    encode_task,
    parse_position,
    splice,
)
from relay.errors import DecodingFailed
from relay.events import EventType

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXTS | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=9) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(TEXTS | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)
ENVELOPE = RunEnvelope("run_1", 2, "t", "alice", "docs")


# --- Positions ---


@given(st.from_regex(r"[0-9a-zA-Z]{1,64}", fullmatch=True), st.integers(0, 10**16 - 1))
def test_positions_round_trip(epoch: str, offset: int) -> None:
    assert parse_position(str(Position(epoch, offset))) == (epoch, offset)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "e:", ":1", "e", "e:-1", "e:1.0", "e: 1", "e:1 ", "é:1", "e:\u0663", "e:1:2"),
        *("e/x:1", "e" * 65 + ":1", "e:" + "9" * 17),
    ],
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(DecodingFailed):
        parse_position(text)


@given(st.text())
def test_any_text_is_a_position_or_refused(text: str) -> None:
    try:
        position = parse_position(text)
    except DecodingFailed:
        return
    assert position.offset >= 0


# --- Frames ---


@given(st.integers(1, 2**53), st.integers(0, 2**53), VALUES, TEXTS)
def test_a_spliced_event_is_json_with_its_place(
    offset: int, seq: int, data: Any, user: str
) -> None:
    envelope = RunEnvelope("run_1", 2, "t", user, "docs")
    event = envelope.encode(EventType.CUSTOM, 1_700_000_000_123, {"name": "x", "value": data})
    frame = orjson.loads(splice(event, offset, seq))
    assert frame["offset"] == offset
    assert frame.get("seq") == (seq or None)
    assert (frame["user_id"], frame["timestamp"]) == (user, "2023-11-14T22:13:20.123Z")
    assert orjson.loads(event) == {
        name: value for name, value in frame.items() if name not in ("offset", "seq")
    }


def test_a_publications_frame_is_built_once() -> None:
    publication = Publication(3, 2, 0, "run_1", ENVELOPE.encode(EventType.AGENT_STARTED, 0, {}))
    assert publication.frame is publication.frame
    assert not publication.is_claim
    assert Publication(3, 2, 0, "run_1", b"", 70_000).is_claim


@given(TEXTS)
def test_a_part_keeps_its_text(text: str) -> None:
    part = orjson.loads(encode_part(7, 1, 3, text))
    assert part == {"type": "event_part", "offset": 7, "index": 1, "total": 3, "text": text}


# --- Live messages and tasks ---


@given(
    st.lists(
        st.tuples(st.integers(1, 2**53), st.integers(0, 99), st.integers(0, 2), TEXTS, st.binary()),
        max_size=5,
    )
)
def test_live_messages_round_trip(entries: list[tuple[int, int, int, str, bytes]]) -> None:
    batch = decode_live(msgpack.packb([1, "e1", entries, "from a newer writer"]))
    assert batch.epoch == "e1"
    assert [
        (item.offset, item.seq, item.kind, item.run_id, item.event) for item in batch.publications
    ] == entries


def accept_live(payload: bytes) -> None:
    try:
        batch = decode_live(payload)
    except DecodingFailed:
        return
    for item in batch.publications:
        assert type(item.offset) is type(item.seq) is type(item.kind) is int
        assert type(item.event) is bytes
        assert type(item.run_id) is str


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_as_live_message_and_as_task(payload: bytes) -> None:
    accept_live(payload)
    with pytest.raises(DecodingFailed):
        decode_task(payload)


@given(GARBAGE, GARBAGE)
def test_other_msgpack_is_refused_as_live_message(value: Any, entry: Any) -> None:
    for message in (
        value,
        [1, "e1", value],
        [1, "e1", [value]],
        [1, "e1", [[1, 2, 0, "r", entry]]],
    ):
        accept_live(msgpack.packb(message))


@pytest.mark.parametrize("entries", [{}, "", b"", None, {"1": []}])
def test_entries_that_are_no_list_are_refused(entries: Any) -> None:
    with pytest.raises(DecodingFailed):
        decode_live(msgpack.packb([1, "e1", entries]))


def test_another_version_is_refused() -> None:
    with pytest.raises(DecodingFailed, match="version 2"):
        decode_live(msgpack.packb([2, "e1", []]))
    with pytest.raises(DecodingFailed, match="version 2"):
        decode_task(msgpack.packb({"v": 2, "user_id": "a", "run_id": "r", "agent": "d"}))


@given(
    TEXTS.filter(bool),
    st.text("abc_", min_size=1, max_size=9),
    st.text("xyz", min_size=1, max_size=9),
)
def test_tasks_round_trip(user_id: str, run_id: str, agent: str) -> None:
    task = Task(user_id, run_id, agent)
    assert decode_task(encode_task(task)) == task


@given(GARBAGE, GARBAGE)
def test_other_msgpack_is_refused_as_task(value: Any, field: Any) -> None:
    bad = {"v": 1, "user_id": field if not isinstance(field, str) else "", "run_id": "r"}
    for message in (value, bad, {**bad, "agent": "a"}):
        with pytest.raises(DecodingFailed):
            decode_task(msgpack.packb(message))


@pytest.mark.parametrize("event_type", list(EventType))
def test_an_encoder_gives_the_bytes_of_its_envelope(event_type: EventType) -> None:
    envelope = RunEnvelope("run_1", 2, 't"h', "álice", "docs")
    encoder = EventEncoder(envelope)
    for timestamp_ms, data in ((0, {"a": '","data":null}'}), (1_700_000_000_123, {"b": [1.5]})):
        expected = envelope.encode(event_type, timestamp_ms, data)
        assert encoder.encode(event_type, timestamp_ms, data) == expected


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 10**9))
def test_the_short_way_for_text_gives_the_same_bytes(text: str, position: int) -> None:
    data = {"message_id": "m1", "position": position, "text": text}
    expected = ENVELOPE.encode(EventType.TEXT_DELTA, 1_795_000_000_123, data)
    encoder = EventEncoder(ENVELOPE)
    for _ in range(2):
        assert encoder.encode_text(1_795_000_000_123, "m1", position, text) == expected
