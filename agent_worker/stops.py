"""Why an attempt is stopped from outside, and what can be told to one that is at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from relay.errors import PublishRefused


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody asked for the run to stop."""

    by: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"cancelled by {self.by}"


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The attempt took longer than its agent allows."""

    timeout_s: float

    def __str__(self) -> str:
        return f"longer than {self.timeout_s:g} s"


@dataclass(frozen=True, slots=True)
class WorkerStops:
    """The worker goes away and the run did not end in the time that was left."""

    def __str__(self) -> str:
        return "the worker stops"


StopCause = CancelAsked | TimedOut | WorkerStops


class AttemptControl(Protocol):
    """What may be told to an attempt, on the event loop, at any time. Nothing of it waits."""

    def request_stop(self, cause: StopCause) -> None:
        """Stop, and end the run for this cause; the first cause counts."""

    def refuse(self, refusal: PublishRefused) -> None:
        """Stop without publishing anything: the run is no longer this attempt's."""

    def answer(self, request_id: str, answer: Mapping[str, Any]) -> None:
        """Take what became of an input request; ignored where nobody waits for it."""


def read_cancel_flag(flag: bytes) -> CancelAsked:
    """Read who asked for a run to stop, and why, from the flag that Redis keeps of it."""
    try:
        return cancel_asked(orjson.loads(flag))
    except (orjson.JSONDecodeError, AttributeError):
        # That somebody asked is certain, whatever became of the details.
        return CancelAsked("user")


def cancel_asked(fields: Mapping[str, Any]) -> CancelAsked:
    """Read who asked for a run to stop, and why, from a signal or a flag."""
    by, reason = fields.get("by"), fields.get("reason")
    return CancelAsked(
        by if isinstance(by, str) and by else "user", reason if isinstance(reason, str) else None
    )


def read_answers(answers: bytes) -> dict[str, Mapping[str, Any]]:
    """Read the answers to an attempt's input requests that Redis keeps, by request id.

    Raises:
        ValueError: They do not have the agreed form.
    """
    try:
        stored = orjson.loads(answers)
        return {request_id: orjson.loads(answer) for request_id, answer in stored.items()}
    except AttributeError as error:
        raise ValueError("answers are kept as an object") from error
