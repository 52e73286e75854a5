"""What a client received, told as a story for the text of a failure."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN_LINES = 60
_SHOWN_FIELDS = ("position", "offset", "run_id", "seq", "attempt", "index", "total", "reason")
_SILENT = frozenset({"heartbeat", "pong", "ack", "event_part"})

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def tell(
    name: str,
    frames: Sequence[tuple[float, Mapping[str, Any]]],
    losses: Sequence[tuple[float, str]],
    events: Sequence[Mapping[str, Any]],
    run_id: str | None = None,
) -> str:
    """Give a line for each thing that happened to a client, oldest first.

    Args:
        name: The client.
        frames: What it received, with times.
        losses: When its connections were lost, and why.
        events: Its events; those of large size came in parts, which are not shown.
        run_id: Leaves out other runs.
    """
    moments = [(at_s, _line(frame)) for at_s, frame in frames if _belongs(frame, run_id)]
    moments += [(at_s, f"-- connection lost: {reason} --") for at_s, reason in losses]
    moments += _joined(frames, events, run_id)
    if not moments:
        return f"{name} received nothing."
    moments.sort(key=lambda moment: moment[0])
    began_s = moments[0][0]
    lines = [f"  +{at_s - began_s:7.3f} s  {text}" for at_s, text in moments]
    left_out = len(lines) - SHOWN_LINES
    if left_out > 0:
        lines = [f"  … {left_out} lines before …", *lines[left_out:]]
    return "\n".join([f"{name} received:", *lines])


def _belongs(frame: Mapping[str, Any], run_id: str | None) -> bool:
    if frame.get("type") in _SILENT:
        return False
    return run_id is None or frame.get("run_id") in (None, run_id)


def _joined(
    frames: Sequence[tuple[float, Mapping[str, Any]]],
    events: Sequence[Mapping[str, Any]],
    run_id: str | None,
) -> list[tuple[float, str]]:
    """Give the events that came in parts, at the time of their last part."""
    last_parts = {
        frame["offset"]: at_s
        for at_s, frame in frames
        if frame.get("type") == "event_part" and frame["index"] == frame["total"] - 1
    }
    return [
        (last_parts[event["offset"]], f"{_line(event)} (in parts)")
        for event in events
        if event.get("offset") in last_parts and _belongs(event, run_id)
    ]


def _line(frame: Mapping[str, Any]) -> str:
    fields = [f"{name}={frame[name]}" for name in _SHOWN_FIELDS if name in frame]
    data = frame.get("data")
    if isinstance(data, Mapping):
        fields += [f"{name}={_short.repr(value)}" for name, value in data.items()]
    return f"{frame.get('type')}  {' '.join(fields)}".rstrip()
