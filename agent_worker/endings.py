"""How an attempt ends: the one place where outcomes become terminal events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relay.errors import AgentError
from relay.events import EventType

REFUSED = "refused"
"""Status of an attempt that was ended or taken over elsewhere: nothing of its end was published."""

UNFINISHED = "unfinished"
"""Status of an attempt that was left without an end; the reaper gives it one."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A terminal event, ready to be published."""

    event_type: EventType
    data: dict[str, Any]

    @property
    def status(self) -> str:
        """How the run ended, in one word: ``completed``, ``error`` or ``cancelled``."""
        return self.event_type.value.removeprefix("agent_")


@dataclass(frozen=True, slots=True)
class Retry:
    """Another attempt instead of an end.

    Attributes:
        reason: Why, in one word.
        delay_ms: How long to wait before it.
        message: A sentence for the user, where there is one that is safe.
    """

    reason: str
    delay_ms: int
    message: str | None = None


def completed(result: Any, streamed_text: str, duration_ms: int) -> Ending:
    """End with what the agent returned; a plain ``return`` gives the streamed text."""
    value = streamed_text if result is None else result
    return Ending(EventType.AGENT_COMPLETED, {"result": value, "duration_ms": duration_ms})


def cancelled(by: str, reason: str | None, duration_ms: int) -> Ending:
    """End because somebody asked for it."""
    data = {"by": by, "reason": reason, "duration_ms": duration_ms}
    return Ending(EventType.AGENT_CANCELLED, data)


def failed(error: AgentError, support_id: str) -> Ending:
    """End with an error whose text is meant for the user."""
    return Ending(
        EventType.AGENT_ERROR,
        {
            "code": error.code,
            "error_message": error.error_message,
            "is_recoverable": error.is_recoverable,
            "recovery_suggestions": list(error.recovery_suggestions),
            "retry_after_ms": error.retry_after_ms,
            "support_id": support_id,
        },
    )


def failed_unexpectedly(support_id: str) -> Ending:
    """End with the guidance for an exception that the author did not foresee.

    Neither its class nor its text is included: both may hold what the user must not see.
    """
    return failed(AgentError("agent_failed"), support_id)
