"""Appending to a run on behalf of somebody else than its worker, by compare-and-set."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from relay.codec import RunEnvelope, Task
from relay.columns import Columns, OpenTool, lifecycle_columns
from relay.errors import AGENT_ERRORS
from relay.events import EventType
from relay.keys import Keys
from relay.lifecycle import ENDED, RunTruth, truth_from
from relay.scripts import RedisLink
from relay.tasks import dispatch

_ATTEMPTS = 8


async def look_at_run(
    link: RedisLink, keys: Keys, user_id: str, run_id: str
) -> tuple[RunEnvelope, RunTruth] | None:
    """Read the truth about a run; None where there is no such run.

    Raises:
        RedisUnavailable: Redis did not answer.
        DecodingFailed, ScriptFailed: The run's hash does not hold what it should.
    """
    [reply] = await link.run([link.call("look", keys.user(user_id), run_id, run_id)])
    run = truth_from(reply)
    if run is None:
        return None
    return RunEnvelope(run_id, run.attempt, run.thread, user_id, run.agent), run


def closing_events(
    envelope: RunEnvelope, run: RunTruth, status: str, error: str | None = None
) -> list[Columns]:
    """Close what a run has open, as must be done before its end or another attempt.

    Args:
        envelope: The attempt.
        run: The run as it was seen.
        status: Of its open tools: ``error`` or ``cancelled``.
        error: Why, for ``error``.
    """
    events = []
    for tool_call_id, kept in run.open_tools.items():
        tool = OpenTool.decode(kept)
        closed: dict[str, Any] = {
            "tool_call_id": tool_call_id,
            "tool_name": tool.name,
            "status": status,
            "error": error,
            "duration_ms": max(0, run.now_ms - tool.since_ms),
        }
        events.append(lifecycle_columns(envelope, EventType.TOOL_COMPLETED, run.now_ms, closed))
    for request_id in run.open_inputs:
        resolved = {"request_id": request_id, "outcome": "cancelled", "by": "system"}
        events.append(lifecycle_columns(envelope, EventType.INPUT_RESOLVED, run.now_ms, resolved))
    return events


def error_event(envelope: RunEnvelope, run: RunTruth, code: str, support_id: str) -> Columns:
    """Give the terminal event for a run that the relay itself could not carry out."""
    guidance = AGENT_ERRORS[code]
    data = {
        "code": code,
        "error_message": guidance.message,
        "is_recoverable": guidance.retryable,
        "recovery_suggestions": list(guidance.recovery_suggestions),
        "support_id": support_id,
    }
    return lifecycle_columns(envelope, EventType.AGENT_ERROR, run.now_ms, data)


def new_support_id() -> str:
    """Give an id that ties what the user sees to one log line."""
    return f"sup_{secrets.token_hex(6)}"


async def amend_run(
    link: RedisLink,
    keys: Keys,
    envelope: RunEnvelope,
    run: RunTruth,
    events: Sequence[Columns],
    *,
    condition: str = "",
    supersede: bool,
) -> bool:
    """Append events if the run is still as it was seen; tells whether it was.

    Args:
        link: Redis.
        keys: Key names.
        envelope: The attempt that the events name.
        run: The run as it was seen.
        events: What to append.
        condition: ``lease``: only if its lease has expired; ``stall``: only if nothing has come
            since.
        supersede: Whether the attempt may publish nothing from now on.

    Raises:
        RedisUnavailable: Whether it was done is unknown.
    """
    columns: list[int | str | bytes] = []
    for event in events:
        columns += event
    call = link.call(
        "amend",
        keys.user(envelope.user_id),
        envelope.run_id,
        envelope.run_id,
        run.fence,
        run.seq,
        run.status,
        condition,
        run.updated_ms,
        "supersede" if supersede else "",
        *columns,
    )
    [reply] = await link.run([call])
    if reply[0] != b"ok":
        return False
    if reply[1]:
        next_task = Task(envelope.user_id, reply[1].decode(), reply[2].decode())
        await dispatch(link, keys, next_task)
    return True


async def end_broken_run(
    link: RedisLink, keys: Keys, user_id: str, run_id: str, support_id: str
) -> bool:
    """End a run that cannot be carried out because of what Redis holds of it.

    Returns:
        Whether it has ended, or no longer exists.

    Raises:
        RedisUnavailable: Whether it was done is unknown.
        DecodingFailed, ScriptFailed: What Redis holds of it does not even allow this.
    """
    for _ in range(_ATTEMPTS):
        found = await look_at_run(link, keys, user_id, run_id)
        if found is None or found[1].status in ENDED:
            return True
        envelope, run = found
        events = [
            *closing_events(envelope, run, "error", "The run could not be carried out."),
            error_event(envelope, run, "internal", support_id),
        ]
        if await amend_run(link, keys, envelope, run, events, supersede=True):
            return True
    return False
