"""What a run's events say to somebody who reads along in a terminal: pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from relay.client import Event

_MAX_SUMMARY_CHARS = 160
# Everything that could move the cursor, change colours or the window's title. Line breaks and
# tabs stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Say:
    """A line about what happens.

    Attributes:
        mark: One character before it.
        style: Name of its style: ``good``, ``bad``, ``care``, ``quiet`` or ``name``.
    """

    mark: str
    style: str
    text: str


@dataclass(frozen=True, slots=True)
class Write:
    """The next piece of the answer."""

    text: str


Line: TypeAlias = Say | Write


@dataclass(slots=True)
class _OpenTool:
    name: str
    progress: str = ""


class RunStory:
    """Follows one run. Events that were told before are ignored.

    Attributes:
        ended_by: The terminal event, once it has come.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.ended_by: Event | None = None
        self._last_seq = 0
        self._tools: dict[str, _OpenTool] = {}
        self._message_id = ""
        self._message = ""
        self._answer = ""
        self._status = "Waiting for a worker"

    @property
    def status(self) -> str:
        """What is going on right now, for a spinner."""
        if self._tools:
            return ", ".join(f"{tool.name}{tool.progress}" for tool in self._tools.values())
        return self._status

    def receive(self, event: Event) -> list[Line]:
        """Take the next event; give what there is to tell."""
        if event.run_id != self.run_id or self.ended_by is not None:
            return []
        if event.seq is not None:
            if event.seq <= self._last_seq:
                return []
            self._last_seq = event.seq
        if event.type == "text_delta":
            return self._tell_text(event.data)
        if event.type == "tool_progress":
            return self._tell_progress(event.data)
        if event.is_terminal:
            self._tools.clear()
            self.ended_by = event
            return self._tell_end(event)
        return self._tell_lifecycle(event.type, event.data)

    def _tell_text(self, data: Mapping[str, Any]) -> list[Line]:
        if data["message_id"] != self._message_id:
            self._message_id, self._message = data["message_id"], ""
        position, text = int(data["position"]), str(data["text"])
        # Pieces that overlap with what is known are normal: whole texts come after a reconnect.
        new = text[max(0, len(self._message) - position) :]
        self._message += new
        self._answer += new
        self._status = "Writing"
        return [Write(new)] if new else []

    def _tell_progress(self, data: Mapping[str, Any]) -> list[Line]:
        tool = self._tools.get(data["tool_call_id"])
        if tool is not None:
            percentage, note = data.get("progress_percentage"), data.get("note")
            parts = [f"{percentage:.0f} %" if percentage is not None else "", note or ""]
            tool.progress = "".join(f" · {part}" for part in parts if part)
        return []

    def _tell_lifecycle(self, kind: str, data: Mapping[str, Any]) -> list[Line]:
        match kind:
            case "agent_started":
                self._status = "Working"
                self._answer = ""
                return []
            case "agent_thinking":
                self._status = str(data["thought"])
                return [Say("·", "quiet", str(data["thought"]))]
            case "tool_executing":
                self._tools[data["tool_call_id"]] = _OpenTool(str(data["tool_name"]))
                return []
            case "tool_completed":
                self._tools.pop(data["tool_call_id"], None)
                return [_tell_tool(data)]
            case "input_requested":
                # Whoever can also answer puts the question: relay.cli.asking.
                self._status = "Waiting for an answer"
                return []
            case "input_resolved":
                self._status = "Working"
                return []
            case "agent_stalled":
                return [Say("!", "care", f"Nothing heard for {_seconds(data['idle_ms'])}")]
            case "agent_retrying":
                self._message_id = ""
                self._status = "Trying again"
                return [Say("!", "care", f"Trying again: {data['reason']}")]
            case "cancel_requested":
                self._status = "Stopping"
                return [Say("■", "care", "Stopping")]
            case _:
                return []

    def _tell_end(self, event: Event) -> list[Line]:
        data = event.data
        if event.type == "agent_completed":
            lines: list[Line] = []
            answer = _as_text(data.get("result"))
            if answer and answer.strip() != self._answer.strip():
                lines.append(Write(answer))
            return [*lines, Say("✓", "good", f"Done in {_seconds(data['duration_ms'])}")]
        if event.type == "agent_cancelled":
            return [Say("■", "care", f"Stopped after {_seconds(data['duration_ms'])}")]
        lines = [Say("✗", "bad", f"{data['error_message']} ({data['code']})")]
        lines += [Say("→", "name", str(hint)) for hint in data.get("recovery_suggestions", ())]
        if data.get("support_id"):
            lines.append(Say(" ", "quiet", f"Support id {data['support_id']}"))
        return lines


def _tell_tool(data: Mapping[str, Any]) -> Say:
    took = f"{data['tool_name']} · {_seconds(data['duration_ms'])}"
    if data["status"] == "ok":
        return Say("✓", "good", took)
    if data["status"] == "cancelled":
        return Say("■", "care", f"{took} · stopped")
    return Say("✗", "bad", f"{took} · {data.get('error') or 'failed'}")


def summarize(event: Event) -> str:
    """Give an event's data in one line."""
    data = event.data
    match event.type:
        case "agent_queued":
            text = str(data.get("content", ""))
        case "agent_thinking":
            text = str(data.get("thought", ""))
        case "tool_executing":
            text = f"{data.get('tool_name')} {_as_json(data.get('parameters'))}"
        case "tool_completed":
            text = f"{data.get('tool_name')} {data.get('status')} {_seconds(data['duration_ms'])}"
        case "tool_progress":
            text = f"{data.get('progress_percentage', '')} {data.get('note') or ''}".strip()
        case "text_delta":
            text = str(data.get("text", ""))
        case "agent_completed":
            text = _as_text(data.get("result"))
        case "agent_error":
            text = f"{data.get('code')}: {data.get('error_message')}"
        case _:
            text = _as_json(data)
    line = printable(" ".join(text.split()))
    return line if len(line) <= _MAX_SUMMARY_CHARS else line[: _MAX_SUMMARY_CHARS - 1] + "…"


def printable(text: str) -> str:
    """Give ``text`` without what a terminal would obey instead of showing it."""
    return _CONTROL.sub("\ufffd", text)


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _seconds(duration_ms: object) -> str:
    milliseconds = float(str(duration_ms))
    return f"{milliseconds:.0f} ms" if milliseconds < 100 else f"{milliseconds / 1000:.1f} s"
