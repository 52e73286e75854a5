"""Runs below runs: their parent is known, their result comes back, nothing outlives its parent."""

from __future__ import annotations

import asyncio

import pytest

from agent_worker import AgentError, Run, SyncRun, Worker
from relay.config import Settings
from relay.errors import RequestRefused
from relay.events import EventType
from relay.run_model import Claim, ParentAttempt
from tests.integration.worker_processes import worker_process
from tests.integration.worker_support import ENDED, Client, eventually, worker_settings


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix, lease_ms=500)


def nested_worker() -> Worker:
    worker = Worker()

    @worker.agent("lead")
    async def lead(run: Run) -> str:
        async with run.step("Count", total_steps=1):
            counts = await asyncio.gather(
                *(run.call_agent("count", word, {"n": n}) for n, word in enumerate(["ab", "cde"]))
            )
        return f"{sum(counts)} letters"

    @worker.agent("count")
    def count(run: SyncRun) -> int:
        run.thinking(f"Counting {run.request.content}")
        return len(run.request.content)

    @worker.agent("plain-lead")
    def plain_lead(run: SyncRun) -> str:
        try:
            run.call_agent("failing", "x")
        except AgentError as error:
            return error.error_message
        return "?"

    @worker.agent("failing")
    async def failing(run: Run) -> None:
        raise AgentError("invalid_request", "Not like this.")

    @worker.agent("patient")
    async def patient(run: Run) -> None:
        await run.call_agent("endless", "wait")

    @worker.agent("careless")
    async def careless(run: Run) -> str:
        run_task = asyncio.create_task(run.call_agent("endless", "wait"))
        await asyncio.sleep(0.2)
        assert not run_task.done()
        return "done"

    @worker.agent("endless")
    async def endless(run: Run) -> None:
        await asyncio.Event().wait()

    return worker


async def children(client: Client, parent: str) -> list[str]:
    stored = await client.link.client.hget(client.keys.user(client.user_id).run(parent), "children")
    return [] if stored is None else stored.decode().split()


async def only_child(client: Client, parent: str) -> str:
    async def look() -> str | None:
        found = await children(client, parent)
        if found and await client.status(found[0]) in ("running", *ENDED):
            return found[0]
        return None

    run_id: str = await eventually(look)
    return run_id


# One place only: parents that wait must not keep their children from it.
@pytest.mark.parametrize("concurrency", [1, 8])
async def test_results_come_back_and_clients_see_whose_runs_they_are(
    redis_url: str, key_prefix: str, concurrency: int
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_concurrency=concurrency)
    async with Client(settings) as client, nested_worker().running(settings):
        run_id = await client.submit("lead", thread_id="t1")
        assert (await client.ended(run_id)).as_json()["result"] == "5 letters"
        below = await children(client, run_id)
        assert len(below) == 2
        for child in below:
            queued, *_ = await client.checked_log(child)
            assert queued["thread_id"] == "t1"
            assert queued["data"]["metadata"]["parent_run_id"] == run_id
            detail = await client.registry.get(client.user_id, child)
            assert detail is not None
            assert detail.as_json()["parent_run_id"] == run_id
        listed = {run.run_id: run.parent_run_id for run in await client.registry.list_runs("alice")}
        assert listed == {run_id: None, below[0]: run_id, below[1]: run_id}


async def test_run_that_waits_for_many_lends_its_own_place_only(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_concurrency=2)
    worker, at_work, most = Worker(), 0, 0

    @worker.agent("wide")
    async def wide(run: Run) -> None:
        await asyncio.gather(*(run.call_agent("narrow", str(n)) for n in range(8)))

    @worker.agent("narrow")
    async def narrow(run: Run) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.02)
        at_work -= 1

    async with Client(settings) as client, worker.running(settings):
        run_id = await client.submit("wide")
        assert (await client.ended(run_id)).summary.status == "completed"
    assert most == 2


async def test_error_below_can_be_handled_above(settings: Settings) -> None:
    async with Client(settings) as client, nested_worker().running(settings):
        run_id = await client.submit("plain-lead")
        assert (await client.ended(run_id)).as_json()["result"] == "Not like this."


async def test_cancelling_a_run_stops_what_is_below_it(settings: Settings) -> None:
    async with Client(settings) as client, nested_worker().running(settings):
        run_id = await client.submit("patient")
        child = await only_child(client, run_id)
        await client.registry.cancel(client.user_id, run_id)
        for each in (run_id, child):
            assert (await client.ended(each, deadline_s=2)).summary.status == "cancelled"
            await client.checked_log(each)


async def test_nothing_outlives_the_run_that_asked_for_it(settings: Settings) -> None:
    async with Client(settings) as client, nested_worker().running(settings):
        run_id = await client.submit("careless")
        child = await only_child(client, run_id)
        assert (await client.ended(run_id)).summary.status == "completed"
        assert (await client.ended(child)).summary.status == "cancelled"


async def test_child_that_is_stopped_is_an_error_above(settings: Settings) -> None:
    async with Client(settings) as client, nested_worker().running(settings):
        run_id = await client.submit("patient")
        await client.registry.cancel(client.user_id, await only_child(client, run_id))
        error = (await client.ended(run_id)).as_json()["error"]
        assert error["error_message"] == "The agent endless was stopped."


async def test_run_whose_parents_worker_is_killed_is_stopped(settings: Settings) -> None:
    async with (
        Client(settings) as client,
        worker_process(settings) as process,
        nested_worker().running(settings),
    ):
        run_id = await client.submit("calling")
        child = await only_child(client, run_id)
        process.kill()
        assert (await client.ended(run_id)).as_json()["error"]["code"] == "worker_lost"
        assert (await client.ended(child)).summary.status == "cancelled"


async def test_attempt_that_may_publish_nothing_may_start_nothing(settings: Settings) -> None:
    async with Client(settings) as client:
        await client.link.client.hset(client.keys.agents, "a", b"{}")
        run_id = await client.submit("a")
        claim = await client.registry.claim(client.user_id, run_id, "w", 60_000)
        assert isinstance(claim, Claim)
        allowed = ParentAttempt(run_id, claim.fence)
        assert await client.submit("a", parent=allowed, policy="parallel")
        for parent in (ParentAttempt(run_id, "stale"), ParentAttempt("run_x", claim.fence)):
            with pytest.raises(RequestRefused, match="run_ended"):
                await client.submit("a", parent=parent, policy="parallel")
        await client.registry.cancel(client.user_id, run_id)
        with pytest.raises(RequestRefused, match="run_ended"):
            await client.submit("a", parent=allowed, policy="parallel")
        assert len(await children(client, run_id)) == 1


async def test_runs_below_count_towards_the_users_quota(redis_url: str, key_prefix: str) -> None:
    settings = worker_settings(redis_url, key_prefix, max_active_runs_per_user=1)
    async with Client(settings) as client, nested_worker().running(settings):
        run_id = await client.submit("patient")
        error = (await client.ended(run_id)).as_json()["error"]
        assert error["code"] == "rate_limited"
        await client.has_event(run_id, EventType.AGENT_ERROR)
