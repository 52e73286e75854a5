"""Every recorded stream is held against the grammar, whatever the test itself looked at."""

from __future__ import annotations

import re
from typing import Any

import pytest

from relay.testing import streams
from tests.unit.relay.testing.test_utility import Frame, client_of, established, event, whole_run


def problems_of(*frames: Frame, user_id: str | None = "alice") -> list[str]:
    with streams.watching() as watch:
        streams.record("tab", user_id, lambda: [established(), *frames])
    return [problem.kind for problem in watch.problems()]


def test_legal_stream_has_no_problem() -> None:
    assert problems_of(*whole_run()) == []


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        pytest.param([*whole_run(), event("agent_thinking", 8, 6)], "grammar", id="after-the-end"),
        pytest.param([*whole_run(), *whole_run()[-1:]], "twice", id="twice"),
        pytest.param([*whole_run()[:2], *whole_run()[3:]], "hole", id="hole"),
        pytest.param([{**whole_run()[0], "user_id": "bob"}], "foreign", id="foreign"),
        pytest.param(
            [whole_run()[0], event("agent_thinking", 2, 2, thought="early")],
            "grammar",
            id="before-the-start",
        ),
    ],
)
def test_broken_promise_is_named(frames: list[Any], kind: str) -> None:
    assert kind in problems_of(*frames)


def test_whose_stream_it_is_can_come_from_the_gateway() -> None:
    assert problems_of(*whole_run(), user_id=None) == []
    foreign = {**whole_run()[0], "user_id": "bob"}
    assert problems_of(foreign, user_id=None) == ["foreign"]


def test_stream_of_somebody_who_was_never_let_in_is_nothing() -> None:
    with streams.watching() as watch:
        streams.record("tab", None, lambda: [{"type": "error"}])
    assert watch.problems() == []


def test_failure_names_client_and_what_led_to_it() -> None:
    with streams.watching() as watch:
        streams.record("phone", "alice", lambda: [established(), *whole_run(), *whole_run()[-1:]])
    assert re.search(r"(?s)twice: phone \(0\).*seq=4", watch.complaint())


def test_client_that_begins_anew_may_be_told_again() -> None:
    with streams.watching() as watch:
        client = client_of()
        client._begin_stream()
        client.frames.clear()
        for _ in range(2):
            client.frames += [(0.0, frame) for frame in (established(), *whole_run())]
            client._begin_stream()
    assert len(watch.streams) == 3
    assert watch.problems() == []


def test_nothing_is_kept_where_nobody_watches() -> None:
    with streams.watching() as watch:
        pass
    streams.record("tab", "alice", list)
    assert watch.streams == []
