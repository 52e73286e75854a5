"""What the reaper decides about a run, case by case and for any run at all."""

from __future__ import annotations

import dataclasses

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import DecodingFailed
from relay.events import format_timestamp
from relay.lifecycle import (
    LOOK_FIELDS,
    Dispatch,
    ExpireInput,
    FinishCancel,
    Forget,
    LookAgain,
    LoseRun,
    ReportStall,
    RetryAttempt,
    RunTruth,
    decide,
    truth_from,
)

NOW_MS = 1_800_000_000_000
LEASE_MS = 15_000
GRACE_MS = 5_000

AT_WORK = RunTruth(
    now_ms=NOW_MS,
    is_first_of_lane=True,
    status="running",
    attempt=1,
    fence="f",
    seq=3,
    agent="a",
    thread="t",
    worker="w",
    lease_until_ms=NOW_MS + 10_000,
    updated_ms=NOW_MS - 1_000,
    created_ms=NOW_MS - 5_000,
    claimed_ms=NOW_MS - 4_000,
    started_ms=NOW_MS - 4_000,
    retry_at_ms=0,
    cancel=None,
    cancel_ms=0,
    max_attempts=1,
    stall_after_ms=60_000,
    stalled_ms=0,
    last_event="agent_thinking",
    open_tools={},
    open_inputs={},
)


def decided(run: RunTruth | None, **changes: object) -> object:
    if run is not None:
        run = dataclasses.replace(run, **changes)  # type: ignore[arg-type]
    return decide(run, lease_ms=LEASE_MS, cancel_grace_ms=GRACE_MS)


def open_input(expires_ms: int) -> dict[str, str]:
    return {"r1": orjson.dumps({"expires_at": format_timestamp(expires_ms)}).decode()}


@pytest.mark.parametrize("status", ["completed", "error", "cancelled"])
def test_an_ended_run_is_forgotten(status: str) -> None:
    assert decided(AT_WORK, status=status) == Forget()


def test_a_run_that_never_came_into_being_is_forgotten() -> None:
    assert decided(None) == Forget()


def test_a_living_run_is_looked_at_again_when_its_lease_ends() -> None:
    assert decided(AT_WORK) == LookAgain(NOW_MS + 10_000)


def test_a_lost_worker_ends_the_run_after_its_last_attempt() -> None:
    assert decided(AT_WORK, lease_until_ms=NOW_MS) == LoseRun()


def test_a_lost_worker_is_followed_by_another_attempt_where_that_is_allowed() -> None:
    assert decided(AT_WORK, lease_until_ms=NOW_MS, max_attempts=3) == RetryAttempt(1_000)
    assert decided(AT_WORK, lease_until_ms=NOW_MS, max_attempts=3, attempt=2) == RetryAttempt(2_000)
    assert decided(AT_WORK, lease_until_ms=NOW_MS, max_attempts=3, attempt=3) == LoseRun()


def test_a_cancelled_run_of_a_dead_worker_ends_cancelled_not_lost() -> None:
    changes = {"cancel": {"by": "user"}, "cancel_ms": NOW_MS - 10, "lease_until_ms": NOW_MS - 1}
    assert decided(AT_WORK, **changes, max_attempts=3) == FinishCancel()


def test_a_worker_has_its_grace_time_to_stop_a_cancelled_run() -> None:
    asked = {"cancel": {"by": "user"}}
    assert decided(AT_WORK, **asked, cancel_ms=NOW_MS - 4_000) == LookAgain(NOW_MS + 1_000)
    assert decided(AT_WORK, **asked, cancel_ms=NOW_MS - 5_000) == FinishCancel()


