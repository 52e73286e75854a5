from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import structlog

from agent_worker import AgentError, Run, SyncRun, Worker
from relay.codec import Task, encode_task
from relay.config import Settings
from relay.events import EventType
from relay.keys import Keys
from tests.integration.worker_support import Client, eventually, worker_settings

SECRET = "postgres://root:hunter2@db"


def make_worker() -> Worker:
    worker = Worker("test")

    @worker.agent("full", description="Shows every kind of event.")
    async def full(run: Run) -> None:
        await run.thinking("Looking", step=1, total_steps=2)
        async with run.tool("search", {"q": run.request.content}) as tool:
            await tool.progress(50, "half way")
            tool.result = {"hits": 2}
        for piece in ("Hello ", "wörld"):
            await run.delta(piece)
        await run.custom("sources", [1, 2])
        await run.delta("!")

    @worker.agent("plain")
    def plain(run: SyncRun) -> str:
        with run.tool("think", {}) as tool:
            run.progress(10)
            tool.result = 1
        run.delta("from a thread")
        return run.text.upper()

    @worker.agent("failing")
    async def failing(run: Run) -> None:
        async with run.tool("connect", {"host": "db"}):
            raise ConnectionError(SECRET)

    @worker.agent("refusing")
    async def refusing(run: Run) -> None:
        raise AgentError("invalid_request", "Please attach a file.")

    @worker.agent("unencodable")
    async def unencodable(run: Run) -> object:
        await run.delta("text")
        return {"value": object()}

    @worker.agent("slow", timeout_s=0.1)
    async def slow(run: Run) -> None:
        await asyncio.Event().wait()

    @worker.agent("talker")
    async def talker(run: Run) -> None:
        for _ in range(2000):
            await run.delta("tick ")

    return worker


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with make_worker().running(settings), Client(settings) as client:
        yield client


async def test_run_is_told_in_order_without_a_hole(client: Client) -> None:
    run_id = await client.submit("full", "relay")
    detail = await client.ended(run_id)
    events = await client.checked_log(run_id)
    assert [event["type"] for event in events] == [
        "agent_queued",
        "agent_started",
        "agent_thinking",
        "tool_executing",
        "tool_completed",
        "custom",
        "agent_completed",
    ]
    assert events[3]["data"]["parameters"] == {"q": "relay"}
    assert events[4]["data"]["result"] == {"hits": 2}
    assert events[4]["data"]["tool_call_id"] == events[3]["data"]["tool_call_id"]
    assert events[-1]["data"]["result"] == "Hello wörld!"
    assert detail.as_json()["result"] == "Hello wörld!"
    assert all(event["attempt"] == 1 for event in events[1:])


async def test_plain_function_in_a_thread_is_told_the_same_way(client: Client) -> None:
    run_id = await client.submit("plain")
    assert (await client.ended(run_id)).as_json()["result"] == "FROM A THREAD"
    types = [event["type"] for event in await client.checked_log(run_id)]
    assert types[1:] == ["agent_started", "tool_executing", "tool_completed", "agent_completed"]


async def test_exception_becomes_an_error_with_support_id_and_no_leak(
    client: Client, settings: Settings
) -> None:
    with structlog.testing.capture_logs() as logs:
        run_id = await client.submit("failing")
        error = (await client.ended(run_id)).as_json()["error"]
    assert error["code"] == "agent_failed"
    assert error["recovery_suggestions"]
    [line] = [line for line in logs if line.get("support_id") == error["support_id"]]
    assert SECRET in str(line["exc_info"])
    events = await client.checked_log(run_id)
    assert [event["type"] for event in events[-3:]] == [
        "tool_executing",
        "tool_completed",
        "agent_error",
    ]
    assert events[-2]["data"]["status"] == "error"
    everything = await dump(client, settings)
    assert b"hunter2" not in everything
    assert b"ConnectionError" not in everything


async def dump(client: Client, settings: Settings) -> bytes:
    """Give all that Redis holds for the test."""
    held = b""
    async for key in client.link.client.scan_iter(f"{settings.key_prefix}:*"):
        held += await client.link.client.dump(key) or b""
    return held


async def test_agent_error_is_shown_in_the_authors_words(client: Client) -> None:
    run_id = await client.submit("refusing")
    error = (await client.ended(run_id)).as_json()["error"]
    assert (error["code"], error["error_message"]) == ("invalid_request", "Please attach a file.")
    assert error["is_recoverable"] is False


