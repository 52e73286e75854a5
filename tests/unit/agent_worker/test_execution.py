from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from agent_worker import AgentError, InputDenied, InputExpired, Run, SyncRun
from agent_worker.definition import define_agent
from agent_worker.execution import RunExecution
from agent_worker.metrics import WorkerMetrics
from agent_worker.stops import CancelAsked, WorkerStops
from relay.errors import AGENT_ERRORS, GrammarViolation, RunEnded, StaleFence
from relay.events import EventType
from tests.unit.agent_worker.recording_stream import RecordingErrands, RecordingStream, make_info

GRACE_S = 0.2
SECRET = "postgres://root:hunter2@db"


class Attempt:
    """One attempt of an agent, from outside."""

    def __init__(self, agent: Callable[[Any], Any], *, attempt: int = 1, **options: Any) -> None:
        self.attempt = attempt
        self.stream = RecordingStream(attempt)
        self.execution = RunExecution(
            define_agent("echo", agent, **options),
            cancel_grace_s=GRACE_S,
            metrics=WorkerMetrics(),
        )
        self.errands = RecordingErrands()

    async def carry_out(self) -> str:
        return await self.execution.carry_out(
            make_info(attempt=self.attempt),
            self.stream,  # type: ignore[arg-type]
            self.errands,
        )

    @property
    def last(self) -> tuple[str, dict[str, Any]]:
        return self.stream.events[-1]


async def carry_out(agent: Callable[[Any], Any], **options: Any) -> Attempt:
    attempt = Attempt(agent, **options)
    await attempt.carry_out()
    return attempt


async def test_returned_value_completes_the_run() -> None:
    async def agent(run: Run) -> dict[str, int]:
        await run.delta("streamed")
        return {"answer": 42}

    attempt = Attempt(agent)
    assert await attempt.carry_out() == "completed"
    assert attempt.stream.types == ["agent_started", "agent_completed"]
    assert attempt.last[1]["result"] == {"answer": 42}
    assert attempt.last[1]["duration_ms"] >= 0
    assert attempt.stream.is_closed


async def test_returning_nothing_gives_the_streamed_text() -> None:
    async def agent(run: Run) -> None:
        await run.delta("Hello ")
        async with run.tool("t"):
            pass
        await run.delta("world")

    attempt = await carry_out(agent)
    assert attempt.last[1]["result"] == "Hello world"


async def test_plain_function_is_an_agent_too() -> None:
    def agent(run: SyncRun) -> None:
        run.delta("from a thread")

    attempt = await carry_out(agent)
    assert attempt.last[1]["result"] == "from a thread"


@pytest.mark.parametrize("error", [ValueError(SECRET), SystemExit(SECRET), StopAsyncIteration()])
async def test_exception_ends_the_run_and_only_the_log_knows_why(error: BaseException) -> None:
    async def agent(run: Run) -> None:
        raise error

    with structlog.testing.capture_logs() as logs:
        attempt = await carry_out(agent)
    event_type, data = attempt.last
    assert event_type == "agent_error"
    assert data["code"] == "agent_failed"
    assert data["error_message"] == AGENT_ERRORS["agent_failed"].message
    assert data["is_recoverable"] is True
    assert "hunter2" not in str(attempt.stream.events)
    [line] = [line for line in logs if line["event"] == "agent_failed"]
    assert line["support_id"] == data["support_id"]
    assert line["log_level"] == "error"
    cause = line["exc_info"]
    assert cause is error or cause.__cause__ is error


async def test_support_ids_differ() -> None:
    async def agent(run: Run) -> None:
        raise ValueError

    first, second = await carry_out(agent), await carry_out(agent)
    assert first.last[1]["support_id"] != second.last[1]["support_id"]


async def test_agent_error_reaches_the_user_in_the_authors_words() -> None:
    async def agent(run: Run) -> None:
        raise AgentError("rate_limited", "Ten questions a minute.", retry_after_ms=900)

    event_type, data = (await carry_out(agent)).last
    assert event_type == "agent_error"
    assert (data["code"], data["error_message"]) == ("rate_limited", "Ten questions a minute.")
    assert data["retry_after_ms"] == 900
    assert data["support_id"].startswith("sup_")


async def test_unencodable_result_is_an_error_whose_place_is_logged() -> None:
    async def agent(run: Run) -> Any:
        return {"rows": [1, object()]}

    with structlog.testing.capture_logs() as logs:
        attempt = await carry_out(agent)
    assert attempt.last[0] == "agent_error"
    [line] = [line for line in logs if line["event"] == "agent_result_not_publishable"]
    assert "data.result.rows[1]" in line["reason"]
    assert line["support_id"] == attempt.last[1]["support_id"]


