from __future__ import annotations

import asyncio
import contextlib
import sys
import time

import pytest
import structlog

from agent_worker import Run, SyncRun, Worker
from relay.config import Settings
from relay.errors import GrammarViolation
from relay.events import EventType
from tests.integration.worker_processes import worker_process
from tests.integration.worker_support import Client, worker_settings


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


CANCEL_SCRIPT = """
import asyncio, sys
from relay.keys import Keys
from relay.runs import RunRegistry
from relay.scripts import RedisLink

async def main():
    url, prefix, user, run = sys.argv[1:]
    link = RedisLink(url)
    print((await RunRegistry(link, Keys(prefix)).cancel(user, run, reason="enough")).status)
    await link.aclose()

asyncio.run(main())
"""


async def test_cancel_from_another_process_ends_the_run_within_a_second(
    settings: Settings,
) -> None:
    async with Client(settings) as client, worker_process(settings):
        run_id = await client.submit("timed", "60")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        canceller = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            CANCEL_SCRIPT,
            settings.redis_url,
            settings.key_prefix,
            client.user_id,
            run_id,
            stdout=asyncio.subprocess.PIPE,
        )
        await client.has_event(run_id, EventType.CANCEL_REQUESTED)
        began_s = time.monotonic()
        await client.ended(run_id)
        assert time.monotonic() - began_s < 1
        output, _ = await canceller.communicate()
        assert output.decode().strip() == "cancel_requested"
        events = await client.checked_log(run_id)
        assert [event["type"] for event in events[-2:]] == ["cancel_requested", "agent_cancelled"]
        assert events[-1]["data"]["by"] == "user"
        assert events[-1]["data"]["reason"] == "enough"


async def test_agent_that_ignores_its_cancellation_is_ended_and_the_worker_works_on(
    settings: Settings,
) -> None:
    worker = Worker()
    late: list[Exception] = []
    went_on = asyncio.Event()

    @worker.agent("stubborn")
    async def stubborn(run: Run) -> None:
        try:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.02)
        finally:
            try:
                await run.thinking("I am still here")
            except GrammarViolation as error:
                late.append(error)
            went_on.set()

    @worker.agent("next")
    async def following(run: Run) -> str:
        return "served"

    async with Client(settings) as client, worker.running(settings):
        run_id = await client.submit("stubborn")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        await client.registry.cancel(client.user_id, run_id)
        await client.ended(run_id, deadline_s=2)
        await asyncio.wait_for(went_on.wait(), 2)
        assert late
        events = await client.checked_log(run_id)
        assert [event["type"] for event in events[-2:]] == ["cancel_requested", "agent_cancelled"]
        await client.ended(await client.submit("next"))


async def test_plain_function_is_cancelled_at_its_next_call(settings: Settings) -> None:
    worker = Worker()

    @worker.agent("counting")
    def counting(run: SyncRun) -> None:
        with run.tool("count") as tool:
            for n in range(10_000):
                tool.progress(n / 100)
                time.sleep(0.005)

    async with Client(settings) as client, worker.running(settings):
        run_id = await client.submit("counting")
        await client.has_event(run_id, EventType.TOOL_EXECUTING)
        await client.registry.cancel(client.user_id, run_id)
        await client.ended(run_id, deadline_s=2)
        events = await client.checked_log(run_id)
        assert events[-1]["type"] == "agent_cancelled"
        assert events[-2]["data"]["status"] == "cancelled"


async def test_cancellation_whose_signal_is_lost_is_found_by_its_flag(settings: Settings) -> None:
    worker = Worker()

    @worker.agent("talking")
    async def talking(run: Run) -> None:
        while True:
            await run.delta("tick ")
            await asyncio.sleep(0.02)

    async with Client(settings) as client, worker.running(settings) as running:
        run_id = await client.submit("talking")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        # Nobody listens on the channel that the run's hash names from here on.
        user = client.keys.user(client.user_id)
        await client.link.client.hset(user.run(run_id), "worker", "nobody")
        await client.registry.cancel(client.user_id, run_id, by="admin", reason="costs")
        data = (await client.ended(run_id, deadline_s=2)).terminal
        assert data is not None
        assert (data["data"]["by"], data["data"]["reason"]) == ("admin", "costs")
        assert running.worker_id.startswith("worker-")


