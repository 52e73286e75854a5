"""Runs as data: requests, claims, summaries; reading them from Redis' answers. Pure."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orjson

from relay.codec import RunEnvelope
from relay.columns import OpenTool
from relay.errors import DecodingFailed
from relay.events import format_timestamp

if TYPE_CHECKING:
    from relay.config import Settings

ThreadPolicy = Literal["enqueue", "reject", "interrupt", "parallel"]
_RUN_ID_BYTES = 15
_LAST_MS = 253_402_300_799_999
"""The end of the year 9999, the last that ISO 8601 writes with four digits."""


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Quotas of one user, and how long things may take before the reaper looks at them.

    Attributes:
        dispatch_check_ms: After this an accepted run that nobody has claimed is looked at.
        cancel_grace_ms: How long a worker may take to stop a cancelled run.
    """

    max_active: int = 10
    max_queued: int = 100
    dispatch_check_ms: int = 15_000
    cancel_grace_ms: int = 5_000

    @classmethod
    def of(cls, settings: Settings) -> RunLimits:
        """Give what settings say."""
        return cls(
            max_active=settings.max_active_runs_per_user,
            max_queued=settings.max_queued_runs_per_user,
            dispatch_check_ms=settings.lease_ms,
            cancel_grace_ms=settings.cancel_grace_ms,
        )


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """What workers say about an agent when they start."""

    name: str
    description: str = ""
    policy: ThreadPolicy = "enqueue"

    def as_json(self) -> dict[str, str]:
        """Give the item for a client's list of agents."""
        return {"name": self.name, "description": self.description}


class ParentAttempt(NamedTuple):
    """The attempt of a run that asks for another run."""

    run_id: str
    fence: str


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """A user's request.

    Attributes:
        message_id: The client's id of this request; the same one again gives the same run.
        policy: What happens while the thread has an active run; None: as the agent says.
        parent: The attempt that asks for this run as a part of its own; None for a user's request.
    """

    user_id: str
    thread_id: str
    agent: str
    content: str
    message_id: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    policy: ThreadPolicy | None = None
    parent: ParentAttempt | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """An accepted request."""

    run_id: str
    duplicate: bool
    status: str


@dataclass(frozen=True, slots=True)
class CancelOutcome:
    """What became of a request to cancel: the run's status, and whether it was asked before."""

    run_id: str
    status: str
    already: bool


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The user's request as the agent sees it."""

    message_id: str
    content: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's right to carry out one attempt of a run.

    Attributes:
        fence: Proves to Redis that this attempt is the current one.
        seq: Number of the run's last lifecycle event so far.
        epoch: The channel's epoch when the run was claimed.
    """

    envelope: RunEnvelope
    request: RunRequest
    fence: str
    seq: int
    epoch: str
    created_ms: int
    cancel: dict[str, Any] | None = None

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.envelope.run_id


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """Why a run was not given: ``taken``, ``waiting``, ``ended`` or ``unknown``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """What became of a lease.

    Attributes:
        is_held: Whether the run is still this attempt's.
        reason: Why not: ``stale``, ``ended`` or ``unknown``.
        cancel: Who asked for the run to stop, and why; None if nobody did.
        answers: Request id → answer of the input requests that were resolved for this attempt.
    """

    is_held: bool
    reason: str = ""
    cancel: dict[str, Any] | None = None
    answers: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def renewed_from(reply: Sequence[bytes]) -> Renewed:
    """Read ``renew.lua``'s answer.

    Raises:
        DecodingFailed: The run's hash does not hold what it should.
    """
    if reply[0] != b"ok":
        return Renewed(is_held=False, reason=reply[0].decode())
    try:
        answers = orjson.loads(reply[2] or b"{}")
        return Renewed(
            is_held=True,
            cancel=orjson.loads(reply[1]) if reply[1] else None,
            answers={request: orjson.loads(answer) for request, answer in answers.items()},
        )
    except ValueError as error:
        raise DecodingFailed(f"a run's hash cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class RunSummary:
    """An active or just-ended run, as a client that has just connected needs it."""

    run_id: str
    thread_id: str
    agent: str
    status: str
    attempt: int
    seq: int
    first_offset: int
    open_tools: Mapping[str, str]
    open_inputs: Mapping[str, Mapping[str, Any]]
    cancel_requested: bool
    created_ms: int
    ended_ms: int | None
    parent_run_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Give the item of ``runs[]``."""
        return {
            "run_id": self.run_id,
            "thread_id": self.thread_id,
            "agent": self.agent,
            "parent_run_id": self.parent_run_id,
            "status": self.status,
            "attempt": self.attempt,
            "seq": self.seq,
            "first_offset": self.first_offset,
            "open_tools": [
                {"tool_call_id": call, "tool_name": name} for call, name in self.open_tools.items()
            ],
            "open_inputs": [
                {"request_id": request, **data} for request, data in self.open_inputs.items()
            ],
            "cancel_requested": self.cancel_requested,
            "created_at": format_timestamp(self.created_ms),
            "ended_at": None if self.ended_ms is None else format_timestamp(self.ended_ms),
        }


@dataclass(frozen=True, slots=True)
class RunDetail:
    """One run with the data of its terminal event, once it has one."""

    summary: RunSummary
    terminal: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Give the body of ``GET /v1/runs/{id}``."""
        body = self.summary.as_json()
        data = None if self.terminal is None else self.terminal["data"]
        body["result"] = data.get("result") if data and self.summary.status == "completed" else None
        body["error"] = data if data and self.summary.status == "error" else None
        return body


def derive_run_id(user_id: str, message_id: str) -> str:
    """Give the run's id: the same user and message always give the same one."""
    digest = hashlib.blake2b(
        f"{len(user_id)}:{user_id}{message_id}".encode(), digest_size=_RUN_ID_BYTES
    ).digest()
    return "run_" + base64.b32encode(digest).decode().lower()


def summary_from_row(row: Sequence[bytes]) -> RunSummary:
    """Read a run's row of ``read.lua``.

    Raises:
        DecodingFailed: The run's hash does not hold what it should.
    """
    try:
        (
            run_id,
            agent,
            thread,
            status,
            attempt,
            seq,
            first,
            tools,
            inputs,
            cancel,
            created,
            ended,
        ) = row[:12]
        return RunSummary(
            run_id=run_id.decode(),
            thread_id=thread.decode(),
            agent=agent.decode(),
            status=status.decode(),
            attempt=int(attempt),
            seq=int(seq),
            first_offset=int(first),
            open_tools={
                call: OpenTool.decode(text).name
                for call, text in orjson.loads(tools or b"{}").items()
            },
            open_inputs={
                request: _object(data) for request, data in orjson.loads(inputs or b"{}").items()
            },
            cancel_requested=bool(cancel),
            created_ms=_time_ms(created),
            ended_ms=_time_ms(ended) if ended else None,
            parent_run_id=row[13].decode() or None,
        )
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise DecodingFailed(f"a run's hash cannot be read: {error}") from error


def _object(text: str) -> dict[str, Any]:
    value = orjson.loads(text)
    if type(value) is not dict:
        raise ValueError("an open question is no object")
    return value


def _time_ms(text: bytes) -> int:
    time_ms = int(text)
    if not 0 <= time_ms <= _LAST_MS:
        # It would fail where it is shown, far from its cause.
        raise ValueError(f"{time_ms} ms is no date")
    return time_ms
