from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import GrammarViolation
from relay.events import TERMINAL, EventType
from relay.grammar import RunGrammar

Step = tuple[EventType, dict[str, Any]]


class Walk:
    """The grammar as the design's table says it, told apart from its implementation."""

    def __init__(self) -> None:
        self.count = 0
        self.attempt = 0
        self.is_running = False
        self.has_ended = False
        self.tools: dict[str, str] = {}
        self.inputs: set[str] = set()
        self.used: set[str] = set()

    def is_legal(self, step: Step) -> bool:
        kind, data = step
        is_closed = not self.tools and not self.inputs
        if self.has_ended or kind is EventType.NOTICE:
            return False
        if kind is EventType.AGENT_QUEUED:
            return self.count == 0
        if kind is EventType.CANCEL_REQUESTED:
            return True
        if kind in TERMINAL:
            return is_closed
        if kind is EventType.AGENT_STARTED:
            return not self.is_running
        if not self.is_running:
            return False
        match kind:
            case EventType.AGENT_RETRYING:
                return is_closed and data["attempt"] == self.attempt + 1
            case EventType.TOOL_EXECUTING | EventType.INPUT_REQUESTED:
                return self._id(step) not in self.used
            case EventType.TOOL_COMPLETED:
                return self.tools.get(data["tool_call_id"]) == data["tool_name"]
            case EventType.TOOL_PROGRESS:
                return data["tool_call_id"] in self.tools
            case EventType.INPUT_RESOLVED:
                return data["request_id"] in self.inputs
        return True

    def take(self, step: Step) -> None:
        kind, data = step
        self.count += 1
        match kind:
            case EventType.AGENT_STARTED:
                self.attempt += 1
                self.is_running = True
            case EventType.AGENT_RETRYING:
                self.is_running = False
            case EventType.TOOL_EXECUTING:
                self.tools[data["tool_call_id"]] = data["tool_name"]
                self.used.add(self._id(step))
            case EventType.TOOL_COMPLETED:
                del self.tools[data["tool_call_id"]]
            case EventType.INPUT_REQUESTED:
                self.inputs.add(data["request_id"])
                self.used.add(self._id(step))
            case EventType.INPUT_RESOLVED:
                self.inputs.remove(data["request_id"])
            case _ if kind in TERMINAL:
                self.has_ended = True

    @staticmethod
    def _id(step: Step) -> str:
        kind, data = step
        name = "request_id" if kind is EventType.INPUT_REQUESTED else "tool_call_id"
        return f"{kind}:{data[name]}"


def random_step(rng: random.Random) -> Step:
    kind = rng.choice(list(EventType))
    return kind, {
        "tool_call_id": rng.choice("abc"),
        "tool_name": rng.choice(("search", "search", "mail")),
        "request_id": rng.choice("xy"),
        "attempt": rng.choice((2, 2, 3)),
    }


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_every_legal_step_is_taken_and_no_other(seed: int) -> None:
    rng = random.Random(seed)
    walk, grammar = Walk(), RunGrammar()
    for _ in range(80):
        step = random_step(rng)
        if step[0] in TERMINAL and rng.random() < 0.8:
            continue
        if walk.is_legal(step):
            walk.take(step)
            grammar.apply(*step)
        else:
            before = copy.deepcopy(vars(grammar))
            with pytest.raises(GrammarViolation):
                grammar.apply(*step)
            assert vars(grammar) == before
        assert (grammar.attempt, grammar.is_ended) == (walk.attempt, walk.has_ended)
        assert (grammar.open_tools, grammar.open_inputs) == (walk.tools, walk.inputs)


def test_a_later_attempt_begins_without_its_request() -> None:
    grammar = RunGrammar(attempt=1)
    with pytest.raises(GrammarViolation):
        grammar.apply(EventType.AGENT_QUEUED, {})
    grammar.apply(EventType.AGENT_STARTED, {})
    assert grammar.attempt == 2


def test_a_violation_names_the_event_and_the_reason() -> None:
    grammar = RunGrammar()
    grammar.apply(EventType.AGENT_STARTED, {})
    grammar.apply(EventType.TOOL_EXECUTING, {"tool_call_id": "c", "tool_name": "search"})
    with pytest.raises(GrammarViolation, match=r"agent_completed.*tools are open: c"):
        grammar.apply(EventType.AGENT_COMPLETED, {})