async def test_cancellation_while_signals_were_lost_is_found_when_they_are_back(
    settings: Settings,
) -> None:
    worker = Worker()

    @worker.agent("silent")
    async def silent(run: Run) -> None:
        await asyncio.Event().wait()

    async with Client(settings) as client, worker.running(settings) as running:
        run_id = await client.submit("silent")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        user = client.keys.user(client.user_id)
        await client.link.client.hset(user.run(run_id), "worker", "nobody")
        await client.registry.cancel(client.user_id, run_id)
        channel = client.keys.worker(running.worker_id)
        assert (await client.link.client.pubsub_numsub(channel))[0][1] == 1
        await client.link.client.client_kill_filter(_type="pubsub")
        await client.ended(run_id, deadline_s=5)


async def test_unreadable_signals_are_ignored(settings: Settings) -> None:
    worker = Worker()
    go_on = asyncio.Event()

    @worker.agent("waiting")
    async def waiting(run: Run) -> str:
        await go_on.wait()
        return "done"

    async with Client(settings) as client, worker.running(settings) as running:
        run_id = await client.submit("waiting")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        channel = client.keys.worker(running.worker_id)
        for payload in (b"\xff", b"[]", b'{"kind":"cancel"}', b'{"kind":"x","run_id":"y"}', b"7"):
            await client.link.client.publish(channel, payload)
        go_on.set()
        assert (await client.ended(run_id)).summary.status == "completed"


@pytest.mark.parametrize("how", ["superseded", "ended"])
async def test_refused_attempt_is_stopped_at_once_and_logged(settings: Settings, how: str) -> None:
    worker = Worker()
    stopped = asyncio.Event()

    @worker.agent("talking")
    async def talking(run: Run) -> None:
        try:
            while True:
                await run.delta("tick ")
                await asyncio.sleep(0.02)
        finally:
            stopped.set()

    async with Client(settings) as client, worker.running(settings) as running:
        with structlog.testing.capture_logs() as logs:
            run_id = await client.submit("talking")
            await client.has_event(run_id, EventType.AGENT_STARTED)
            run_key = client.keys.user(client.user_id).run(run_id)
            if how == "superseded":
                await client.link.client.hset(run_key, "fence", "another")
            else:
                await client.link.client.hset(run_key, "status", "cancelled")
            await asyncio.wait_for(stopped.wait(), 2)
            assert await running.drain(2)
        events = [line["event"] for line in logs]
        assert ("run_refused" if how == "superseded" else "run_ended_elsewhere") in events
        pending = await client.link.client.xpending(client.keys.tasks("talking"), "workers")
        assert pending["pending"] == 0


async def test_sigterm_finishes_what_runs_and_takes_nothing_new(settings: Settings) -> None:
    async with Client(settings) as client, worker_process(settings) as process:
        run_id = await client.submit("timed", "0.8")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        process.terminate()
        await asyncio.sleep(0.2)
        late = await client.submit("timed", "0")
        assert await process.exit_code() == 0
        assert (await client.ended(run_id)).as_json()["result"] == "begun and finished"
        await client.checked_log(run_id)
        assert await client.status(late) == "queued"
        assert "Traceback" not in await process.output()


async def test_sigterm_ends_what_takes_longer_than_the_grace_time(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_grace_s=1)
    async with Client(settings) as client, worker_process(settings) as process:
        run_id = await client.submit("timed", "60")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        process.terminate()
        assert await process.exit_code() == 0
        error = (await client.ended(run_id)).as_json()["error"]
        assert (error["code"], error["is_recoverable"]) == ("worker_lost", True)
        await client.checked_log(run_id)


async def test_second_sigterm_ends_everything_at_once_even_stubborn_agents(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_grace_s=600, cancel_grace_ms=60_000)
    async with Client(settings) as client, worker_process(settings) as process:
        run_ids = [await client.submit("timed", "60"), await client.submit("stubborn")]
        for run_id in run_ids:
            await client.has_event(run_id, EventType.AGENT_STARTED)
        process.terminate()
        await asyncio.sleep(0.3)
        assert process.is_running
        began_s = time.monotonic()
        process.terminate()
        assert await process.exit_code() == 0
        assert time.monotonic() - began_s < 3
        for run_id in run_ids:
            error = (await client.ended(run_id)).as_json()["error"]
            assert error["code"] == "worker_lost"
            await client.checked_log(run_id)
