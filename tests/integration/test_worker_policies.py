"""What becomes of a request in a busy thread is the agent's own choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from agent_worker import Run, Worker
from relay.config import Settings
from relay.errors import RequestRefused
from relay.events import EventType
from tests.integration.worker_support import Client, worker_settings

POLICIES = ("enqueue", "reject", "interrupt", "parallel")


def make_worker() -> Worker:
    worker = Worker("policies")
    for policy in POLICIES:

        @worker.agent(policy, policy=policy)
        async def wait(run: Run) -> None:
            await run.thinking("waiting")
            await asyncio.Event().wait()

    return worker


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with make_worker().running(settings), Client(settings) as client:
        yield client


async def first_run(client: Client, policy: str) -> str:
    run_id = await client.submit(policy, thread_id="t")
    await client.has_event(run_id, EventType.AGENT_THINKING)
    return run_id


async def test_enqueue_keeps_the_second_request_waiting(client: Client) -> None:
    first = await first_run(client, "enqueue")
    second = await client.submit("enqueue", thread_id="t")
    assert (await client.status(first), await client.status(second)) == ("running", "queued")
    await client.registry.cancel(client.user_id, first)
    await client.has_event(second, EventType.AGENT_THINKING)


async def test_reject_refuses_the_second_request(client: Client) -> None:
    first = await first_run(client, "reject")
    with pytest.raises(RequestRefused, match=f"thread_busy.*{first}"):
        await client.submit("reject", thread_id="t")
    assert await client.status(first) == "running"


async def test_interrupt_stops_the_first_run(client: Client) -> None:
    first = await first_run(client, "interrupt")
    second = await client.submit("interrupt", thread_id="t")
    assert (await client.ended(first)).summary.status == "cancelled"
    await client.has_event(second, EventType.AGENT_THINKING)


async def test_parallel_carries_out_both(client: Client) -> None:
    first = await first_run(client, "parallel")
    second = await client.submit("parallel", thread_id="t")
    await client.has_event(second, EventType.AGENT_THINKING)
    assert await client.status(first) == "running"
