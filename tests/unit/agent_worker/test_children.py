from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent_worker import AgentError
from agent_worker.children import Children
from relay.errors import RequestRefused
from relay.run_model import RunDetail, RunSummary, derive_run_id
from tests.unit.agent_worker.recording_stream import RecordingErrands


def ended(status: str, **data: Any) -> RunDetail:
    summary = RunSummary("run_2", "t1", "other", status, 1, 3, 1, {}, {}, False, 0, 1)
    return RunDetail(summary, {"data": data} if status != "running" else None)


def below(errands: RecordingErrands) -> Children:
    return Children("alice", "run_1", 1, errands)


async def test_result_of_the_other_agent_is_given() -> None:
    errands = RecordingErrands()
    errands.child = ended("completed", result={"n": 1})
    assert await below(errands).call("other", "Count", {"k": "v"}) == {"n": 1}
    assert errands.started == [("other", "Count", {"k": "v"})]
    assert (errands.waiting, errands.stopped) == (0, [])


async def test_error_of_the_other_agent_is_raised() -> None:
    errands = RecordingErrands()
    errands.child = ended(
        "error",
        code="rate_limited",
        error_message="Later",
        is_recoverable=True,
        recovery_suggestions=["Wait"],
        retry_after_ms=5,
    )
    with pytest.raises(AgentError, match="Later") as caught:
        await below(errands).call("other", "x", None)
    assert (caught.value.code, caught.value.retry_after_ms) == ("rate_limited", 5)


async def test_stopped_or_vanished_agents_are_errors() -> None:
    errands = RecordingErrands()
    errands.child = ended("cancelled", by="user")
    with pytest.raises(AgentError, match="other was stopped"):
        await below(errands).call("other", "x", None)
    errands.child = None
    with pytest.raises(AgentError, match="internal"):
        await below(errands).call("other", "x", None)


async def test_cancellation_stops_what_was_asked_for() -> None:
    errands = RecordingErrands()
    errands.child = ended("running")
    children = below(errands)
    calling = asyncio.create_task(children.call("other", "x", None))
    await asyncio.sleep(0.01)
    assert errands.waiting == 1
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert errands.stopped == [derive_run_id("alice", "run_1/1/1")]
    assert errands.waiting == 0


async def test_run_that_waits_for_several_runs_lends_one_place() -> None:
    errands = RecordingErrands()
    errands.child = ended("running")
    children = below(errands)
    calls = [asyncio.create_task(children.call("other", "x", None)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert (len(errands.started), errands.waiting) == (3, 1)
    for left, call in zip([1, 1, 0], calls, strict=True):
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert errands.waiting == left


async def test_what_the_attempt_leaves_behind_is_stopped() -> None:
    errands = RecordingErrands()
    errands.child = ended("running")
    children = below(errands)
    calling = asyncio.create_task(children.call("other", "x", None))
    await asyncio.sleep(0.01)
    await children.stop_all()
    assert errands.stopped == [derive_run_id("alice", "run_1/1/1")]
    with pytest.raises(asyncio.CancelledError):
        await calling
    with pytest.raises(RequestRefused, match="run_ended"):
        await children.call("other", "x", None)
    assert len(errands.started) == 1


@pytest.mark.parametrize(
    ("code", "error"), [("rate_limited", AgentError), ("unknown_agent", RequestRefused)]
)
async def test_refused_request_raises(code: str, error: type[Exception]) -> None:
    class Refusing(RecordingErrands):
        async def start_child(self, *_: Any) -> None:
            raise RequestRefused(code)

    errands = Refusing()
    with pytest.raises(error, match=code):
        await below(errands).call("other", "x", None)
    assert (errands.stopped, errands.waiting) == ([], 0)