async def test_unencodable_result_is_an_error_and_the_log_names_the_place(client: Client) -> None:
    with structlog.testing.capture_logs() as logs:
        run_id = await client.submit("unencodable")
        error = (await client.ended(run_id)).as_json()["error"]
    assert error["code"] == "agent_failed"
    [line] = [line for line in logs if line["event"] == "agent_result_not_publishable"]
    assert "data.result.value" in line["reason"]
    assert line["support_id"] == error["support_id"]
    await client.checked_log(run_id)


async def test_time_limit_ends_the_run(client: Client) -> None:
    run_id = await client.submit("slow")
    assert (await client.ended(run_id)).as_json()["error"]["code"] == "timeout"
    await client.checked_log(run_id)


async def test_many_deltas_arrive_as_one_text(client: Client) -> None:
    run_id = await client.submit("talker")
    assert (await client.ended(run_id)).as_json()["result"] == "tick " * 2000


async def test_settled_tasks_leave_nothing_behind(client: Client) -> None:
    for agent in ("full", "failing", "plain"):
        await client.ended(await client.submit(agent))

    async def is_empty() -> bool:
        left = 0
        for agent in ("full", "failing", "plain"):
            stream = client.keys.tasks(agent)
            left += await client.link.client.xlen(stream)
            left += (await client.link.client.xpending(stream, "workers"))["pending"]
        return left == 0

    await eventually(is_empty)


async def test_duplicate_task_is_harmless(client: Client) -> None:
    stream = client.keys.tasks("full")
    run_id = await client.submit("full")
    for _ in range(3):
        task = encode_task(Task(client.user_id, run_id, "full"))
        await client.link.client.xadd(stream, {"task": task})
    await client.ended(run_id)
    await client.link.client.xadd(stream, {"task": task})
    last = await client.submit("full")
    await client.ended(last)
    events = await client.checked_log(run_id)
    assert [event["type"] for event in events].count("agent_started") == 1


async def test_runs_of_one_thread_follow_each_other(client: Client) -> None:
    run_ids = [await client.submit("full", f"{n}", thread_id="t1") for n in range(4)]
    for run_id in run_ids:
        await client.ended(run_id)
    spans = []
    for run_id in run_ids:
        events = await client.checked_log(run_id)
        spans.append((events[1]["offset"], events[-1]["offset"]))
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(spans))


async def test_worker_shows_that_it_lives_and_says_good_bye(
    settings: Settings, redis_url: str
) -> None:
    keys = Keys(settings.key_prefix)
    async with Client(settings) as client:
        async with make_worker().running(settings) as running:

            async def presence() -> object:
                return await client.link.client.get(keys.worker(running.worker_id))

            assert b'"full"' in await eventually(presence)
            assert await client.link.client.pttl(keys.worker(running.worker_id)) <= 3000
        assert await presence() is None
        consumers = await client.link.client.xinfo_consumers(keys.tasks("full"), "workers")
        assert consumers == []


async def test_leaving_the_block_ends_what_is_at_work_as_worker_lost(settings: Settings) -> None:
    worker = Worker()

    @worker.agent("endless")
    async def endless(run: Run) -> None:
        await run.delta("half an ")
        async with run.tool("wait"):
            await asyncio.Event().wait()

    async with Client(settings) as client:
        async with worker.running(settings):
            run_id = await client.submit("endless")
            await client.has_event(run_id, EventType.TOOL_EXECUTING)
        error = (await client.ended(run_id)).as_json()["error"]
        assert (error["code"], error["is_recoverable"]) == ("worker_lost", True)
        await client.checked_log(run_id)


async def test_drain_lets_what_is_at_work_finish(settings: Settings) -> None:
    worker = Worker()
    go_on = asyncio.Event()

    @worker.agent("patient")
    async def patient(run: Run) -> str:
        await go_on.wait()
        return "finished"

    async with Client(settings) as client, worker.running(settings) as running:
        run_id = await client.submit("patient")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        draining = asyncio.create_task(running.drain(10))
        await asyncio.sleep(0.05)
        late = await client.submit("patient")
        go_on.set()
        assert await draining
        assert await client.status(run_id) == "completed"
        assert await client.status(late) == "queued"
        assert not await running.drain(0.01) or running.active_count == 0
    # Another worker takes what was not begun.
    async with Client(settings) as client, worker.running(settings):
        assert (await client.ended(late)).as_json()["result"] == "finished"
