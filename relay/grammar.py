"""The grammar of a run, as one state machine without clock or I/O.

Whoever publishes applies each event here first: what is not legal raises in the worker and
reaches nobody. The sequence checker of the tests applies the same machine to what arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relay.errors import GrammarViolation
from relay.events import TERMINAL, EventType

_WITHIN_ATTEMPT = frozenset(
    {
        EventType.AGENT_THINKING,
        EventType.TOOL_EXECUTING,
        EventType.TOOL_COMPLETED,
        EventType.INPUT_REQUESTED,
        EventType.INPUT_RESOLVED,
        EventType.CUSTOM,
        EventType.TEXT_DELTA,
        EventType.TOOL_PROGRESS,
        EventType.AGENT_STALLED,
    }
)


_CHANGES_NOTHING = frozenset(
    {
        EventType.AGENT_THINKING,
        EventType.CUSTOM,
        EventType.TEXT_DELTA,
        EventType.AGENT_STALLED,
    }
)


class RunGrammar:
    """What may come next in one run.

    Attributes:
        attempt: Number of the current attempt, 0 before the first has started.
        open_tools: Tool call id → tool name of the calls that have not completed.
        open_inputs: Ids of the input requests that are not resolved.
        ended_by: The terminal event's type, None while the run goes on.
    """

    def __init__(self, *, attempt: int = 0) -> None:
        self.attempt = attempt
        self.open_tools: dict[str, str] = {}
        self.open_inputs: set[str] = set()
        self.ended_by: EventType | None = None
        self._seen_first = attempt > 0
        self._is_started = False
        self._used_tool_ids: set[str] = set()
        self._used_request_ids: set[str] = set()

    @property
    def is_ended(self) -> bool:
        """Whether the terminal event has come."""
        return self.ended_by is not None

    def apply(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        """Take one event.

        Raises:
            GrammarViolation: The event is not legal here. The state is unchanged.
        """
        if self._is_started and self.ended_by is None and event_type in _CHANGES_NOTHING:
            return
        if self.ended_by is not None:
            raise GrammarViolation(event_type, f"the run has ended with {self.ended_by}")
        if event_type is EventType.NOTICE:
            raise GrammarViolation(event_type, "a notice belongs to no run")
        if event_type is EventType.AGENT_QUEUED:
            self._apply_queued(event_type)
        elif event_type is EventType.AGENT_STARTED:
            self._apply_started(event_type)
        elif event_type is EventType.AGENT_RETRYING:
            self._apply_retrying(event_type, data)
        elif event_type in TERMINAL:
            self._require_closed(event_type)
            self.ended_by = event_type
        elif event_type in _WITHIN_ATTEMPT:
            self._apply_within(event_type, data)
        self._seen_first = True

    def apply_text(self) -> None:
        """Take a piece of text; the same as ``apply`` with a ``text_delta``, at less cost.

        Raises:
            GrammarViolation: Text is not legal here.
        """
        if self.ended_by is not None or not self._is_started:
            self.apply(EventType.TEXT_DELTA, {})

    def _apply_queued(self, event_type: EventType) -> None:
        if self._seen_first:
            raise GrammarViolation(event_type, "it can only be a run's first event")

    def _apply_started(self, event_type: EventType) -> None:
        if self._is_started:
            raise GrammarViolation(event_type, f"attempt {self.attempt} has already started")
        self.attempt += 1
        self._is_started = True

    def _apply_retrying(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        if not self._is_started:
            raise GrammarViolation(event_type, "no attempt has started")
        if data.get("attempt") != self.attempt + 1:
            raise GrammarViolation(event_type, f"the next attempt is {self.attempt + 1}")
        self._require_closed(event_type)
        self._is_started = False

    def _require_closed(self, event_type: EventType) -> None:
        if self.open_tools:
            raise GrammarViolation(event_type, f"tools are open: {', '.join(self.open_tools)}")
        if self.open_inputs:
            raise GrammarViolation(
                event_type, f"input requests are open: {', '.join(sorted(self.open_inputs))}"
            )

    def _apply_within(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        if not self._is_started:
            raise GrammarViolation(event_type, "the attempt has not started (agent_started)")
        if event_type is EventType.TOOL_EXECUTING:
            tool_call_id = data["tool_call_id"]
            if tool_call_id in self._used_tool_ids:
                raise GrammarViolation(event_type, f"tool_call_id {tool_call_id} was used before")
            self._used_tool_ids.add(tool_call_id)
            self.open_tools[tool_call_id] = data["tool_name"]
        elif event_type is EventType.TOOL_COMPLETED:
            self._require_open_tool(event_type, data["tool_call_id"])
            name = self.open_tools[data["tool_call_id"]]
            if data["tool_name"] != name:
                raise GrammarViolation(event_type, f"this call's tool_name is {name}")
            del self.open_tools[data["tool_call_id"]]
        elif event_type is EventType.TOOL_PROGRESS:
            self._require_open_tool(event_type, data["tool_call_id"])
        elif event_type is EventType.INPUT_REQUESTED:
            request_id = data["request_id"]
            if request_id in self._used_request_ids:
                raise GrammarViolation(event_type, f"request_id {request_id} was used before")
            self._used_request_ids.add(request_id)
            self.open_inputs.add(request_id)
        elif event_type is EventType.INPUT_RESOLVED:
            if data["request_id"] not in self.open_inputs:
                raise GrammarViolation(event_type, f"{data['request_id']} is not open")
            self.open_inputs.remove(data["request_id"])

    def _require_open_tool(self, event_type: EventType, tool_call_id: str) -> None:
        if tool_call_id not in self.open_tools:
            raise GrammarViolation(event_type, f"tool_call_id {tool_call_id} is not open")
