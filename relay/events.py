"""The events of a run: their types, their fields, their envelope.

Field names are canonical: nothing else is accepted for publishing. The models say what each
type carries; ``validate_data`` is the one entrance that checks it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relay.errors import AGENT_ERRORS, InvalidEvent


class EventType(StrEnum):
    """All types of events, in the order of the design's table."""

    AGENT_QUEUED = "agent_queued"
    AGENT_STARTED = "agent_started"
    AGENT_THINKING = "agent_thinking"
    TOOL_EXECUTING = "tool_executing"
    TOOL_COMPLETED = "tool_completed"
    INPUT_REQUESTED = "input_requested"
    INPUT_RESOLVED = "input_resolved"
    AGENT_STALLED = "agent_stalled"
    AGENT_RETRYING = "agent_retrying"
    CANCEL_REQUESTED = "cancel_requested"
    AGENT_COMPLETED = "agent_completed"
    AGENT_ERROR = "agent_error"
    AGENT_CANCELLED = "agent_cancelled"
    CUSTOM = "custom"
    TEXT_DELTA = "text_delta"
    TOOL_PROGRESS = "tool_progress"
    NOTICE = "notice"

    # An enum's own hash is a call of Python code, and there are several for each event.
    __hash__ = str.__hash__

    @property
    def kind(self) -> Kind:
        """How events of this type are kept."""
        if self is EventType.TEXT_DELTA:
            return Kind.TEXT
        if self is EventType.TOOL_PROGRESS:
            return Kind.PROGRESS
        return Kind.EVENT

    @property
    def is_terminal(self) -> bool:
        """Whether a run ends with this event."""
        return self in TERMINAL


class Kind(IntEnum):
    """How a publication is kept; the numbers are part of the live message's format."""

    EVENT = 0
    """In the log."""
    TEXT = 1
    """Joined into its message's text."""
    PROGRESS = 2
    """Not kept: latest only, best effort."""


TERMINAL: frozenset[EventType] = frozenset(
    {EventType.AGENT_COMPLETED, EventType.AGENT_ERROR, EventType.AGENT_CANCELLED}
)

Percentage = Annotated[float, Field(ge=0, le=100)]
Identifier = Annotated[str, Field(min_length=1, max_length=128)]
NonNegative = Annotated[int, Field(ge=0)]


class EventData(BaseModel):
    """Base of all data models: unknown fields are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LifecycleData(EventData):
    """Data of an event in the log. ``message`` is a sentence for people."""

    message: str | None = None


class AgentQueued(LifecycleData):
    """The user's request as accepted."""

    message_id: Identifier
    content: str
    metadata: dict[str, Any]


class AgentStarted(LifecycleData):
    """One per attempt."""

    model: str | None = None
    context: dict[str, Any] | None = None


class AgentThinking(LifecycleData):
    """What the agent is about to do."""

    thought: str
    step: NonNegative | None = None
    total_steps: NonNegative | None = None
    progress_percentage: Percentage | None = None
    estimated_remaining_ms: NonNegative | None = None


class ToolExecuting(LifecycleData):
    """A tool call begins."""

    tool_call_id: Identifier
    tool_name: Annotated[str, Field(min_length=1, max_length=256)]
    purpose: str | None = None
    parameters: Any
    estimated_duration_ms: NonNegative | None = None


class ToolCompleted(LifecycleData):
    """A tool call ends."""

    tool_call_id: Identifier
    tool_name: Annotated[str, Field(min_length=1, max_length=256)]
    status: Literal["ok", "error", "cancelled"]
    result: Any = None
    error: str | None = None
    duration_ms: NonNegative


class InputRequested(LifecycleData):
    """The agent waits for the user."""

    request_id: Identifier
    prompt: str
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    expires_at: str
    kind: Literal["approval", "text", "choice"]


class InputResolved(LifecycleData):
    """The wait for the user is over."""

    request_id: Identifier
    outcome: Literal["answered", "denied", "expired", "cancelled"]
    value: Any = None
    by: str


class AgentStalled(LifecycleData):
    """The run's worker lives, but nothing has come from the run for a while."""

    idle_ms: NonNegative
    last_event: str


class AgentRetrying(LifecycleData):
    """All output of earlier attempts is superseded."""

    attempt: Annotated[int, Field(ge=2)]
    reason: str
    delay_ms: NonNegative


class CancelRequested(LifecycleData):
    """Somebody asked for the run to stop."""

    by: str
    reason: str | None = None


