from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

import pytest

from agent_worker import Run, SyncRun
from agent_worker.sync_run import call_in_thread
from relay.errors import GrammarViolation, InvalidEvent
from tests.unit.agent_worker.recording_stream import make_run


async def test_plain_function_uses_the_same_calls_without_await() -> None:
    run, stream, _ = await make_run()

    def agent(sync: SyncRun) -> str:
        sync.thinking("Counting", step=1)
        with sync.tool("count", {"n": 2}) as tool:
            sync.progress(50, "half")
            tool.progress(75)
            tool.result = 2
        sync.delta("two")
        sync.custom("n", 2)
        return f"{sync.text} for {sync.user_id}: {sync.request.content}"

    assert await call_in_thread(agent, run) == "two for alice: hello"
    assert stream.types == [
        "agent_started",
        "agent_thinking",
        "tool_executing",
        "tool_progress",
        "tool_progress",
        "tool_completed",
        "custom",
    ]


async def test_it_runs_in_a_thread_so_that_it_may_block() -> None:
    run, _, _ = await make_run()
    release = threading.Event()

    def agent(_: SyncRun) -> int:
        assert release.wait(5)
        return threading.get_ident()

    task = asyncio.create_task(call_in_thread(agent, run))
    await asyncio.sleep(0)
    release.set()  # The loop is free to do this.
    assert await task != threading.get_ident()


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), StopIteration()])
async def test_what_it_raises_is_raised_where_it_is_awaited(error: BaseException) -> None:
    run, _, _ = await make_run()

    def agent(_: SyncRun) -> None:
        raise error

    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected):
        await call_in_thread(agent, run)


async def test_mistakes_raise_in_the_thread() -> None:
    run, stream, _ = await make_run()
    seen: list[Exception] = []

    def agent(sync: SyncRun) -> None:
        for call in (lambda: sync.thinking("x", step=-1), lambda: sync.progress(1)):
            try:
                call()
            except (InvalidEvent, GrammarViolation) as error:
                seen.append(error)

    await call_in_thread(agent, run)
    assert [type(error) for error in seen] == [InvalidEvent, GrammarViolation]
    assert stream.types == ["agent_started"]


async def test_cancelling_raises_in_the_call_that_waits() -> None:
    run, stream, _ = await make_run()
    entered, raised = threading.Event(), threading.Event()

    def agent(sync: SyncRun) -> None:
        entered.set()
        try:
            sync.thinking("never accepted")
        except asyncio.CancelledError:
            raised.set()
            raise

    stream.gate = asyncio.Event()
    task = asyncio.create_task(call_in_thread(agent, run))
    assert await asyncio.to_thread(entered.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert raised.is_set()


async def test_function_can_ask_whether_it_is_to_stop() -> None:
    run, _, _ = await make_run()
    entered = threading.Event()
    late_calls: list[Any] = []

    def agent(sync: SyncRun) -> str:
        entered.set()
        while not sync.is_cancelled:
            threading.Event().wait(0.005)
        for call in (lambda: sync.delta("x"), lambda: sync.tool("x").__enter__()):
            try:
                call()
            except asyncio.CancelledError as error:
                late_calls.append(error)
        return "stopped by itself"

    task = asyncio.create_task(call_in_thread(agent, run))
    assert await asyncio.to_thread(entered.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(late_calls) == 2


async def test_left_behind_function_cannot_publish_any_more() -> None:
    run, stream, _ = await make_run()
    entered, release, ended = threading.Event(), threading.Event(), threading.Event()
    outcome: list[BaseException] = []

    def agent(sync: SyncRun) -> None:
        entered.set()
        release.wait(5)
        try:
            sync.delta("too late")
        except asyncio.CancelledError as error:
            outcome.append(error)
        ended.set()

    coroutine = call_in_thread(agent, run)
    task = asyncio.create_task(coroutine)
    assert await asyncio.to_thread(entered.wait, 5)
    coroutine.close()
    task.cancel()
    await asyncio.wait({task})
    release.set()
    assert await asyncio.to_thread(ended.wait, 5)
    assert outcome
    assert stream.text == ""


OWN_CALLS = {"carry_out", "is_cancelled", "stop"}
CALLS_OF_THE_WORKER = {"receive_answer", "end_waits"}


def test_every_call_of_a_run_is_there_with_the_same_signature() -> None:
    def public(owner: type) -> dict[str, Any]:
        return {name: item for name, item in vars(owner).items() if not name.startswith("_")}

    def shape(item: Any) -> Any:
        if isinstance(item, property):
            return inspect.signature(item.fget).return_annotation  # type: ignore[arg-type]
        signature = inspect.signature(item)
        named = [
            (one.name, one.kind, one.default, one.annotation)
            for one in signature.parameters.values()
        ]
        return named, str(signature.return_annotation).removeprefix("Sync")

    run = {name: shape(item) for name, item in public(Run).items()}
    sync = {name: shape(item) for name, item in public(SyncRun).items()}
    assert run.keys() - CALLS_OF_THE_WORKER == sync.keys() - OWN_CALLS
    assert {name: run[name] for name in sync.keys() - OWN_CALLS} == {
        name: sync[name] for name in sync.keys() - OWN_CALLS
    }
    assert SyncRun.ask.__doc__ == Run.ask.__doc__


async def test_a_type_checker_knows_the_arguments() -> None:
    run, _, _ = await make_run()

    def agent(sync: SyncRun) -> bool:
        with pytest.raises(TypeError):
            sync.thinking("x", steps=1)  # type: ignore[call-arg]
        answer: bool = sync.is_cancelled
        return answer

    assert await call_in_thread(agent, run) is False
