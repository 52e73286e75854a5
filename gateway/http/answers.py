"""What the public HTTP routes answer, as models: the source of the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from relay.errors import AGENT_ERRORS, WIRE_ERRORS

Count = Annotated[int, Field(ge=0)]
Timestamp = Annotated[
    str,
    Field(
        pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$",
        description="UTC, ISO 8601, milliseconds.",
        examples=["2026-11-22T14:00:00.123Z"],
    ),
]


class Answer(BaseModel):
    """Base of all answers. Clients ignore fields that they do not know."""

    model_config = ConfigDict(extra="allow")


class RunAccepted(Answer):
    """A request was accepted."""

    run_id: str
    duplicate: bool = Field(description="Whether this message had been accepted before.")


class OpenToolItem(Answer):
    """A tool call that has not completed."""

    tool_call_id: str
    tool_name: str


class OpenInputItem(Answer):
    """A question to the user that is not answered yet: the data of its `input_requested`."""

    request_id: str
    prompt: str
    kind: Literal["approval", "text", "choice"]
    expires_at: str


class RunItem(Answer):
    """A run as in `runs[]` of `connection_established`."""

    run_id: str
    thread_id: str
    agent: str
    parent_run_id: str | None
    status: str
    attempt: Count
    seq: Count
    first_offset: Count
    open_tools: list[OpenToolItem]
    open_inputs: list[OpenInputItem]
    cancel_requested: bool
    created_at: Timestamp
    ended_at: Timestamp | None


class RunList(Answer):
    """The runs that are active or have just ended."""

    runs: list[RunItem]


class RunFailure(Answer):
    """The data of the run's `agent_error`."""

    code: str = Field(description=f"One of: {', '.join(AGENT_ERRORS)}.")
    error_message: str
    is_recoverable: bool
    recovery_suggestions: list[str]
    support_id: str


class RunDetailItem(RunItem):
    """One run, with its end."""

    result: Any = Field(description="The full response of a completed run, for 24 hours.")
    error: RunFailure | None


class CancelAccepted(Answer):
    """The run was asked to stop, or had ended; `status` says which."""

    run_id: str
    status: str


class AnswerAccepted(Answer):
    """The answer reaches the agent."""

    run_id: str
    request_id: str


class TicketIssued(Answer):
    """A ticket: one use, as `?ticket=` of the WebSocket."""

    ticket: str = Field(repr=False)
    expires_in_s: Count


class Alive(Answer):
    """The process answers."""

    status: Literal["ok"]


class Ready(Answer):
    """Whether messages published to Redis come back through pub/sub."""

    status: Literal["ready", "not_ready"]


class Problem(Answer):
    """A problem document (RFC 9457)."""

    type: str = Field(pattern="^urn:agent-relay:problem:[a-z_]+$")
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    code: str = Field(description=f"One of: {', '.join(WIRE_ERRORS)}.")
    recovery_suggestions: list[str]
