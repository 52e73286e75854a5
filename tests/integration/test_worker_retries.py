"""Attempts after the first: failures with a delay, workers that stop, runs that cannot be used."""

from __future__ import annotations

import asyncio
import time

import pytest

from agent_worker import AgentError, Run, Worker
from relay.config import Settings
from relay.events import EventType
from tests.integration.worker_processes import worker as process_worker
from tests.integration.worker_processes import worker_process
from tests.integration.worker_support import Client, eventually, worker_settings


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix, lease_ms=500)


def flaky_worker() -> Worker:
    worker = Worker()

    @worker.agent("flaky", max_attempts=3)
    async def flaky(run: Run) -> str:
        await run.delta(f"try {run.attempt}")
        if run.attempt == 1:
            async with run.tool("call"):
                raise ConnectionError("secret host")
        if run.attempt == 2:
            raise AgentError("upstream_unavailable", "The library is closed.")
        return run.text

    @worker.agent("hopeless", max_attempts=2)
    async def hopeless(run: Run) -> None:
        raise ValueError("always")

    @worker.agent("quick")
    async def quick(run: Run) -> str:
        return "done"

    return worker


async def test_attempts_follow_with_growing_delays(settings: Settings) -> None:
    async with Client(settings) as client, flaky_worker().running(settings):
        began_s = time.monotonic()
        run_id = await client.submit("flaky")
        assert (await client.ended(run_id)).as_json()["result"] == "try 3"
        assert 3.0 <= time.monotonic() - began_s < 6.0, "a second, then two"
        events = await client.checked_log(run_id)
        assert [(event["type"], event["attempt"]) for event in events] == [
            ("agent_queued", 0),
            ("agent_started", 1),
            ("tool_executing", 1),
            ("tool_completed", 1),
            ("agent_retrying", 1),
            ("agent_started", 2),
            ("agent_retrying", 2),
            ("agent_started", 3),
            ("agent_completed", 3),
        ]
        first, second = (event["data"] for event in events if event["type"] == "agent_retrying")
        assert first == {"attempt": 2, "reason": "agent_failed", "delay_ms": 1000}
        assert second["message"] == "The library is closed."
        pending = await client.link.client.xpending(client.keys.tasks("flaky"), "workers")
        assert pending["pending"] == 0


async def test_last_attempt_ends_the_run(settings: Settings) -> None:
    async with Client(settings) as client, flaky_worker().running(settings):
        run_id = await client.submit("hopeless")
        assert (await client.ended(run_id)).as_json()["error"]["code"] == "agent_failed"
        types = [event["type"] for event in await client.checked_log(run_id)]
        assert types.count("agent_started") == 2


async def test_run_that_waits_for_its_next_attempt_can_be_cancelled(settings: Settings) -> None:
    async with Client(settings) as client, flaky_worker().running(settings):
        run_id = await client.submit("hopeless")
        await client.has_event(run_id, EventType.AGENT_RETRYING)
        outcome = await client.registry.cancel(client.user_id, run_id)
        assert outcome.status == "cancelled"
        await client.checked_log(run_id)


async def test_delayed_attempt_is_not_starved_by_other_tasks(settings: Settings) -> None:
    async with Client(settings) as client:
        async with flaky_worker().running(settings):
            run_id = await client.submit("hopeless")
            await client.has_event(run_id, EventType.AGENT_RETRYING)
        # No worker takes tasks now: a task that waits must not keep the reaper of another process
        # from dispatching the attempt whose time has come.
        await client.submit("hopeless")
        async with worker_process(settings):

            async def is_dispatched() -> bool:
                return bool(await client.link.client.xlen(client.keys.tasks("hopeless")) >= 2)

            await eventually(is_dispatched)


async def test_sigterm_hands_back_what_may_be_tried_again(redis_url: str, key_prefix: str) -> None:
    # A lease this long shows that it is the stopping worker itself that hands over.
    settings = worker_settings(redis_url, key_prefix, lease_ms=60_000, worker_grace_s=0)
    async with Client(settings) as client, worker_process(settings) as process:
        repeatable = await client.submit("repeatable")
        once = await client.submit("timed", "60")
        await client.has_event(repeatable, EventType.TOOL_EXECUTING)
        await client.has_event(once, EventType.AGENT_STARTED)
        process.terminate()
        assert await process.exit_code() == 0
        error = (await client.ended(once)).as_json()["error"]
        assert (error["code"], error["is_recoverable"]) == ("worker_lost", True)
        assert await client.status(repeatable) == "retrying"
        async with process_worker.running(settings):
            assert (await client.ended(repeatable)).as_json()["result"] == "attempt 2"
        events = await client.checked_log(repeatable)
        [retrying] = [event for event in events if event["type"] == "agent_retrying"]
        assert retrying["data"] == {"attempt": 2, "reason": "worker_stopping", "delay_ms": 0}
        assert "Traceback" not in await process.output()


async def test_run_claimed_by_a_worker_that_is_ending_is_given_back(settings: Settings) -> None:
    worker = flaky_worker()
    async with Client(settings) as client:
        async with worker.running(settings) as running:
            # As if the task had come in while the worker was ending.
            running._dispatcher.end_runs()
            run_id = await client.submit("quick")

            async def is_released() -> bool:
                stored = await client.link.client.hmget(
                    client.keys.user(client.user_id).run(run_id), ["status", "claimed_ms"]
                )
                return stored[0] == b"queued" and stored[1] is not None

            await eventually(is_released)
        async with worker.running(settings):
            assert (await client.ended(run_id)).as_json()["result"] == "done"
        events = await client.checked_log(run_id)
        assert [event["attempt"] for event in events] == [0, 1, 1]


@pytest.mark.parametrize(
    ("field", "value"), [("request", "not json"), ("attempt", "x"), ("seq", "many")]
)
async def test_run_that_cannot_be_used_is_no_poison(
    settings: Settings, field: str, value: str
) -> None:
    async with Client(settings) as client:
        await client.link.client.hset(client.keys.agents, "quick", b'{"description":""}')
        broken = await client.submit("quick", thread_id="t1")
        await client.link.client.hset(client.keys.user(client.user_id).run(broken), field, value)
        async with flaky_worker().running(settings):

            async def is_buried() -> bool:
                return bool(await client.link.client.xlen(client.keys.dead_letters))

            await eventually(is_buried)
            assert (await client.ended(await client.submit("quick"))).summary.status == "completed"
            if field == "request":
                error = (await client.ended(broken)).as_json()["error"]
                assert error["code"] == "internal"
                await client.checked_log(broken)

            async def is_no_longer_looked_at() -> bool:
                shards = [
                    await client.link.client.zrange(client.keys.deadlines(n), 0, -1)
                    for n in range(8)
                ]
                return not any(broken.encode() in member for shard in shards for member in shard)

            await eventually(is_no_longer_looked_at, 30)
            letters = await client.link.client.xrange(client.keys.dead_letters)
            assert all(
                set(fields) == {b"reason", b"agent", b"entry_id", b"task", b"at_ms"}
                for _, fields in letters
            )
            count = len(letters)
            await asyncio.sleep(1.2)
            assert await client.link.client.xlen(client.keys.dead_letters) == count