def test_silence_is_reported_once() -> None:
    quiet = {"updated_ms": NOW_MS - 60_000}
    assert decided(AT_WORK, **quiet) == ReportStall(60_000)
    assert decided(AT_WORK, **quiet, stalled_ms=NOW_MS - 60_000) == LookAgain(NOW_MS + 10_000)
    assert decided(AT_WORK, **quiet, stall_after_ms=0) == LookAgain(NOW_MS + 10_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"stalled_ms": NOW_MS - 60_000, "updated_ms": NOW_MS - 60_000},
        {"started_ms": 0},
        {"status": "waiting"},
    ],
    ids=["told before", "not begun", "waits for its user"],
)
def test_silence_that_begins_later_is_found_on_time(changes: dict[str, object]) -> None:
    look = decided(AT_WORK, **changes, lease_until_ms=NOW_MS + 900_000)
    assert look == LookAgain(NOW_MS + AT_WORK.stall_after_ms)


def test_a_run_that_waits_for_its_user_does_not_stall() -> None:
    waiting = decided(
        AT_WORK,
        status="waiting",
        updated_ms=NOW_MS - 600_000,
        open_inputs=open_input(NOW_MS + 3_000),
    )
    assert waiting == LookAgain(NOW_MS + 3_000)


def test_an_unanswered_request_expires() -> None:
    assert decided(AT_WORK, status="waiting", open_inputs=open_input(NOW_MS)) == ExpireInput("r1")


def test_a_queued_run_is_dispatched_when_it_is_its_turn() -> None:
    assert decided(AT_WORK, status="queued") == Dispatch()
    later = decided(AT_WORK, status="queued", is_first_of_lane=False)
    assert later == LookAgain(NOW_MS + LEASE_MS)


def test_a_retry_waits_for_its_delay() -> None:
    assert decided(AT_WORK, status="retrying", retry_at_ms=NOW_MS + 5) == LookAgain(NOW_MS + 5)
    assert decided(AT_WORK, status="retrying", retry_at_ms=NOW_MS) == Dispatch()


def test_a_queued_run_does_not_stall_or_lose_a_worker_it_never_had() -> None:
    assert decided(AT_WORK, status="queued", lease_until_ms=0, updated_ms=0) == Dispatch()


times = st.integers(NOW_MS - 10**6, NOW_MS + 10**6)


@given(
    status=st.sampled_from(["queued", "running", "waiting", "retrying", "completed"]),
    lease_until_ms=times,
    updated_ms=times,
    retry_at_ms=times,
    cancel_ms=times,
    cancel=st.sampled_from([None, {"by": "user"}]),
    is_first_of_lane=st.booleans(),
    attempt=st.integers(1, 5),
    max_attempts=st.integers(1, 5),
    expires_ms=st.none() | times,
)
def test_whatever_the_run_is_the_next_look_lies_ahead(
    expires_ms: int | None, **changes: object
) -> None:
    inputs = {} if expires_ms is None else open_input(expires_ms)
    decision = decided(AT_WORK, **changes, open_inputs=inputs)
    if isinstance(decision, LookAgain):
        assert decision.at_ms > NOW_MS
    if isinstance(decision, LoseRun | RetryAttempt):
        assert changes["lease_until_ms"] <= NOW_MS, "a living worker's run was taken"


def test_the_truth_is_read_in_the_scripts_order() -> None:
    values = {
        "status": "running",
        "attempt": "2",
        "fence": "f",
        "seq": "7",
        "agent": "a",
        "thread": "t",
        "worker": "w",
        "open_tools": '{"c":"1 s"}',
        "open_inputs": "{}",
    }
    reply = [b"123", b"1", *(values.get(name, "").encode() for name in LOOK_FIELDS)]
    run = truth_from(reply)
    assert run is not None
    assert (run.now_ms, run.is_first_of_lane, run.attempt, run.open_tools) == (
        123,
        True,
        2,
        {"c": "1 s"},
    )
    assert truth_from([b"123"]) is None
    with pytest.raises(DecodingFailed):
        truth_from([b"123", b"1", *(b"x" for _ in LOOK_FIELDS)])
