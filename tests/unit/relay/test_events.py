from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import AGENT_ERRORS, InvalidEvent
from relay.events import DATA_MODELS, TERMINAL, EventType, Kind, format_timestamp, validate_data

VALID: dict[EventType, dict[str, Any]] = {
    EventType.AGENT_QUEUED: {"message_id": "m", "content": "hi", "metadata": {}},
    EventType.AGENT_STARTED: {},
    EventType.AGENT_THINKING: {"thought": "hm", "step": 1, "progress_percentage": 12.5},
    EventType.TOOL_EXECUTING: {"tool_call_id": "c", "tool_name": "search", "parameters": None},
    EventType.TOOL_COMPLETED: {
        "tool_call_id": "c",
        "tool_name": "search",
        "status": "ok",
        "result": [1],
        "duration_ms": 3,
    },
    EventType.INPUT_REQUESTED: {
        "request_id": "i",
        "prompt": "?",
        "schema": {"type": "string"},
        "expires_at": "2026-01-01T00:00:00.000Z",
        "kind": "text",
    },
    EventType.INPUT_RESOLVED: {"request_id": "i", "outcome": "answered", "by": "user"},
    EventType.AGENT_STALLED: {"idle_ms": 1, "last_event": "agent_started"},
    EventType.AGENT_RETRYING: {"attempt": 2, "reason": "again", "delay_ms": 0},
    EventType.CANCEL_REQUESTED: {"by": "user"},
    EventType.AGENT_COMPLETED: {"result": None, "duration_ms": 1},
    EventType.AGENT_ERROR: {
        "code": "agent_failed",
        "error_message": "It failed.",
        "is_recoverable": True,
        "recovery_suggestions": [],
        "support_id": "s",
    },
    EventType.AGENT_CANCELLED: {"by": "user", "duration_ms": 1},
    EventType.CUSTOM: {"name": "n", "value": None},
    EventType.TEXT_DELTA: {"message_id": "m1", "position": 0, "text": "a"},
    EventType.TOOL_PROGRESS: {"tool_call_id": "c", "progress_percentage": 100},
    EventType.NOTICE: {"severity": "info", "title": "t", "body": "b", "payload": {"any": 1}},
}


def test_every_type_has_a_model_and_an_example() -> None:
    assert set(VALID) == set(DATA_MODELS) == set(EventType)


@pytest.mark.parametrize("event_type", EventType)
def test_valid_data_pass_unchanged(event_type: EventType) -> None:
    assert validate_data(event_type, VALID[event_type]) == VALID[event_type]


@pytest.mark.parametrize("event_type", [one for one in EventType if one is not EventType.NOTICE])
def test_unknown_fields_are_refused_by_name(event_type: EventType) -> None:
    with pytest.raises(InvalidEvent, match="toolName"):
        validate_data(event_type, {**VALID[event_type], "toolName": "x"})


@pytest.mark.parametrize(
    ("event_type", "name"),
    [
        (event_type, name)
        for event_type, data in VALID.items()
        for name in data
        if DATA_MODELS[event_type].model_fields.get(name, None) is not None
        and DATA_MODELS[event_type].model_fields[name].is_required()
    ],
)
def test_a_missing_field_is_refused_by_name(event_type: EventType, name: str) -> None:
    data = {key: value for key, value in VALID[event_type].items() if key != name}
    with pytest.raises(InvalidEvent, match=name):
        validate_data(event_type, data)


@pytest.mark.parametrize(
    ("event_type", "changed"),
    [
        (EventType.AGENT_THINKING, {"progress_percentage": 101}),
        (EventType.AGENT_THINKING, {"step": "1"}),
        (EventType.AGENT_THINKING, {"step": -1}),
        (EventType.AGENT_THINKING, {"thought": 1}),
        (EventType.TOOL_COMPLETED, {"status": "done"}),
        (EventType.TOOL_EXECUTING, {"tool_call_id": ""}),
        (EventType.INPUT_REQUESTED, {"kind": "form"}),
        (EventType.AGENT_RETRYING, {"attempt": 1}),
        (EventType.AGENT_ERROR, {"code": "oops"}),
        (EventType.TEXT_DELTA, {"position": -1}),
    ],
)
def test_values_of_another_kind_are_refused(event_type: EventType, changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent):
        validate_data(event_type, VALID[event_type] | changed)


@pytest.mark.parametrize("code", AGENT_ERRORS)
def test_every_code_of_the_closed_list_is_accepted(code: str) -> None:
    validate_data(EventType.AGENT_ERROR, VALID[EventType.AGENT_ERROR] | {"code": code})


def test_none_is_left_out_where_it_says_nothing() -> None:
    assert validate_data(EventType.AGENT_STARTED, {"model": None}) == {}
    assert validate_data(
        EventType.AGENT_COMPLETED, {"result": None, "duration_ms": 1, "usage": None}
    ) == {
        "result": None,
        "duration_ms": 1,
    }


def test_kinds_say_how_an_event_is_kept() -> None:
    assert EventType.TEXT_DELTA.kind is Kind.TEXT
    assert EventType.TOOL_PROGRESS.kind is Kind.PROGRESS
    assert {one for one in EventType if one.is_terminal} == TERMINAL


@given(st.integers(0, 4_102_444_800_000))
def test_timestamps_are_utc_with_milliseconds(timestamp_ms: int) -> None:
    text = format_timestamp(timestamp_ms)
    assert len(text) == 24
    assert text.endswith("Z")
    assert round(datetime.fromisoformat(text).timestamp() * 1000) == timestamp_ms
