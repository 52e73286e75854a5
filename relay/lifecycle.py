"""What has to be done about a run whose deadline has come: one decision, without clock or I/O.

The reaper reads the truth about a run, decides here, and acts by compare-and-set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.errors import DecodingFailed
from relay.events import parse_timestamp
from relay.retry import retry_delay_ms

ENDED = frozenset({"completed", "error", "cancelled"})
_AT_WORK = frozenset({"running", "waiting"})

LOOK_FIELDS = (
    "status",
    "attempt",
    "fence",
    "seq",
    "agent",
    "thread",
    "worker",
    "lease_until_ms",
    "updated_ms",
    "created_ms",
    "claimed_ms",
    "started_ms",
    "retry_at_ms",
    "cancel",
    "cancel_ms",
    "max_attempts",
    "stall_after_ms",
    "stalled_ms",
    "last_event",
    "open_tools",
    "open_inputs",
)
"""The fields of ``look.lua``'s answer, in its order."""


@dataclass(frozen=True, slots=True)
class RunTruth:
    """A run as its hash says, at ``now_ms`` of Redis' clock. Times that are not known are 0."""

    now_ms: int
    is_first_of_lane: bool
    status: str
    attempt: int
    fence: str
    seq: int
    agent: str
    thread: str
    worker: str
    lease_until_ms: int
    updated_ms: int
    created_ms: int
    claimed_ms: int
    started_ms: int
    retry_at_ms: int
    cancel: Mapping[str, Any] | None
    cancel_ms: int
    max_attempts: int
    stall_after_ms: int
    stalled_ms: int
    last_event: str
    open_tools: Mapping[str, str]
    open_inputs: Mapping[str, str]

    @property
    def has_begun(self) -> bool:
        """Whether the current attempt has said that it started."""
        return self.started_ms > 0

    def input_expires_ms(self, request_id: str) -> int:
        """When an open input request expires."""
        return parse_timestamp(orjson.loads(self.open_inputs[request_id])["expires_at"])


def truth_from(reply: Sequence[bytes]) -> RunTruth | None:
    """Read ``look.lua``'s answer; None where there is no such run.

    Raises:
        DecodingFailed: The run's hash does not hold what it should.
    """
    if len(reply) == 1:
        return None
    try:
        values = {name: value.decode() for name, value in zip(LOOK_FIELDS, reply[2:], strict=True)}
        return RunTruth(
            now_ms=int(reply[0]),
            is_first_of_lane=reply[1] == b"1",
            status=values["status"],
            attempt=int(values["attempt"]),
            fence=values["fence"],
            seq=int(values["seq"]),
            agent=values["agent"],
            thread=values["thread"],
            worker=values["worker"],
            lease_until_ms=int(values["lease_until_ms"] or 0),
            updated_ms=int(values["updated_ms"] or 0),
            created_ms=int(values["created_ms"] or 0),
            claimed_ms=int(values["claimed_ms"] or 0),
            started_ms=int(values["started_ms"] or 0),
            retry_at_ms=int(values["retry_at_ms"] or 0),
            cancel=orjson.loads(values["cancel"]) if values["cancel"] else None,
            cancel_ms=int(values["cancel_ms"] or 0),
            max_attempts=int(values["max_attempts"] or 1),
            stall_after_ms=int(values["stall_after_ms"] or 0),
            stalled_ms=int(values["stalled_ms"] or 0),
            last_event=values["last_event"],
            open_tools=orjson.loads(values["open_tools"] or "{}"),
            open_inputs=orjson.loads(values["open_inputs"] or "{}"),
        )
    except ValueError as error:
        raise DecodingFailed(f"a run's hash cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Forget:
    """The run has ended: nothing is due any more."""


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Nothing to do before this time."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A run waits and may have no task: tell its workers."""


@dataclass(frozen=True, slots=True)
class ExpireInput:
    """An input request was not answered in time."""

    request_id: str


@dataclass(frozen=True, slots=True)
class FinishCancel:
    """The worker has not stopped within the grace time, or is dead: end the run as cancelled."""


@dataclass(frozen=True, slots=True)
class RetryAttempt:
    """The attempt's worker is lost; another attempt is allowed."""

    delay_ms: int


@dataclass(frozen=True, slots=True)
class LoseRun:
    """The attempt's worker is lost, and it was the last attempt."""


@dataclass(frozen=True, slots=True)
class ReportStall:
    """The worker lives, but nothing has come from the run for this long."""

    idle_ms: int


Decision = (
    Forget
    | LookAgain
    | Dispatch
    | ExpireInput
    | FinishCancel
    | RetryAttempt
    | LoseRun
    | ReportStall
)


def decide(run: RunTruth | None, *, lease_ms: int, cancel_grace_ms: int) -> Decision:
    """Say what has to be done about a run now.

    Args:
        run: The truth about it; None where it no longer exists.
        lease_ms: How long a worker's claim lasts without renewal.
        cancel_grace_ms: How long a worker may take to stop a cancelled run.
    """
    if run is None or run.status in ENDED:
        return Forget()
    if run.status in _AT_WORK:
        return _decide_at_work(run, cancel_grace_ms)
    if run.cancel is not None:
        # It was asked to stop while a worker had it, which then gave it back.
        return FinishCancel()
    if not run.is_first_of_lane:
        # Its turn comes with the end of the run before it; whoever ends that one dispatches it.
        # Looking now and then finds it if that process died in between.
        return LookAgain(run.now_ms + lease_ms)
    if run.status == "retrying" and run.retry_at_ms > run.now_ms:
        return LookAgain(run.retry_at_ms)
    return Dispatch()


def _decide_at_work(run: RunTruth, cancel_grace_ms: int) -> Decision:
    now_ms = run.now_ms
    due = [run.lease_until_ms]
    if run.cancel is not None:
        finish_ms = run.cancel_ms + cancel_grace_ms
        if finish_ms <= now_ms:
            return FinishCancel()
        due.append(finish_ms)
    if run.lease_until_ms <= now_ms:
        if run.cancel is not None:
            return FinishCancel()
        if run.attempt < run.max_attempts:
            return RetryAttempt(retry_delay_ms(run.attempt))
        return LoseRun()
    for request_id in run.open_inputs:
        expires_ms = run.input_expires_ms(request_id)
        if expires_ms <= now_ms:
            return ExpireInput(request_id)
        due.append(expires_ms)
    if run.stall_after_ms:
        # An attempt that has not begun cannot stall: the grammar has no place for it.
        can_stall = run.status == "running" and run.has_begun
        if can_stall and run.stalled_ms != run.updated_ms:
            idle_ms = now_ms - run.updated_ms
            if idle_ms >= run.stall_after_ms:
                return ReportStall(idle_ms)
            due.append(run.updated_ms + run.stall_after_ms)
        else:
            # It may begin, be answered or go on at any time from now, and fall silent again.
            due.append(now_ms + run.stall_after_ms)
    return LookAgain(min(due))
