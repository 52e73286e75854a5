from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent_worker import InputDenied, InputExpired, Run, SyncRun
from agent_worker.sync_run import call_in_thread
from relay.errors import InvalidEvent
from relay.events import EventType, parse_timestamp
from tests.unit.agent_worker.recording_stream import RecordingStream, make_run

REQUESTED = EventType.INPUT_REQUESTED


async def asked(stream: RecordingStream) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while not stream.grammar.open_inputs:
            await asyncio.sleep(0)
    return stream.of_type(REQUESTED)[-1]


async def reply_to(run: Run, stream: RecordingStream, **answer: Any) -> dict[str, Any]:
    question = await asked(stream)
    run.receive_answer(question["request_id"], {"by": "user", **answer})
    return question


async def test_answer_is_what_ask_gives() -> None:
    run, stream, _ = await make_run()
    asking = asyncio.create_task(run.ask("Which city?", timeout_s=60))
    question = await reply_to(run, stream, outcome="answered", value="Oslo")
    assert await asking == "Oslo"
    assert (question["prompt"], question["kind"]) == ("Which city?", "text")
    assert "schema" not in question
    assert not stream.grammar.open_inputs, "what follows must be legal"
    await run.thinking("on we go")


async def test_expiry_is_told_to_the_reaper() -> None:
    stream = RecordingStream()
    run, stream, _ = await make_run()
    asking = asyncio.create_task(run.ask("?", timeout_s=60))
    question = await reply_to(run, stream, outcome="answered", value="x")
    await asking
    looks = run._children._errands.looks  # type: ignore[attr-defined]
    assert looks == [parse_timestamp(question["expires_at"])]


async def test_choices_become_a_schema() -> None:
    run, stream, _ = await make_run()
    asking = asyncio.create_task(run.ask("Size?", "choice", choices=["S", "M"]))
    question = await reply_to(run, stream, outcome="answered", value="M")
    assert await asking == "M"
    assert question["schema"] == {"enum": ["S", "M"]}


@pytest.mark.parametrize(
    ("answer", "error"),
    [({"outcome": "denied"}, InputDenied), ({"outcome": "expired"}, InputExpired)],
)
async def test_no_answer_raises_what_happened(
    answer: dict[str, str], error: type[Exception]
) -> None:
    run, stream, _ = await make_run()
    asking = asyncio.create_task(run.ask("?"))
    await reply_to(run, stream, **answer)
    with pytest.raises(error):
        await asking


@pytest.mark.parametrize(
    ("answer", "is_approved"),
    [
        ({"outcome": "answered", "value": True}, True),
        ({"outcome": "answered", "value": False}, False),
        ({"outcome": "denied"}, False),
        ({"outcome": "expired"}, False),
    ],
)
async def test_only_a_yes_approves(answer: dict[str, Any], is_approved: bool) -> None:
    run, stream, _ = await make_run()
    asking = asyncio.create_task(run.approve("Send?", timeout_s=5))
    question = await reply_to(run, stream, **answer)
    assert question["kind"] == "approval"
    assert await asking is is_approved


async def test_second_answer_and_answers_to_nobody_are_ignored() -> None:
    run, stream, _ = await make_run()
    asking = asyncio.create_task(run.ask("?"))
    question = await reply_to(run, stream, outcome="answered", value=1)
    run.receive_answer(question["request_id"], {"outcome": "answered", "value": 2})
    run.receive_answer("req_other", {"outcome": "answered", "value": 3})
    assert await asking == 1


async def test_question_that_nobody_waits_for_any_more_is_closed() -> None:
    run, stream, _ = await make_run()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await run.ask("?")
    [resolved] = stream.of_type(EventType.INPUT_RESOLVED)
    assert (resolved["outcome"], resolved["by"]) == ("cancelled", "system")


async def test_two_questions_at_once_have_answers_of_their_own() -> None:
    run, stream, _ = await make_run()
    first = asyncio.create_task(run.ask("one?"))
    second = asyncio.create_task(run.ask("two?"))
    async with asyncio.timeout(5):
        while len(stream.grammar.open_inputs) < 2:
            await asyncio.sleep(0)
    for question in stream.of_type(REQUESTED):
        value = question["prompt"]
        run.receive_answer(question["request_id"], {"outcome": "answered", "value": value})
    assert await asyncio.gather(first, second) == ["one?", "two?"]


@pytest.mark.parametrize(
    "question",
    [
        {"kind": "approval"},
        {"kind": "choice"},
        {"kind": "choice", "choices": []},
        {"kind": "choice", "choices": "ab"},
        {"kind": "text", "choices": ["a"]},
        {"kind": "choice", "choices": ["a"], "schema": {}},
        {"schema": {"type": "nonsense"}},
        {"timeout_s": 0},
        {"timeout_s": float("inf")},
        {"timeout_s": "5"},
    ],
)
async def test_question_that_is_not_allowed_reaches_nobody(question: dict[str, Any]) -> None:
    run, stream, _ = await make_run()
    with pytest.raises(InvalidEvent, match="input_requested"):
        await run.ask("?", **question)
    assert stream.types == ["agent_started"]


async def test_plain_function_asks_as_well() -> None:
    run, stream, _ = await make_run()

    def agent(sync: SyncRun) -> Any:
        with sync.step("Asking", total_steps=1) as step:
            assert step.number == 1
            return sync.ask("?"), sync.approve("!")

    task = asyncio.create_task(call_in_thread(agent, run))
    await reply_to(run, stream, outcome="answered", value="yes")
    await reply_to(run, stream, outcome="answered", value=True)
    assert await task == ("yes", True)


async def test_steps_are_numbered_thoughts() -> None:
    run, stream, _ = await make_run()
    async with run.step("Collect", total_steps=2), run.tool("fetch"):
        pass
    async with run.step("Write") as step:
        assert (step.name, step.number) == ("Write", 2)
    assert stream.of_type(EventType.AGENT_THINKING) == [
        {"thought": "Collect", "step": 1, "total_steps": 2},
        {"thought": "Write", "step": 2},
    ]


async def test_nobody_waits_for_an_answer_once_the_attempt_is_over() -> None:
    run, _, outlet = await make_run()
    asking = asyncio.create_task(run.ask("?"))
    await asyncio.sleep(0.01)
    outlet.close("the run has ended")
    await run.end_waits()
    with pytest.raises(asyncio.CancelledError):
        await asking
