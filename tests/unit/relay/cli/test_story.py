"""What a run's events say to somebody at a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from relay.cli.story import RunStory, Say, Write, printable, summarize
from relay.client import Event


class Run:
    """Makes a run's events in order."""

    def __init__(self) -> None:
        self.offset = 0
        self.seq = 0

    def event(self, kind: str, **data: Any) -> Event:
        self.offset += 1
        self.seq += 1
        return Event(kind, self.offset, data, {}, run_id="r", seq=self.seq)

    def text(self, message_id: str, position: int, text: str) -> Event:
        self.offset += 1
        data = {"message_id": message_id, "position": position, "text": text}
        return Event("text_delta", self.offset, data, {}, run_id="r")


def written(story: RunStory, *events: Event) -> str:
    lines = [line for event in events for line in story.receive(event)]
    return "".join(line.text for line in lines if isinstance(line, Write))


def said(story: RunStory, *events: Event) -> list[str]:
    lines = [line for event in events for line in story.receive(event)]
    return [line.text for line in lines if isinstance(line, Say)]


def test_text_is_written_as_it_comes() -> None:
    run, story = Run(), RunStory("r")
    assert written(story, run.text("m", 0, "Hel"), run.text("m", 3, "lo")) == "Hello"


def test_text_that_is_known_is_not_written_again() -> None:
    run, story = Run(), RunStory("r")
    written(story, run.text("m", 0, "Hel"), run.text("m", 3, "lo"))
    assert written(story, run.text("m", 0, "Hello wo")) == " wo"
    assert written(story, run.text("m", 5, " wo")) == ""
    assert written(story, run.text("m", 8, "rld")) == "rld"


def test_positions_count_characters_not_bytes() -> None:
    run, story = Run(), RunStory("r")
    assert written(story, run.text("m", 0, "é🙂"), run.text("m", 2, "x")) == "é🙂x"


def test_result_is_written_where_no_text_was_streamed() -> None:
    run, story = Run(), RunStory("r")
    assert written(story, run.event("agent_completed", result="42", duration_ms=1)) == "42"


def test_result_that_was_streamed_is_not_written_again() -> None:
    run, story = Run(), RunStory("r")
    written(story, run.text("m", 0, "42\n"))
    assert written(story, run.event("agent_completed", result="42", duration_ms=1)) == ""


def test_result_that_is_data_is_written_as_json() -> None:
    run, story = Run(), RunStory("r")
    text = written(story, run.event("agent_completed", result={"ä": [1]}, duration_ms=1))
    assert '"ä"' in text


def test_status_names_the_running_tool_and_its_progress() -> None:
    run, story = Run(), RunStory("r")
    story.receive(run.event("tool_executing", tool_call_id="t", tool_name="search", parameters={}))
    assert story.status == "search"
    progress = {"tool_call_id": "t", "progress_percentage": 40.0, "note": "page 2"}
    story.receive(Event("tool_progress", 9, progress, {}, run_id="r"))
    assert story.status == "search · 40 % · page 2"
    done = run.event(
        "tool_completed", tool_call_id="t", tool_name="search", status="ok", duration_ms=1500
    )
    assert said(story, done) == ["search · 1.5 s"]
    assert story.status != "search"


def test_failed_tool_says_why() -> None:
    run, story = Run(), RunStory("r")
    done = run.event(
        "tool_completed",
        tool_call_id="t",
        tool_name="search",
        status="error",
        error="no network",
        duration_ms=5,
    )
    assert said(story, done) == ["search · 5 ms · no network"]


def test_error_comes_with_guidance_and_support_id() -> None:
    run, story = Run(), RunStory("r")
    error = run.event(
        "agent_error",
        code="timeout",
        error_message="Too long.",
        is_recoverable=True,
        recovery_suggestions=["Ask for less."],
        support_id="sup_1",
    )
    assert said(story, error) == ["Too long. (timeout)", "Ask for less.", "Support id sup_1"]
    assert story.ended_by is not None


def test_events_that_were_told_and_those_of_others_are_ignored() -> None:
    run, story = Run(), RunStory("r")
    thinking = run.event("agent_thinking", thought="Hm")
    assert said(story, thinking, thinking) == ["Hm"]
    assert said(story, Event("agent_thinking", 5, {"thought": "x"}, {}, run_id="s", seq=9)) == []


def test_new_attempt_writes_its_text_from_the_start() -> None:
    run, story = Run(), RunStory("r")
    written(story, run.text("m", 0, "half"))
    assert said(story, run.event("agent_retrying", attempt=2, reason="worker lost", delay_ms=0))
    assert written(story, run.event("agent_started"), run.text("m", 0, "whole")) == "whole"
    assert written(story, run.event("agent_completed", result="whole", duration_ms=1)) == ""


def test_terminal_commands_in_text_are_made_harmless() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc\td\ne") == "a\ufffd[2Jb\ufffd\ufffdc\td\ne"


@pytest.mark.parametrize(
    ("kind", "data", "line"),
    [
        ("agent_queued", {"content": "two\nlines"}, "two lines"),
        ("tool_executing", {"tool_name": "f", "parameters": {"a": 1}}, 'f {"a": 1}'),
        ("agent_error", {"code": "timeout", "error_message": "Too long."}, "timeout: Too long."),
        ("from_the_future", {"x": 1}, '{"x": 1}'),
        ("agent_thinking", {"thought": "\x1b[31mred"}, "\ufffd[31mred"),
    ],
)
def test_event_in_one_line(kind: str, data: dict[str, Any], line: str) -> None:
    assert summarize(Event(kind, 1, data, {})) == line


def test_long_event_is_shortened() -> None:
    line = summarize(Event("text_delta", 1, {"text": "x" * 1_000}, {}))
    assert len(line) == 160
    assert line.endswith("…")
