"""Who works on what, and what waits: as operators are told, on a real Redis."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
import redis.asyncio

from agent_worker import Run, Worker
from relay.codec import Task, encode_task
from relay.config import Settings
from relay.events import EventType
from relay.keys import NODE_TTL_MS, WORKER_INDEX_TTL_MS, Keys
from relay.queues import AgentQueue, list_queues
from relay.run_model import AgentInfo
from relay.runs import RunRegistry
from relay.scripts import RedisLink
from relay.tasks import GROUP, TASK_FIELD
from relay.workers import LivingWorker, list_workers
from tests.integration.worker_processes import worker_process
from tests.integration.worker_support import Client, eventually, worker_settings


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


@pytest_asyncio.fixture
async def link(redis_url: str) -> AsyncIterator[RedisLink]:
    opened = RedisLink(redis_url)
    yield opened
    await opened.aclose()


@pytest.fixture
def keys(key_prefix: str) -> Keys:
    return Keys(key_prefix)


def held_worker(name: str, agent: str) -> tuple[Worker, asyncio.Event]:
    """A worker whose agent goes on until the event is set."""
    worker, done = Worker(name), asyncio.Event()

    @worker.agent(agent)
    async def hold(_: Run) -> str:
        await done.wait()
        return "done"

    return worker, done


def listing(
    link: RedisLink, keys: Keys, condition: Callable[[list[LivingWorker]], bool]
) -> Callable[[], Awaitable[list[LivingWorker] | None]]:
    async def look() -> list[LivingWorker] | None:
        found = await list_workers(link, keys)
        return found if condition(found) else None

    return look


async def queue_of(link: RedisLink, keys: Keys, agent: str) -> AgentQueue:
    return next(queue for queue in await list_queues(link, keys) if queue.agent == agent)


async def test_worker_is_listed_while_it_lives_with_what_it_runs(
    settings: Settings, link: RedisLink, keys: Keys
) -> None:
    worker, done = held_worker("research", "hold")
    assert await list_workers(link, keys) == []
    async with Client(settings) as client, worker.running(settings) as running:
        [idle] = await eventually(listing(link, keys, bool))
        assert idle.worker_id == running.worker_id
        assert (idle.card.name, idle.card.agents) == ("research", ("hold",))
        assert (idle.card.host, idle.card.pid) == (socket.gethostname(), os.getpid())
        assert (idle.active, idle.runs) == (0, ())
        run_id = await client.submit("hold")
        [busy] = await eventually(listing(link, keys, lambda found: found[0].active == 1))
        [run] = busy.runs
        assert (run.run_id, run.user_id, run.agent) == (run_id, "alice", "hold")
        assert abs(run.since_ms - time.time() * 1000) < 10_000
        done.set()
        await client.ended(run_id)
        await eventually(listing(link, keys, lambda found: found[0].active == 0))
    # It has left by itself, without waiting for its key to expire.
    assert await list_workers(link, keys) == []
    assert await link.client.zcard(keys.workers) == 0


async def test_killed_worker_is_not_listed_once_its_key_has_expired(
    settings: Settings, link: RedisLink, keys: Keys
) -> None:
    async with worker_process(settings) as process:
        [listed] = await eventually(listing(link, keys, bool))
        assert listed.card.name == "process"
        assert listed.card.pid != os.getpid()
        process.kill()
        await process.exit_code()
        killed_s = time.monotonic()

        async def is_gone() -> bool:
            return not await list_workers(link, keys)

        await eventually(is_gone)
        assert time.monotonic() - killed_s < NODE_TTL_MS / 1000 + 1
    # The index still names it; the key is what counts.
    assert await link.client.zcard(keys.workers) == 1


async def test_starting_worker_clears_the_index_of_those_long_gone(
    settings: Settings, link: RedisLink, keys: Keys
) -> None:
    now_ms = time.time_ns() // 1_000_000
    long_gone = {f"gone-{number}": now_ms - WORKER_INDEX_TTL_MS - 1_000 for number in range(50)}
    await link.client.zadd(keys.workers, {**long_gone, "just-gone": now_ms - 1_000})
    worker, _ = held_worker("fresh", "hold")
    async with worker.running(settings) as running:
        await eventually(listing(link, keys, bool))
        members = await link.client.zrange(keys.workers, 0, -1)
        assert members == [b"just-gone", running.worker_id.encode()]


async def test_index_that_was_lost_comes_back(
    settings: Settings, link: RedisLink, keys: Keys
) -> None:
    worker, _ = held_worker("steady", "hold")
    async with worker.running(settings):
        await eventually(listing(link, keys, bool))
        await link.client.delete(keys.workers)
        assert await list_workers(link, keys) == []
        await eventually(listing(link, keys, bool))


async def test_card_of_another_version_hides_no_other_worker(
    settings: Settings, link: RedisLink, keys: Keys
) -> None:
    worker, _ = held_worker("steady", "hold")
    async with worker.running(settings) as running:
        await eventually(listing(link, keys, bool))
        for number, card in enumerate((b"", b"\xff", b"[]", b'{"name": "x"}')):
            await link.client.zadd(keys.workers, {f"odd-{number}": number})
            await link.client.set(keys.worker(f"odd-{number}"), card, px=5_000)
        assert [found.worker_id for found in await list_workers(link, keys)] == [running.worker_id]


async def test_queue_depth_counts_what_waits_and_what_is_in_hand(
    settings: Settings, link: RedisLink, keys: Keys
) -> None:
    registry = RunRegistry(link, keys)
    await registry.register_agents([AgentInfo("hold"), AgentInfo("never-asked")])
    untouched = await queue_of(link, keys, "never-asked")
    assert untouched.as_json() == {
        "agent": "never-asked",
        "waiting": {"count": 0, "oldest_age_ms": None},
        "in_hand": {"count": 0, "oldest_age_ms": None},
    }
    async with Client(settings) as client:
        run_ids = [await client.submit("hold") for _ in range(3)]
        before = await queue_of(link, keys, "hold")
        assert (before.waiting.count, before.in_hand.count) == (3, 0)
        worker, done = held_worker("one", "hold")
        one_at_a_time = worker_settings(
            settings.redis_url, settings.key_prefix, worker_concurrency=1
        )
        async with worker.running(one_at_a_time):
            await client.has_event(run_ids[0], EventType.AGENT_STARTED)
            during = await queue_of(link, keys, "hold")
            assert (during.waiting.count, during.in_hand.count) == (2, 1)
            assert during.in_hand.oldest_age_ms is not None
            assert during.waiting.oldest_age_ms is not None
            assert during.in_hand.oldest_age_ms >= during.waiting.oldest_age_ms
            done.set()
            for run_id in run_ids:
                await client.ended(run_id)

            async def is_empty() -> bool:
                queue = await queue_of(link, keys, "hold")
                return (queue.waiting.count, queue.in_hand.count) == (0, 0)

            await eventually(is_empty)


async def test_age_is_that_of_the_oldest_task_by_the_clock_of_redis(
    link: RedisLink, keys: Keys, redis: redis.asyncio.Redis
) -> None:
    await RunRegistry(link, keys).register_agents([AgentInfo("old")])
    stream = keys.tasks("old")
    seconds, _ = await redis.time()
    payload = {TASK_FIELD: encode_task(Task("alice", uuid.uuid4().hex, "old"))}
    for age_s in (90, 60, 30):
        await redis.xadd(stream, payload, id=f"{(seconds - age_s) * 1000}-0")
    no_group = await queue_of(link, keys, "old")
    assert no_group.waiting.count == 3
    await redis.xgroup_create(stream, GROUP, "0")
    await redis.xreadgroup(GROUP, "somebody", {stream: ">"}, count=1)
    queue = await queue_of(link, keys, "old")
    assert queue.in_hand.count == 1
    assert 89_000 < (queue.in_hand.oldest_age_ms or 0) < 100_000
    assert queue.waiting.count == 2
    assert 59_000 < (queue.waiting.oldest_age_ms or 0) < 70_000


async def test_index_that_cannot_be_written_costs_no_run_its_lease(
    redis_url: str, key_prefix: str, link: RedisLink, keys: Keys
) -> None:
    settings = worker_settings(redis_url, key_prefix, lease_ms=500)
    await link.client.set(keys.workers, "not a sorted set")
    worker, done = held_worker("steady", "hold")
    async with Client(settings) as client, worker.running(settings):
        run_id = await client.submit("hold")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        await asyncio.sleep(1.5)
        assert await client.status(run_id) == "running"
        done.set()
        assert (await client.ended(run_id)).summary.status == "completed"