async def test_malformed_agent_error_still_ends_the_run() -> None:
    async def agent(run: Run) -> None:
        raise AgentError("timeout", "Slow", retry_after_ms=-1)

    attempt = await carry_out(agent)
    assert attempt.last[0] == "agent_error"
    assert attempt.last[1]["code"] == "agent_failed"


async def test_time_limit_ends_the_run_with_timeout() -> None:
    async def agent(run: Run) -> None:
        async with run.tool("slow"):
            await asyncio.Event().wait()

    attempt = await carry_out(agent, timeout_s=0.05)
    assert attempt.stream.types[-2:] == ["tool_completed", "agent_error"]
    assert attempt.stream.of_type(EventType.TOOL_COMPLETED)[0]["status"] == "cancelled"
    assert attempt.last[1]["code"] == "timeout"


async def test_agent_within_its_time_limit_completes() -> None:
    async def agent(run: Run) -> str:
        await asyncio.sleep(0.01)
        return "in time"

    assert (await carry_out(agent, timeout_s=5)).last[0] == "agent_completed"


async def test_cancelled_error_that_nobody_asked_for_is_a_failure() -> None:
    async def agent(run: Run) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    attempt = await carry_out(agent)
    assert attempt.last[1]["code"] == "agent_failed"


async def start(attempt: Attempt, entered: asyncio.Event) -> asyncio.Task[str]:
    task = asyncio.create_task(attempt.carry_out())
    async with asyncio.timeout(5):
        await entered.wait()
    return task


async def test_cancelling_ends_the_run_as_cancelled_with_who_and_why() -> None:
    entered = asyncio.Event()
    cleaned: list[str] = []

    async def agent(run: Run) -> None:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            await run.thinking("Tidying up")
            cleaned.append("yes")

    attempt = Attempt(agent)
    task = await start(attempt, entered)
    attempt.execution.request_stop(CancelAsked("user", "changed my mind"))
    attempt.execution.request_stop(CancelAsked("admin"))
    assert await task == "cancelled"
    assert cleaned == ["yes"]
    assert attempt.stream.types[-2:] == ["agent_thinking", "agent_cancelled"]
    data = attempt.last[1]
    assert (data["by"], data["reason"]) == ("user", "changed my mind")


async def test_cancelled_before_it_was_claimed_never_begins() -> None:
    async def agent(run: Run) -> None:
        raise AssertionError

    attempt = Attempt(agent)
    attempt.execution.request_stop(CancelAsked("user"))
    assert await attempt.carry_out() == "cancelled"
    assert attempt.stream.types == ["agent_cancelled"]


async def test_cancel_flag_of_an_acknowledgement_is_enough() -> None:
    entered = asyncio.Event()

    async def agent(run: Run) -> None:
        entered.set()
        await asyncio.Event().wait()

    attempt = Attempt(agent)
    task = await start(attempt, entered)
    attempt.stream.cancel_requested = b'{"by":"admin","reason":"too expensive"}'
    assert await task == "cancelled"
    assert attempt.last[1]["by"] == "admin"


async def test_agent_that_returns_although_cancelled_is_cancelled() -> None:
    entered = asyncio.Event()

    async def agent(run: Run) -> str:
        try:
            entered.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "half an answer"
        return "x"

    attempt = Attempt(agent)
    task = await start(attempt, entered)
    attempt.execution.request_stop(CancelAsked("user"))
    assert await task == "cancelled"


async def test_cancellation_after_the_result_does_not_undo_it() -> None:
    returning = asyncio.Event()

    async def agent(run: Run) -> str:
        returning.set()
        return "done"

    attempt = Attempt(agent)
    task = await start(attempt, returning)
    attempt.stream.gate = asyncio.Event()
    await asyncio.sleep(0.01)  # The agent has returned; its result waits at the gate.
    attempt.execution.request_stop(CancelAsked("user"))
    attempt.stream.gate.set()
    assert await task == "completed"


async def test_agent_that_ignores_cancellation_is_abandoned_after_the_grace_time() -> None:
    entered = asyncio.Event()
    swallowed: list[str] = []
    late: list[Exception] = []

    async def agent(run: Run) -> None:
        entered.set()
        try:
            while True:
                try:
                    await asyncio.sleep(0.02)
                except asyncio.CancelledError:
                    swallowed.append("again")
        except GeneratorExit:
            try:
                run.thinking("x").send(None)
            except GrammarViolation as error:
                late.append(error)
            raise

    attempt = Attempt(agent)
    task = await start(attempt, entered)
    began_s = asyncio.get_running_loop().time()
    attempt.execution.request_stop(CancelAsked("user"))
    assert await task == "cancelled"
    took_s = asyncio.get_running_loop().time() - began_s
    assert swallowed == ["again", "again"]
    assert "did not stop in time" in str(late[0])
    assert GRACE_S * 0.9 <= took_s < GRACE_S * 3
    assert attempt.stream.types == ["agent_started", "agent_cancelled"]


