from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent_worker import AgentError
from agent_worker.tool import TOOL_FAILED
from relay.errors import EncodingFailed, GrammarViolation, InvalidEvent, RunEnded
from relay.events import EventType
from tests.unit.agent_worker.recording_stream import make_run

COMPLETED = EventType.TOOL_COMPLETED
PROGRESS = EventType.TOOL_PROGRESS


async def test_run_tells_who_asked_for_what() -> None:
    run, _, _ = await make_run()
    assert (run.run_id, run.user_id, run.thread_id) == ("run_1", "alice", "t1")
    assert (run.agent, run.attempt) == ("echo", 1)
    assert run.request.content == "hello"
    assert run.request.metadata == {"lang": "en"}
    assert run.request.message_id == "m1"


async def test_thinking_publishes_what_was_given_only() -> None:
    run, stream, _ = await make_run()
    await run.thinking("Looking", step=1, total_steps=2)
    assert stream.events[-1] == (
        "agent_thinking",
        {"thought": "Looking", "step": 1, "total_steps": 2},
    )


async def test_wrong_values_raise_and_reach_nobody() -> None:
    run, stream, _ = await make_run()
    with pytest.raises(InvalidEvent, match="progress_percentage"):
        await run.thinking("x", progress_percentage=101)
    with pytest.raises(InvalidEvent, match="must be str, not bytes"):
        await run.delta(b"x")  # type: ignore[arg-type]
    with pytest.raises(EncodingFailed, match="lone surrogate"):
        await run.delta("\ud800")
    with pytest.raises(EncodingFailed, match=r"data\.value\.when"):
        await run.custom("n", {"when": object()})
    assert stream.types == ["agent_started"]


async def test_deltas_make_up_the_text() -> None:
    run, _, _ = await make_run()
    for piece in ("Hel", "", "lo ", "wörld 🌍"):
        await run.delta(piece)
    assert run.text == "Hello wörld 🌍"


async def test_tool_shows_its_call_and_its_result() -> None:
    times = iter([10.0, 10.25])
    run, stream, _ = await make_run(clock=lambda: next(times))
    async with run.tool("search", {"q": "x"}, "Find it", 300) as tool:
        tool.result = {"hits": 3}
    call = tool.tool_call_id
    assert stream.events[1:] == [
        (
            "tool_executing",
            {
                "tool_call_id": call,
                "tool_name": "search",
                "purpose": "Find it",
                "parameters": {"q": "x"},
                "estimated_duration_ms": 300,
            },
        ),
        (
            "tool_completed",
            {
                "tool_call_id": call,
                "tool_name": "search",
                "status": "ok",
                "result": {"hits": 3},
                "duration_ms": 250,
            },
        ),
    ]


async def test_exception_in_a_tool_passes_and_its_text_stays_inside() -> None:
    run, stream, _ = await make_run()
    with pytest.raises(ConnectionError, match="secret-host"):
        async with run.tool("search"):
            raise ConnectionError("secret-host:5432 refused")
    [completed] = stream.of_type(COMPLETED)
    assert completed["status"] == "error"
    assert completed["error"] == TOOL_FAILED
    assert "result" not in completed
    assert "secret" not in str(stream.events)


async def test_agent_error_in_a_tool_shows_the_authors_words() -> None:
    run, stream, _ = await make_run()
    with pytest.raises(AgentError):
        async with run.tool("search"):
            raise AgentError("upstream_unavailable", "The library is closed.")
    assert stream.of_type(COMPLETED)[0]["error"] == "The library is closed."


async def test_an_agent_may_go_on_after_a_failed_tool() -> None:
    run, stream, _ = await make_run()
    for name in ("first", "second"):
        try:
            async with run.tool(name) as tool:
                if name == "first":
                    raise ValueError
                tool.result = 1
        except ValueError:
            await run.thinking("Trying another way")
    assert [data["status"] for data in stream.of_type(COMPLETED)] == ["error", "ok"]


