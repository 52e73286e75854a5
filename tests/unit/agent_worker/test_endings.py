from __future__ import annotations

import pytest

from agent_worker import AgentError, endings
from relay.errors import AGENT_ERRORS
from relay.events import EventType, validate_data


@pytest.mark.parametrize(
    ("result", "expected"),
    [("answer", "answer"), (None, "streamed"), ({"a": [1]}, {"a": [1]}), ("", ""), (0, 0)],
)
def test_returned_value_is_the_result_and_none_means_the_streamed_text(
    result: object, expected: object
) -> None:
    ending = endings.completed(result, "streamed", 7)
    assert ending.data == {"result": expected, "duration_ms": 7}
    assert ending.status == "completed"


@pytest.mark.parametrize("code", AGENT_ERRORS)
def test_every_agent_error_is_a_valid_event_with_guidance(code: str) -> None:
    ending = endings.failed(AgentError(code), "sup_1")
    data = validate_data(EventType.AGENT_ERROR, ending.data)
    assert data["code"] == code
    assert data["error_message"]
    assert data["recovery_suggestions"]
    assert data["support_id"] == "sup_1"
    assert "retry_after_ms" not in data
    assert ending.status == "error"


def test_an_authors_own_words_are_kept() -> None:
    error = AgentError(
        "rate_limited",
        "The search allows 10 questions a minute.",
        is_recoverable=False,
        recovery_suggestions=["Ask less."],
        retry_after_ms=1500,
    )
    data = validate_data(EventType.AGENT_ERROR, endings.failed(error, "sup_1").data)
    assert data == {
        "code": "rate_limited",
        "error_message": "The search allows 10 questions a minute.",
        "is_recoverable": False,
        "recovery_suggestions": ["Ask less."],
        "retry_after_ms": 1500,
        "support_id": "sup_1",
    }


def test_unexpected_failure_says_nothing_of_its_cause() -> None:
    data = endings.failed_unexpectedly("sup_9").data
    assert data["code"] == "agent_failed"
    assert data["error_message"] == AGENT_ERRORS["agent_failed"].message


def test_cancellation_names_who_and_why() -> None:
    ending = endings.cancelled("user", None, 12)
    assert validate_data(ending.event_type, ending.data) == {"by": "user", "duration_ms": 12}
    assert ending.status == "cancelled"