async def test_blocking_thread_is_left_behind_after_the_grace_time() -> None:
    entered = asyncio.Event()
    loop = asyncio.get_running_loop()
    release, outcome = threading.Event(), threading.Event()

    def agent(run: SyncRun) -> None:
        loop.call_soon_threadsafe(entered.set)
        release.wait(5)
        try:
            run.delta("too late")
        except asyncio.CancelledError:
            outcome.set()

    attempt = Attempt(agent)
    task = await start(attempt, entered)
    attempt.execution.request_stop(CancelAsked("user"))
    assert await task == "cancelled"
    release.set()
    assert await asyncio.to_thread(outcome.wait, 5)
    assert attempt.stream.types == ["agent_started", "agent_cancelled"]


async def test_hurry_cuts_the_grace_time_short() -> None:
    entered = asyncio.Event()

    async def agent(run: Run) -> None:
        entered.set()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    attempt = Attempt(agent)
    attempt.execution = RunExecution(
        define_agent("echo", agent), cancel_grace_s=60, metrics=WorkerMetrics()
    )
    task = await start(attempt, entered)
    attempt.execution.request_stop(WorkerStops())
    await asyncio.sleep(0.01)
    attempt.execution.hurry()
    async with asyncio.timeout(2):
        assert await task == "error"
    assert attempt.last[1]["code"] == "worker_lost"
    assert attempt.last[1]["is_recoverable"] is True


@pytest.mark.parametrize("refusal", [StaleFence("superseded"), RunEnded("run_1", "cancelled")])
async def test_refused_run_is_stopped_and_publishes_nothing_more(refusal: Any) -> None:
    entered = asyncio.Event()
    seen: list[Exception] = []

    async def agent(run: Run) -> None:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            try:
                await run.thinking("One more thing")
            except GrammarViolation as error:
                seen.append(error)

    attempt = Attempt(agent)
    task = await start(attempt, entered)
    with structlog.testing.capture_logs() as logs:
        attempt.stream.refused = refusal
        attempt.execution.refuse(refusal)
        assert await task == "refused"
    assert seen
    assert attempt.stream.types == ["agent_started"]
    expected = "run_ended_elsewhere" if isinstance(refusal, RunEnded) else "run_refused"
    assert expected in [line["event"] for line in logs]


async def test_end_that_is_refused_is_reported_as_refused() -> None:
    async def agent(run: Run) -> str:
        attempt.stream.refused = RunEnded("run_1", "cancelled")
        return "too late"

    attempt = Attempt(agent)
    assert await attempt.carry_out() == "refused"


@pytest.mark.parametrize("steps", range(14))
async def test_cancelling_the_worker_at_any_await_takes_the_agent_along(steps: int) -> None:
    agents: list[asyncio.Task[Any] | None] = []

    async def agent(run: Run) -> str:
        agents.append(asyncio.current_task())
        async with run.tool("t"):
            await run.delta("x")
        await asyncio.sleep(0)
        return "done"

    attempt = Attempt(agent)
    task = asyncio.create_task(attempt.carry_out())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=2)
    assert task.done()
    for _ in range(10):
        await asyncio.sleep(0)
    assert all(agent_task is not None and agent_task.done() for agent_task in agents)
    assert attempt.stream.is_closed or not attempt.stream.events


def test_keyboard_interrupt_in_an_agent_ends_the_loop() -> None:
    async def agent(run: Run) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(Attempt(agent).carry_out())


def test_exit_in_an_agent_does_not_end_the_loop() -> None:
    async def agent(run: Run) -> None:
        sys.exit(2)

    assert asyncio.run(Attempt(agent).carry_out()) == "error"


async def failing(run: Run) -> None:
    async with run.tool("t"):
        raise ValueError(SECRET)


async def test_failed_attempt_is_followed_by_another_where_the_author_says_so() -> None:
    attempt = Attempt(failing, max_attempts=2)
    with structlog.testing.capture_logs() as logs:
        assert await attempt.carry_out() == "retrying"
    assert attempt.last == (
        "agent_retrying",
        {"attempt": 2, "reason": "agent_failed", "delay_ms": 1000},
    )
    assert "hunter2" not in str(attempt.stream.events)
    assert attempt.execution.retry is not None
    assert attempt.execution.retry.delay_ms == 1000
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["attempt_failed"]