class AgentCompleted(LifecycleData):
    """The run's full response."""

    result: Any
    summary: str | None = None
    duration_ms: NonNegative
    usage: dict[str, Any] | None = None


class AgentFailed(LifecycleData):
    """Data of ``agent_error``; ``error_message`` is safe for users."""

    code: str
    error_message: str
    is_recoverable: bool
    recovery_suggestions: list[str]
    retry_after_ms: NonNegative | None = None
    support_id: Identifier

    def model_post_init(self, context: object, /) -> None:
        """Hold the closed list of codes.

        Raises:
            ValueError: The code is not in the list.
        """
        if self.code not in AGENT_ERRORS:
            raise ValueError(f"code must be one of: {', '.join(AGENT_ERRORS)}")


class AgentCancelled(LifecycleData):
    """The run was cancelled."""

    by: str
    reason: str | None = None
    duration_ms: NonNegative


class Custom(LifecycleData):
    """Whatever the agent's author agreed on with the client's author."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    value: Any


class TextDelta(EventData):
    """A piece of streamed text. ``position`` counts Unicode code points before it."""

    message_id: Identifier
    position: NonNegative
    text: str


class ToolProgress(EventData):
    """How far an open tool call is."""

    tool_call_id: Identifier
    progress_percentage: Percentage | None = None
    note: str | None = None


class Notice(LifecycleData):
    """Something for the user that belongs to no run; carries any application payload."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    severity: Literal["info", "success", "warning", "error"]
    title: str
    body: str


DATA_MODELS: dict[EventType, type[EventData]] = {
    EventType.AGENT_QUEUED: AgentQueued,
    EventType.AGENT_STARTED: AgentStarted,
    EventType.AGENT_THINKING: AgentThinking,
    EventType.TOOL_EXECUTING: ToolExecuting,
    EventType.TOOL_COMPLETED: ToolCompleted,
    EventType.INPUT_REQUESTED: InputRequested,
    EventType.INPUT_RESOLVED: InputResolved,
    EventType.AGENT_STALLED: AgentStalled,
    EventType.AGENT_RETRYING: AgentRetrying,
    EventType.CANCEL_REQUESTED: CancelRequested,
    EventType.AGENT_COMPLETED: AgentCompleted,
    EventType.AGENT_ERROR: AgentFailed,
    EventType.AGENT_CANCELLED: AgentCancelled,
    EventType.CUSTOM: Custom,
    EventType.TEXT_DELTA: TextDelta,
    EventType.TOOL_PROGRESS: ToolProgress,
    EventType.NOTICE: Notice,
}


def validate_data(event_type: EventType, data: dict[str, Any]) -> dict[str, Any]:
    """Check an event's data against its type and leave out what is None.

    ``result`` of a completed run is kept even when it is None: a client waits for it.

    Returns:
        The data with canonical names only, values as given.

    Raises:
        InvalidEvent: A field is unknown, missing or of the wrong type; the text names it.
    """
    try:
        DATA_MODELS[event_type].model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'data'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        )
        fields = ", ".join(
            field.alias or name for name, field in DATA_MODELS[event_type].model_fields.items()
        )
        raise InvalidEvent(f"{event_type}: {problems} (fields: {fields})") from None
    required = _KEPT_WHEN_NONE.get(event_type, ())
    return {name: value for name, value in data.items() if value is not None or name in required}


_KEPT_WHEN_NONE: dict[EventType, tuple[str, ...]] = {
    EventType.AGENT_COMPLETED: ("result",),
    EventType.CUSTOM: ("value",),
    EventType.TOOL_EXECUTING: ("parameters",),
}


def format_timestamp(timestamp_ms: int) -> str:
    """Give a time in ms since the epoch as UTC, ISO 8601, milliseconds, ``Z``."""
    return f"{_format_second(timestamp_ms // 1000)}.{timestamp_ms % 1000:03d}Z"


@lru_cache(maxsize=16)
def _format_second(timestamp_s: int) -> str:
    return f"{datetime.fromtimestamp(timestamp_s, UTC):%Y-%m-%dT%H:%M:%S}"


def parse_timestamp(text: str) -> int:
    """Give the ms since the epoch of a timestamp in the envelope's form.

    Raises:
        ValueError: The text is not an ISO 8601 time with an offset.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no offset from UTC")
    return round(moment.timestamp() * 1000)
