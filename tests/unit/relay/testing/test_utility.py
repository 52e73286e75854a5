"""What a client's assertions say of streams, right and wrong ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from relay.testing import WebSocketTestUtility
from relay.testing.recording import RecordingState

Frame = dict[str, Any]
RUN = "run_1"


def event(event_type: str, offset: int, seq: int | None = None, **data: Any) -> Frame:
    numbers = {} if seq is None else {"seq": seq}
    return {
        "type": event_type,
        "offset": offset,
        "run_id": RUN,
        "user_id": "alice",
        "attempt": 1,
        "timestamp": "2026-11-22T14:00:00.123Z",
        "data": data,
        **numbers,
    }


def established(position: str = "e:0") -> Frame:
    return {
        "type": "connection_established",
        "user_id": "alice",
        "position": position,
        "recovered": True,
        "heartbeat_ms": 15_000,
        "connection_id": "c",
        "node": "n",
    }


def whole_run() -> list[Frame]:
    call = {"tool_call_id": "c1", "tool_name": "look"}
    return [
        event("agent_queued", 1, 1, message_id="m", content="hi", metadata={}),
        event("agent_started", 2, 2),
        event("tool_executing", 3, 3, **call, parameters={}),
        event("tool_completed", 4, 4, **call, status="ok", result=1, duration_ms=1),
        event("text_delta", 5, message_id="t", position=0, text="Hello, "),
        event("text_delta", 6, message_id="t", position=7, text="you."),
        event("agent_completed", 7, 5, result="Hello, you.", duration_ms=1),
    ]


def client_of(*frames: Frame, user_id: str = "alice") -> WebSocketTestUtility:
    """Give a client that has received these frames."""
    client = WebSocketTestUtility(user_id, user_id, ["http://127.0.0.1:1"], "token")
    state = RecordingState("active", client._record)
    for frame in (established(), *frames):
        state._receive(frame["type"], frame)
    return client


def refused(check: Callable[[], None]) -> str:
    with pytest.raises(AssertionError) as caught:
        check()
    return str(caught.value)


def test_whole_run_is_complete() -> None:
    client = client_of(*whole_run())
    client.assert_complete(RUN, text="Hello, you.")
    client.assert_lifecycle(RUN)
    client.assert_isolated()


@pytest.mark.parametrize(
    "expected",
    [
        ["agent_queued", ..., "agent_completed"],
        [...],
        [..., "tool_executing", "tool_completed", ...],
        ["agent_queued", "agent_started", "tool_executing", "tool_completed", "agent_completed"],
    ],
)
def test_lifecycle_fits(expected: list[Any]) -> None:
    client_of(*whole_run()).assert_lifecycle(RUN, expected)


@pytest.mark.parametrize(
    "expected",
    [
        [],
        ["agent_queued", "agent_completed"],
        [..., "tool_executing"],
        [..., "input_requested", ...],
        ["agent_started", ...],
    ],
)
def test_lifecycle_that_does_not_fit_shows_what_came(expected: list[Any]) -> None:
    text = refused(lambda: client_of(*whole_run()).assert_lifecycle(RUN, expected))
    assert "went another way" in text
    assert "came:     agent_queued, agent_started, tool_executing" in text
    assert "tool_name='look'" in text, "the timeline is shown"


def test_hole_in_the_numbers_is_told() -> None:
    frames = whole_run()
    del frames[2:4]
    text = refused(lambda: client_of(*frames).assert_lifecycle(RUN))
    assert "seq [1, 2, 5]" in text


def test_run_without_an_end_is_told_unless_it_may_go_on() -> None:
    client = client_of(*whole_run()[:-1])
    assert "has not ended" in refused(lambda: client.assert_lifecycle(RUN))
    client.assert_lifecycle(RUN, ["agent_queued", ..., "tool_completed"], is_ended=False)


def test_run_that_never_came_is_told() -> None:
    assert "has not ended" in refused(lambda: client_of().assert_lifecycle(RUN))


def test_event_against_the_grammar_is_told() -> None:
    frames = whole_run()
    frames[3]["data"]["tool_call_id"] = "another"
    text = refused(lambda: client_of(*frames).assert_lifecycle(RUN))
    assert "breaks the grammar" in text
    assert "another is not open" in text


def test_text_with_a_hole_is_told() -> None:
    frames = [frame for frame in whole_run() if frame["offset"] != 5]
    text = refused(lambda: client_of(*frames).assert_complete(RUN))
    assert "does not fit together" in text


def test_another_text_is_told() -> None:
    text = refused(lambda: client_of(*whole_run()).assert_complete(RUN, text="Hello."))
    assert "'Hello, you.' instead of 'Hello.'" in text


def test_text_of_a_superseded_attempt_does_not_count() -> None:
    again = {
        **event("text_delta", 9, message_id="t2", position=0, text="Second."),
        "attempt": 2,
    }
    assert client_of(*whole_run(), again).text_of(RUN) == "Second."


def test_event_of_another_user_is_told() -> None:
    foreign = {**event("notice", 1), "user_id": "bob"}
    text = refused(client_of(foreign).assert_isolated)
    assert "'bob'" in text


def test_run_that_two_users_received_is_told() -> None:
    alice = client_of(*whole_run())
    thief = client_of(*whole_run(), user_id="mallory")
    assert RUN in refused(lambda: alice.assert_isolated(thief))


def test_second_tab_of_the_same_user_is_not_foreign() -> None:
    client_of(*whole_run()).assert_isolated(client_of(*whole_run()))


def test_what_came_before_a_reset_does_not_count() -> None:
    reset = {"type": "reset", "position": "f:0", "reason": "unknown epoch", "runs": []}
    client = client_of(*whole_run()[:4], reset, *whole_run())
    client.assert_complete(RUN)
    assert len(client.events_of(RUN)) == 7


async def test_wait_for_counts_what_came_before() -> None:
    client = client_of(*whole_run())
    assert (await client.wait_for("agent_started"))["seq"] == 2
    assert (await client.wait_for("text_delta", count=2))["data"]["text"] == "you."
    found = await client.wait_for("text_delta", where=lambda one: one["data"]["position"] == 7)
    assert found["offset"] == 6
    assert (await client.wait_end(RUN))["type"] == "agent_completed"


async def test_wait_for_takes_what_comes_later() -> None:
    client = client_of()
    waiting = asyncio.create_task(client.wait_for("agent_queued"))
    await asyncio.sleep(0)
    client._record(whole_run()[0], [])
    assert (await waiting)["seq"] == 1


async def test_wait_for_what_does_not_come_shows_what_came() -> None:
    client = client_of(*whole_run())
    with pytest.raises(AssertionError) as caught:
        await client.wait_for("agent_error", 0.01, run_id=RUN)
    text = str(caught.value)
    assert f"no agent_error of {RUN} within 0.01 s" in text
    assert "agent_completed  offset=7" in text
    assert "result='Hello, you.'" in text


def test_timeline_tells_losses_and_leaves_out_other_runs() -> None:
    other = {**event("agent_queued", 8, 1), "run_id": "run_2"}
    client = client_of(*whole_run(), other)
    client._note_loss("the network is gone")
    story = client.timeline(RUN)
    assert "run_2" not in story
    assert "connection lost: the network is gone" in story
    assert "run_2" in client.timeline()


def test_long_timeline_is_cut_at_its_beginning() -> None:
    thoughts = [event("agent_thinking", at, at, thought="x" * 500) for at in range(3, 203)]
    story = client_of(*whole_run()[:2], *thoughts).timeline()
    assert "lines before" in story
    assert "seq=202" in story
    assert len(story) < 20_000


def test_event_in_parts_is_told_as_one() -> None:
    client = client_of(*whole_run()[:2])
    whole = '{"type":"agent_completed","offset":3,"run_id":"run_1","seq":3,"attempt":1,"data":{}}'
    state = RecordingState("active", client._record)
    state._receive("connection_established", established("e:2"))
    for index, text in enumerate((whole[:20], whole[20:])):
        part = {"type": "event_part", "offset": 3, "index": index, "total": 2, "text": text}
        state._receive("event_part", part)
    story = client.timeline()
    assert "agent_completed  offset=3 run_id=run_1 seq=3 attempt=1 (in parts)" in story
    assert "event_part" not in story


def test_text_is_superseded_before_the_next_attempt_streams_any() -> None:
    first = whole_run()[:-1]
    retrying = event("agent_retrying", 7, 5, attempt=2, reason="worker_lost", delay_ms=0)
    started = {**event("agent_started", 8, 6), "attempt": 2}
    ended = {**event("agent_completed", 9, 7, result="", duration_ms=1), "attempt": 2}
    assert client_of(*first).text_of(RUN) == "Hello, you."
    assert client_of(*first, retrying).text_of(RUN) == ""
    assert client_of(*first, retrying, started).text_of(RUN) == ""
    client = client_of(*first, retrying, started, ended)
    client.assert_complete(RUN, text="")
    text = refused(lambda: client.assert_complete(RUN, text="Hello, you."))
    assert "'' instead of 'Hello, you.'" in text
