from __future__ import annotations

import asyncio
import time

import pytest

from agent_worker import Run, Worker
from relay.config import Settings
from relay.events import EventType
from tests.conftest import OwnRedis
from tests.integration.worker_processes import worker as process_worker
from tests.integration.worker_processes import worker_process
from tests.integration.worker_support import Client, eventually, worker_settings

LEASE_MS = 500


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix, lease_ms=LEASE_MS)


def worker_with(stopped: asyncio.Event, go_on: asyncio.Event) -> Worker:
    worker = Worker()

    @worker.agent("silent")
    async def silent(run: Run) -> str:
        try:
            await go_on.wait()
        finally:
            stopped.set()
        return "done"

    @worker.agent("blocking")
    async def blocking(run: Run) -> str:
        await asyncio.sleep(0.05)
        time.sleep(4 * LEASE_MS / 1000)  # noqa: ASYNC251 (what agents should not do)
        return "late, but not lost"

    return worker


async def lease_until_ms(client: Client, run_id: str) -> int:
    run_key = client.keys.user(client.user_id).run(run_id)
    return int(await client.link.client.hget(run_key, "lease_until_ms") or 0)


async def test_lease_of_a_silent_run_is_renewed(settings: Settings) -> None:
    go_on = asyncio.Event()
    async with Client(settings) as client, worker_with(asyncio.Event(), go_on).running(settings):
        run_id = await client.submit("silent")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        first_ms = await lease_until_ms(client, run_id)

        async def is_two_leases_later() -> bool:
            return await lease_until_ms(client, run_id) > first_ms + 2 * LEASE_MS

        await eventually(is_two_leases_later)
        assert await client.status(run_id) == "running"
        go_on.set()
        assert (await client.ended(run_id)).as_json()["result"] == "done"


async def test_agent_that_blocks_the_event_loop_keeps_its_run(settings: Settings) -> None:
    # The other process has a reaper that would take the run, if its lease expired.
    async with (
        Client(settings) as client,
        worker_process(settings),
        worker_with(asyncio.Event(), asyncio.Event()).running(settings),
    ):
        await client.ended(await client.submit("timed", "0"))
        await asyncio.sleep(2 * LEASE_MS / 1000)
        run_id = await client.submit("blocking")
        assert (await client.ended(run_id)).as_json()["result"] == "late, but not lost"
        events = await client.checked_log(run_id)
        assert events[-1]["attempt"] == 1


async def test_cancel_flag_reaches_a_silent_run_without_any_signal(settings: Settings) -> None:
    async with (
        Client(settings) as client,
        worker_with(asyncio.Event(), asyncio.Event()).running(settings),
    ):
        run_id = await client.submit("silent")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        run_key = client.keys.user(client.user_id).run(run_id)
        await client.link.client.hset(run_key, "worker", "nobody")
        await client.registry.cancel(client.user_id, run_id, by="admin", reason="costs")
        detail = await client.ended(run_id, deadline_s=2)
        assert detail.terminal is not None
        assert detail.terminal["data"]["by"] == "admin"


async def test_superseded_silent_run_is_stopped_by_its_lease(settings: Settings) -> None:
    stopped = asyncio.Event()
    async with (
        Client(settings) as client,
        worker_with(stopped, asyncio.Event()).running(settings) as running,
    ):
        run_id = await client.submit("silent")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        run_key = client.keys.user(client.user_id).run(run_id)
        await client.link.client.hset(run_key, "fence", "another")
        await asyncio.wait_for(stopped.wait(), 2)
        assert await running.drain(2)
        types = [event["type"] for event in await client.log(run_id)]
        assert types == ["agent_queued", "agent_started"]


async def test_run_whose_redis_was_emptied_is_stopped_and_the_next_one_works(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    settings = worker_settings(server.url, key_prefix, lease_ms=LEASE_MS)
    stopped, go_on = asyncio.Event(), asyncio.Event()
    async with Client(settings) as client, worker_with(stopped, go_on).running(settings):
        run_id = await client.submit("silent")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        await client.link.client.flushall()
        await client.link.client.script_flush()
        await asyncio.wait_for(stopped.wait(), 3)
        go_on.set()
        last = await client.submit("silent")
        assert (await client.ended(last)).as_json()["result"] == "done"


async def test_lease_that_could_not_be_renewed_for_long_is_kept_by_its_worker(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis(append_only=True)
    settings = worker_settings(server.url, key_prefix, lease_ms=LEASE_MS)
    stopped, go_on = asyncio.Event(), asyncio.Event()
    async with Client(settings) as client, worker_with(stopped, go_on).running(settings):
        run_id = await client.submit("silent")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        server.pause()
        await asyncio.sleep(3 * LEASE_MS / 1000)
        server.resume()
        await asyncio.sleep(2 * LEASE_MS / 1000)
        assert not stopped.is_set()
        go_on.set()
        assert (await client.ended(run_id)).as_json()["result"] == "done"
        await client.checked_log(run_id)


async def test_killed_worker_has_its_run_ended_by_another(settings: Settings) -> None:
    async with Client(settings) as client, worker_process(settings) as process:
        run_id = await client.submit("timed", "60")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        async with worker_with(asyncio.Event(), asyncio.Event()).running(settings):
            process.kill()
            error = (await client.ended(run_id)).as_json()["error"]
        assert (error["code"], error["is_recoverable"]) == ("worker_lost", True)
        await client.checked_log(run_id)


async def test_run_that_may_be_repeated_is_taken_over_from_a_killed_worker(
    settings: Settings,
) -> None:
    async with Client(settings) as client, worker_process(settings) as process:
        run_id = await client.submit("repeatable")
        await client.has_event(run_id, EventType.TOOL_EXECUTING)
        async with process_worker.running(settings):
            process.kill()
            assert (await client.ended(run_id)).as_json()["result"] == "attempt 2"
        events = await client.checked_log(run_id)
        assert [(event["type"], event["attempt"]) for event in events] == [
            ("agent_queued", 0),
            ("agent_started", 1),
            ("tool_executing", 1),
            ("tool_completed", 1),
            ("agent_retrying", 1),
            ("agent_started", 2),
            ("tool_executing", 2),
            ("tool_completed", 2),
            ("agent_completed", 2),
        ]


async def test_silence_is_told_to_the_user(settings: Settings) -> None:
    worker = Worker()
    go_on = asyncio.Event()

    @worker.agent("quiet", stall_after_s=0.2)
    async def quiet(run: Run) -> str:
        await run.thinking("This will take a while")
        await go_on.wait()
        await run.thinking("There it is")
        return "done"

    async with Client(settings) as client, worker.running(settings):
        run_id = await client.submit("quiet")
        await client.has_event(run_id, EventType.AGENT_STALLED)
        go_on.set()
        await client.ended(run_id)
        events = await client.checked_log(run_id)
        [stalled] = [event for event in events if event["type"] == "agent_stalled"]
        assert stalled["data"]["idle_ms"] >= 200
        assert stalled["data"]["last_event"] == "agent_thinking"
