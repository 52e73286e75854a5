"""Lifecycle events in the form that the scripts read: six columns for each event.

One place says what an event does to its run's hash, for the publisher, for cancel, for answers to
input requests and for the reaper alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from relay.codec import RunEnvelope
from relay.encoding import encode_json
from relay.events import EventType, Kind, validate_data
from relay.keys import BODY_THRESHOLD_BYTES

END_STATUS = {
    EventType.AGENT_COMPLETED: "completed",
    EventType.AGENT_ERROR: "error",
    EventType.AGENT_CANCELLED: "cancelled",
}


class OpenTool(NamedTuple):
    """What the run's hash keeps of a tool call that has not completed."""

    name: str
    since_ms: int

    def encode(self) -> str:
        """Give the form in the run's hash."""
        return f"{self.since_ms} {self.name}"

    @classmethod
    def decode(cls, text: str) -> OpenTool:
        """Read the form in the run's hash.

        Raises:
            ValueError: It is not of that form.
        """
        since_ms, _, name = text.partition(" ")
        return cls(name, int(since_ms))


class Columns(NamedTuple):
    """One lifecycle event as a script's arguments; ``_run.lua`` says what they mean."""

    kind: int
    type: str
    subject_id: str
    value: str
    event: bytes
    digest: str


def columns_of(
    event_type: EventType, now_ms: int, data: Mapping[str, Any], event: bytes
) -> Columns:
    """Say what an encoded event does to its run.

    Args:
        event_type: A lifecycle event's type.
        now_ms: When it happened.
        data: Its validated data.
        event: Its stored bytes.
    """
    subject_id, value = "", ""
    # The usual ones come first: each case is a comparison.
    match event_type:
        case EventType.AGENT_THINKING | EventType.CUSTOM:
            pass
        case EventType.TOOL_EXECUTING:
            subject_id = data["tool_call_id"]
            value = OpenTool(data["tool_name"], now_ms).encode()
        case EventType.TOOL_COMPLETED:
            subject_id = data["tool_call_id"]
        case EventType.INPUT_REQUESTED:
            subject_id = data["request_id"]
            kept = {name: part for name, part in data.items() if name != "request_id"}
            value = encode_json(kept).decode()
        case EventType.INPUT_RESOLVED:
            subject_id = data["request_id"]
        case EventType.AGENT_RETRYING:
            value = str(data["delay_ms"])
        case _:
            value = END_STATUS.get(event_type, "")
    digest = hashlib.sha256(event).hexdigest() if len(event) > BODY_THRESHOLD_BYTES else ""
    return Columns(int(Kind.EVENT), event_type.value, subject_id, value, event, digest)


def lifecycle_columns(
    envelope: RunEnvelope, event_type: EventType, now_ms: int, data: Mapping[str, Any]
) -> Columns:
    """Validate and encode an event, and say what it does to its run.

    Raises:
        InvalidEvent, EncodingFailed: The data do not fit.
    """
    valid = validate_data(event_type, dict(data))
    return columns_of(event_type, now_ms, valid, envelope.encode(event_type, now_ms, valid))