async def test_last_attempt_that_fails_ends_the_run() -> None:
    attempt = await carry_out(failing, max_attempts=2, attempt=2)
    assert attempt.last[0] == "agent_error"


async def test_recoverable_error_is_retried_when_its_author_says() -> None:
    async def agent(run: Run) -> None:
        raise AgentError("upstream_unavailable", "The library is closed.", retry_after_ms=90_000)

    attempt = await carry_out(agent, max_attempts=3)
    assert attempt.last[1] == {
        "attempt": 2,
        "reason": "upstream_unavailable",
        "delay_ms": 90_000,
        "message": "The library is closed.",
    }


@pytest.mark.parametrize(
    "error",
    [AgentError("invalid_request", "No."), InputDenied("req_1"), InputExpired("req_1")],
)
async def test_errors_that_no_other_attempt_would_cure_end_the_run(error: AgentError) -> None:
    async def agent(run: Run) -> None:
        raise error

    attempt = await carry_out(agent, max_attempts=3)
    assert attempt.last[0] == "agent_error"
    assert attempt.last[1]["error_message"] == error.error_message


async def fail_in_groups(*errors: Exception) -> None:
    async def fail_with(error: Exception) -> None:
        raise error

    async def fail_within() -> None:
        async with asyncio.TaskGroup() as inner:
            for error in errors:
                inner.create_task(fail_with(error))

    async with asyncio.TaskGroup() as outer:
        outer.create_task(fail_within())


@pytest.mark.parametrize(
    "error",
    [AgentError("invalid_request", "No."), InputDenied("req_1"), InputExpired("req_1")],
)
async def test_error_in_a_task_group_counts_as_if_it_were_alone(error: AgentError) -> None:
    async def agent(run: Run) -> None:
        async with run.tool("both"):
            await fail_in_groups(ValueError(SECRET), error)

    attempt = Attempt(agent, max_attempts=3)
    with structlog.testing.capture_logs() as logs:
        assert await attempt.carry_out() == "error"
    assert attempt.last[1]["error_message"] == error.error_message
    assert attempt.last[1]["code"] == error.code
    [tool] = attempt.stream.of_type(EventType.TOOL_COMPLETED)
    assert (tool["status"], tool["error"]) == ("error", error.error_message)
    # What failed beside it is not lost.
    [line] = [line for line in logs if line["event"] == "agent_error"]
    assert isinstance(line["exc_info"], ExceptionGroup)


async def test_recoverable_error_in_a_task_group_is_retried_when_it_says() -> None:
    async def agent(run: Run) -> None:
        await fail_in_groups(AgentError("rate_limited", "Ten a minute.", retry_after_ms=90_000))

    attempt = await carry_out(agent, max_attempts=3)
    assert attempt.last[1] == {
        "attempt": 2,
        "reason": "rate_limited",
        "delay_ms": 90_000,
        "message": "Ten a minute.",
    }


async def test_task_group_of_unforeseen_errors_is_one() -> None:
    async def agent(run: Run) -> None:
        await fail_in_groups(ValueError(SECRET), LookupError(SECRET))

    attempt = await carry_out(agent)
    assert attempt.last[1]["error_message"] == AGENT_ERRORS["agent_failed"].message


async def test_cancellation_wins_over_another_attempt() -> None:
    attempt = Attempt(failing, max_attempts=2)
    attempt.stream.cancel_requested = b'{"by":"user"}'
    assert await attempt.carry_out() == "cancelled"


async def test_stopping_worker_hands_its_run_to_the_next_attempt() -> None:
    async def agent(run: Run) -> None:
        await asyncio.Event().wait()

    attempt = Attempt(agent, max_attempts=2)
    task = asyncio.create_task(attempt.carry_out())
    await asyncio.sleep(0.01)
    attempt.execution.request_stop(WorkerStops())
    assert await task == "retrying"
    assert attempt.last[1] == {"attempt": 2, "reason": "worker_stopping", "delay_ms": 0}


async def test_run_that_never_began_is_given_back() -> None:
    attempt = Attempt(failing)
    attempt.errands.is_released = True
    attempt.execution.request_stop(WorkerStops())
    assert await attempt.carry_out() == "released"
    assert attempt.stream.events == []


async def test_failure_that_cannot_be_told_still_ends_the_attempt() -> None:
    async def agent(run: Run) -> None:
        raise AgentError("upstream_unavailable", "\ud800")

    attempt = await carry_out(agent, max_attempts=2)
    assert attempt.last[0] == "agent_error"
    assert attempt.last[1]["code"] == "agent_failed"