async def test_cancelled_tool_is_shown_as_cancelled() -> None:
    run, stream, _ = await make_run()
    entered = asyncio.Event()

    async def agent() -> None:
        async with run.tool("slow"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(agent())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [completed] = stream.of_type(COMPLETED)
    assert completed["status"] == "cancelled"
    assert "error" not in completed


async def test_unencodable_result_fails_the_tool_and_raises_with_the_place() -> None:
    run, stream, _ = await make_run()
    with pytest.raises(EncodingFailed, match=r"data\.result\.items\[1\]"):
        async with run.tool("search") as tool:
            tool.result = {"items": [1, object()]}
    assert stream.of_type(COMPLETED)[0]["status"] == "error"
    assert not stream.grammar.open_tools


async def test_original_exception_survives_a_refused_end_of_the_tool() -> None:
    run, stream, _ = await make_run()

    async def agent() -> None:
        async with run.tool("search"):
            stream.refused = RunEnded("run_1", "cancelled")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await agent()


async def test_parallel_tools_report_progress_each_for_itself() -> None:
    run, stream, _ = await make_run()

    async def work(name: str, percentage: float) -> str:
        async with run.tool(name) as tool:
            await asyncio.sleep(0)
            await run.progress(percentage, note=name)
            return tool.tool_call_id

    first, second = await asyncio.gather(work("a", 10), work("b", 20))
    assert {(data["tool_call_id"], data["note"]) for data in stream.of_type(PROGRESS)} == {
        (first, "a"),
        (second, "b"),
    }


async def test_progress_speaks_for_the_innermost_tool() -> None:
    run, stream, _ = await make_run()
    async with run.tool("outer") as outer:
        async with run.tool("inner") as inner:
            await run.progress(1)
        await run.progress(2)
        await outer.progress(3)
    assert [data["tool_call_id"] for data in stream.of_type(PROGRESS)] == [
        inner.tool_call_id,
        outer.tool_call_id,
        outer.tool_call_id,
    ]


async def test_progress_without_an_open_tool_raises() -> None:
    run, _, _ = await make_run()
    with pytest.raises(GrammarViolation, match="no tool is open"):
        await run.progress(1)
    async with run.tool("a") as tool:
        pass
    with pytest.raises(GrammarViolation, match="no tool is open"):
        await run.progress(1)
    with pytest.raises(GrammarViolation, match="is not open"):
        await tool.progress(1)


async def test_task_that_outlives_its_tool_speaks_for_the_tool_around_it() -> None:
    run, stream, _ = await make_run()
    go_on = asyncio.Event()

    async def background() -> None:
        await go_on.wait()
        await run.progress(50)

    async with run.tool("outer") as outer:
        async with run.tool("inner"):
            task = asyncio.create_task(background())
            await asyncio.sleep(0)
        go_on.set()
        await task
    assert stream.of_type(PROGRESS)[0]["tool_call_id"] == outer.tool_call_id


async def test_tool_of_another_run_is_not_mistaken_for_this_runs() -> None:
    first, _, _ = await make_run()
    second, stream, _ = await make_run()
    async with first.tool("a"):
        with pytest.raises(GrammarViolation, match="no tool is open"):
            await second.progress(1)
    assert not stream.of_type(PROGRESS)


async def test_abandoned_generator_does_not_publish_from_its_tool() -> None:
    run, stream, _ = await make_run()

    async def pieces() -> AsyncIterator[int]:
        async with run.tool("stream"):
            yield 1
            yield 2

    generator: Any = pieces()
    await anext(generator)
    await generator.aclose()
    # Whoever ends the run closes the tool.
    assert not stream.of_type(COMPLETED)
    assert list(stream.grammar.open_tools.values()) == ["stream"]


async def test_closed_run_refuses_every_call_with_the_reason() -> None:
    run, stream, outlet = await make_run()
    outlet.close("the run has ended")
    outlet.close("a later reason does not count")
    for call in (
        run.thinking("x"),
        run.delta("x"),
        run.custom("x", 1),
        run.tool("x").__aenter__(),
    ):
        with pytest.raises(GrammarViolation, match="the run has ended"):
            await call
    assert stream.types == ["agent_started"]
