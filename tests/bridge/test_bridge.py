"""The bridge on a real Redis: the same runs as a worker's, without a queue."""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import orjson
import pytest
import pytest_asyncio
import redis.asyncio
import structlog

from agent_worker import (
    AgentError,
    AgentWebSocketBridge,
    BridgedRun,
    BridgeState,
    Run,
    RunCancelled,
    Worker,
)
from agent_worker.bridge import BridgeClosed
from agent_worker.stops import CancelAsked
from relay.config import Settings
from relay.errors import (
    GrammarViolation,
    InvalidEvent,
    PublishRefused,
    RedisUnavailable,
    RequestRefused,
    RunEnded,
    StaleFence,
)
from relay.events import EventType
from relay.inputs import InputAnswer
from relay.keys import Keys
from relay.reaper import Reaper
from relay.scripts import KeyTaken
from tests.bridge.support import essence, texts_of
from tests.integration.worker_support import Client, eventually, worker_settings

SECRET = "postgres://root:hunter2@db"


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix, lease_ms=1_000)


@pytest_asyncio.fixture
async def bridge(settings: Settings) -> AsyncIterator[AgentWebSocketBridge]:
    async with AgentWebSocketBridge(settings) as bridge:
        yield bridge


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with Client(settings) as client:
        yield client


def opening(**changes: Any) -> dict[str, Any]:
    return {"user_id": "alice", "thread_id": "t1", "agent": "researcher", **changes}


async def nothing_is_open(bridge: AgentWebSocketBridge) -> bool:
    return bridge.health().active_runs == 0


async def work(run: Run) -> None:
    await run.thinking("Looking", step=1, total_steps=2)
    async with run.tool("search", {"q": "x", "token": "secret"}, "To find it") as tool:
        await run.progress(50)
        tool.result = {"hits": 3}
    async with run.step("Writing"):
        await run.delta("Hello ")
        await run.custom("mark", 1)
        await run.delta("world")


# --- what is published ---


@pytest.mark.parametrize("outcome", ["text", "result", "agent_error", "exception"])
async def test_bridge_publishes_what_a_worker_publishes(
    settings: Settings, bridge: AgentWebSocketBridge, client: Client, outcome: str
) -> None:
    async def agent(run: Run) -> Any:
        await work(run)
        match outcome:
            case "result":
                return {"answer": 42}
            case "agent_error":
                raise AgentError("rate_limited", "Later.", retry_after_ms=5)
            case "exception":
                raise ValueError(SECRET)
        return None

    worker = Worker()
    worker.agent("researcher")(agent)
    async with worker.running(settings):
        queued = await client.submit("researcher", "What?", metadata={"lang": "en"})
        await client.ended(queued)
    bridged = ""
    try:
        async with bridge.run(**opening(content="What?", metadata={"lang": "en"})) as run:
            bridged = run.run_id
            run.result = await agent(run)
    except (AgentError, ValueError):
        assert outcome in ("agent_error", "exception"), "exceptions go on to the caller"
    events = await client.checked_log(bridged)
    assert essence(events) == essence(await client.checked_log(queued))
    assert await texts_of(client, bridged) == await texts_of(client, queued)
    assert "hunter2" not in str(events)
    [call] = [event["data"] for event in events if event["type"] == "tool_executing"]
    assert call["parameters"] == {"q": "x", "token": "[redacted]"}
    # Nothing is left of it: no task, no lane, no lease.
    assert await client.link.client.xlen(client.keys.tasks("researcher")) == 0
    assert not await client.link.client.exists(client.keys.user("alice").threads)
    assert bridge.health().active_runs == 0


async def test_secrets_of_a_request_reach_its_agent_and_no_device(
    settings: Settings, bridge: AgentWebSocketBridge, client: Client
) -> None:
    given: list[Any] = []
    worker = Worker()

    @worker.agent("lead")
    async def lead(run: Run) -> None:
        given.append(run.request.metadata)
        await run.call_agent("below", "x", {"login": {"password": "hunter2"}})

    @worker.agent("below")
    async def below(run: Run) -> None:
        given.append(run.request.metadata["login"])

    metadata = {"api_key": "hunter2", "lang": "en"}
    async with worker.running(settings):
        await client.ended(await client.submit("lead", metadata=metadata))
    async with bridge.run(**opening(metadata=metadata)) as run:
        given.append(run.request.metadata)
    assert given == [metadata, {"password": "hunter2"}, metadata]
    entries = await client.link.client.xrange(client.keys.user("alice").log)
    assert "hunter2" not in str(entries)
    queued, *_ = await client.checked_log(run.run_id)
    assert queued["data"]["metadata"] == {"api_key": "[redacted]", "lang": "en"}


async def test_start_and_end_say_what_the_caller_knows(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening(model="m-1", context={"k": 1}, message_id="job-7")) as run:
        run.result, run.summary, run.usage = [1], "One.", {"tokens": 9}
    queued, started, completed = await client.checked_log(run.run_id)
    assert queued["data"]["message_id"] == "job-7"
    assert started["data"] == {"model": "m-1", "context": {"k": 1}}
    del completed["data"]["duration_ms"]
    assert completed["data"] == {"result": [1], "summary": "One.", "usage": {"tokens": 9}}


async def test_result_that_cannot_be_published_is_an_error(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening()) as run:
        run.result = object()
    assert (await client.checked_log(run.run_id))[-1]["data"]["code"] == "agent_failed"


async def test_nothing_is_cut_off_however_long_it_is(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    thought, result = "é" * 20_000, {"text": "x" * 1_000_000, "rows": list(range(10_000))}
    async with bridge.run(**opening(content="?" * 30_000)) as run:
        await run.thinking(thought)
        await run._stream.flush()
        # Now, because the log holds no bytes of what is as large as the result.
        queued, _, thinking = await client.log(run.run_id)
        run.result = result
    assert queued["data"]["content"] == "?" * 30_000
    assert thinking["data"]["thought"] == thought
    assert (await client.ended(run.run_id)).as_json()["result"] == result


async def test_wrong_calls_raise_and_reach_nobody(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening()) as run:
        with pytest.raises(InvalidEvent):
            await run.thinking("x", progress_percentage=101)
        with pytest.raises(GrammarViolation):
            await run.progress(5)
    types = [event["type"] for event in await client.checked_log(run.run_id)]
    assert types == ["agent_queued", "agent_started", "agent_completed"]
    with pytest.raises(GrammarViolation, match="has ended"):
        await run.thinking("too late")
    with pytest.raises(PublishRefused, match="ended already"):
        await run.complete()


async def test_ten_users_at_once_get_five_events_each_and_only_their_own(
    settings: Settings, bridge: AgentWebSocketBridge
) -> None:
    users = [f"user-{number}" for number in range(10)]
    emitters = [bridge.emitter(user) for user in users]

    async def carry_out(number: int) -> str:
        async with emitters[number].run(thread_id="t", agent="a", content=users[number]) as run:
            await run.thinking(users[number])
            async with run.tool("t", {"mark": users[number]}):
                await asyncio.sleep(0)
            run.result = users[number]
        return run.run_id

    run_ids = await asyncio.gather(*(carry_out(number) for number in range(10)))
    for user, run_id in zip(users, run_ids, strict=True):
        async with Client(settings, user) as client:
            events = await client.checked_log(run_id)
            assert [event["type"] for event in events] == [
                "agent_queued",
                "agent_started",
                "agent_thinking",
                "tool_executing",
                "tool_completed",
                "agent_completed",
            ]
            entries = await client.link.client.xrange(client.keys.user(user).log)
            assert len(entries) == 6
            for _, fields in entries:
                others = [other for other in users if other != user]
                assert orjson.loads(fields[b"e"])["user_id"] == user
                assert not any(f'"{other}"'.encode() in fields[b"e"] for other in others)


async def test_interleaved_runs_of_three_users_do_not_mix(
    settings: Settings, bridge: AgentWebSocketBridge
) -> None:
    users = ("alice", "bob", "alice:{x}")
    runs = [await bridge.open(**opening(user_id=user)) for user in users for _ in range(2)]
    for round_number in range(5):
        for run in runs:
            await run.thinking(f"{run.user_id} {run.run_id} {round_number}")
            await run.delta(f"{run.run_id};")
    for run in reversed(runs):
        await run.complete()
    for run in runs:
        async with Client(settings, run.user_id) as client:
            events = await client.checked_log(run.run_id)
            thoughts = [e["data"]["thought"] for e in events if e["type"] == "agent_thinking"]
            assert thoughts == [f"{run.user_id} {run.run_id} {number}" for number in range(5)]
            assert events[-1]["data"]["result"] == f"{run.run_id};" * 5
            entries = await client.link.client.xrange(client.keys.user(run.user_id).log)
            assert len(entries) == 2 * 8


# --- isolation ---


async def test_emitter_speaks_for_its_user_only(
    settings: Settings, bridge: AgentWebSocketBridge, client: Client
) -> None:
    emitter = bridge.emitter("alice")
    with pytest.raises(AttributeError):
        emitter.user_id = "bob"  # type: ignore[misc]
    async with emitter.run(thread_id="t", agent="a", user_id="bob") as run:
        assert run.user_id == "alice"
    await emitter.notify("info", "Hi", "There", user_id="bob")
    assert not await client.link.client.exists(client.keys.user("bob").log)
    [*_, (_, fields)] = await client.link.client.xrange(client.keys.user("alice").log)
    notice = orjson.loads(fields[b"e"])
    assert (notice["type"], notice["user_id"], notice["data"]["user_id"]) == (
        "notice",
        "alice",
        "bob",
    )
    with pytest.raises(ValueError, match="user id"):
        bridge.emitter("")


# --- notices ---


async def test_notice_belongs_to_no_run_and_appears_once(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    await bridge.notify("alice", "warning", "Disk", "Nearly full", percent=93, api_key="x")
    [(entry_id, fields)] = await client.link.client.xrange(client.keys.user("alice").log)
    assert (entry_id, fields[b"s"], fields[b"r"]) == (b"1-0", b"0", b"")
    event = orjson.loads(fields[b"e"])
    assert set(event) == {"type", "user_id", "timestamp", "data"}
    assert event["data"] == {
        "percent": 93,
        "api_key": "[redacted]",
        "severity": "warning",
        "title": "Disk",
        "body": "Nearly full",
    }
    with pytest.raises(InvalidEvent, match="severity"):
        await bridge.notify("alice", "shouting", "x", "y")
    assert await client.link.client.xlen(client.keys.user("alice").log) == 1


# --- stopping ---


@pytest.mark.parametrize("is_signalled", [True, False])
async def test_cancellation_by_the_user_is_raised_inside(
    bridge: AgentWebSocketBridge, client: Client, is_signalled: bool
) -> None:
    inside = ""
    opened: list[BridgedRun] = []

    async def carry_out() -> None:
        nonlocal inside
        async with bridge.run(**opening()) as run:
            opened.append(run)
            try:
                async with run.tool("wait"):
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                inside = "cancelled"
                raise

    task = asyncio.create_task(carry_out())

    async def has_started() -> bool:
        return bool(opened)

    await eventually(has_started)
    run_id = opened[0].run_id
    if not is_signalled:
        # The lease brings the flag.
        await client.link.client.hset(client.keys.user("alice").run(run_id), "worker", "nobody")
    await client.registry.cancel("alice", run_id, reason="enough")
    with pytest.raises(RunCancelled, match="cancelled by user: enough"):
        await task
    assert inside == "cancelled"
    assert task.cancelling() == 0
    events = await client.checked_log(run_id)
    assert [event["type"] for event in events[-3:]] == [
        "cancel_requested",
        "tool_completed",
        "agent_cancelled",
    ]


async def test_block_that_ends_in_spite_of_a_late_cancellation_completes(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening()) as run:
        await run.thinking("done soon")
        run.request_stop(CancelAsked("user"))
    assert (await client.ended(run.run_id)).summary.status == "completed"
    await asyncio.sleep(0)


async def test_applications_own_cancellation_goes_on_and_ends_the_run(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    opened: list[BridgedRun] = []

    async def carry_out() -> None:
        async with bridge.run(**opening()) as run:
            opened.append(run)
            await asyncio.Event().wait()

    task = asyncio.create_task(carry_out())

    async def has_started() -> bool:
        return bool(opened)

    await eventually(has_started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    error = (await client.ended(opened[0].run_id)).as_json()["error"]
    assert (error["code"], error["is_recoverable"]) == ("worker_lost", True)


async def test_generator_whose_consumer_leaves_ends_its_run(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    run_ids: list[str] = []

    async def stream() -> AsyncIterator[str]:
        async with bridge.run(**opening()) as run, run.tool("write"):
            run_ids.append(run.run_id)
            yield "a"
            yield "b"

    # As a web framework does with a streamed response whose client has gone.
    pieces = stream()
    assert await anext(pieces) == "a"
    await pieces.aclose()  # type: ignore[attr-defined]
    error = (await client.ended(run_ids[0])).as_json()["error"]
    assert (error["code"], error["is_recoverable"]) == ("worker_lost", True)
    events = await client.checked_log(run_ids[0])
    assert [event["type"] for event in events[-2:]] == ["tool_completed", "agent_error"]
    await eventually(partial(nothing_is_open, bridge))


async def test_generator_that_nobody_keeps_ends_its_run(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    run_ids: list[str] = []

    async def stream() -> AsyncIterator[str]:
        async with bridge.run(**opening()) as run:
            run_ids.append(run.run_id)
            yield "a"

    async for _ in stream():
        break
    gc.collect()
    assert (await client.ended(run_ids[0])).as_json()["error"]["code"] == "worker_lost"


async def waiting_in(run: BridgedRun) -> None:
    async with run:
        await asyncio.Event().wait()


@pytest.mark.parametrize("cancelled_by", [None, "user"])
async def test_block_that_is_closed_where_it_may_not_wait_ends_its_run(
    bridge: AgentWebSocketBridge, client: Client, cancelled_by: str | None
) -> None:
    run = await bridge.open(**opening())

    coroutine = waiting_in(run)
    coroutine.send(None)
    if cancelled_by is not None:
        run.request_stop(CancelAsked(cancelled_by))
    coroutine.close()
    if cancelled_by is not None:
        # Its cancellation was under way.
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
    with pytest.raises(GrammarViolation, match="left early"):
        await run.thinking("too late")
    ended = await client.ended(run.run_id)
    assert ended.summary.status == ("error" if cancelled_by is None else "cancelled")
    await eventually(partial(nothing_is_open, bridge))


async def test_error_in_a_task_group_ends_the_run_with_its_text(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async def refuse() -> None:
        raise AgentError("rate_limited", "Later.", retry_after_ms=5)

    with pytest.raises(ExceptionGroup):
        async with bridge.run(**opening()) as run, asyncio.TaskGroup() as group:
            group.create_task(refuse())
    error = (await client.ended(run.run_id)).as_json()["error"]
    assert (error["code"], error["error_message"]) == ("rate_limited", "Later.")


async def test_interrupted_block_ends_its_run(bridge: AgentWebSocketBridge, client: Client) -> None:
    with pytest.raises(KeyboardInterrupt):
        async with bridge.run(**opening()) as run:
            raise KeyboardInterrupt
    assert (await client.ended(run.run_id)).as_json()["error"]["code"] == "worker_lost"


async def test_lease_of_a_block_left_early_is_let_go_at_once(
    bridge: AgentWebSocketBridge,
) -> None:
    run = await bridge.open(**opening())

    coroutine = waiting_in(run)
    coroutine.send(None)
    assert len(bridge._leases._leases) == 1
    coroutine.close()
    # Before the event loop has had a turn: it may never get another one.
    assert bridge._leases._leases == []


async def test_run_without_a_block_ends_when_its_user_says(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    run = await bridge.open(**opening())
    await client.registry.cancel("alice", run.run_id)
    assert (await client.ended(run.run_id)).summary.status == "cancelled"
    assert run.is_cancelled
    with pytest.raises(PublishRefused):
        await run.complete("too late")
    with pytest.raises(GrammarViolation, match="cancelled by user"):
        await run.thinking("too late")
    await client.checked_log(run.run_id)


async def test_run_that_was_taken_away_stops_its_block(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async def carry_out() -> None:
        async with bridge.run(**opening()) as run:
            await client.link.client.hset(
                client.keys.user("alice").run(run.run_id), "fence", "another"
            )
            await asyncio.Event().wait()

    with pytest.raises(StaleFence):
        await asyncio.wait_for(carry_out(), 5)
    assert bridge.health().active_runs == 0


# --- what a queue beside it does ---


async def test_same_message_opens_no_second_run(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening(message_id="job-1")) as run:
        with pytest.raises(StaleFence):
            await bridge.open(**opening(message_id="job-1"))
    with pytest.raises(RunEnded):
        await bridge.open(**opening(message_id="job-1"))
    await client.checked_log(run.run_id)


async def test_runs_of_one_thread_do_not_wait_for_each_other(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening()) as first, bridge.run(**opening()) as second:
        await second.thinking("beside the first one")
    for run in (first, second):
        await client.checked_log(run.run_id)


async def test_quota_of_active_runs_holds(redis_url: str, key_prefix: str) -> None:
    settings = worker_settings(redis_url, key_prefix, max_active_runs_per_user=1)
    async with AgentWebSocketBridge(settings) as bridge, bridge.run(**opening()):
        with pytest.raises(RequestRefused, match="rate_limited"):
            await bridge.open(**opening())
        async with bridge.run(**opening(user_id="bob")):
            assert bridge.health().active_runs == 2


async def test_questions_and_other_agents_work_as_in_a_worker(
    settings: Settings, bridge: AgentWebSocketBridge, client: Client
) -> None:
    worker = Worker()

    @worker.agent("double")
    async def double(run: Run) -> int:
        return 2 * int(run.request.content)

    async with worker.running(settings), bridge.run(**opening()) as run:
        asking = asyncio.create_task(run.ask("Number?", timeout_s=30))

        async def request_id() -> str | None:
            detail = await client.registry.get("alice", run.run_id)
            return next(iter(detail.summary.open_inputs), None) if detail else None

        found = await eventually(request_id)
        await client.registry.answer_input("alice", run.run_id, found, InputAnswer("21"))
        run.result = await run.call_agent("double", await asking)
    assert (await client.ended(run.run_id)).as_json()["result"] == 42
    await client.checked_log(run.run_id)


# --- leases ---


async def test_lease_is_renewed_for_as_long_as_the_run_is_open(
    settings: Settings, bridge: AgentWebSocketBridge, client: Client
) -> None:
    keys = Keys(settings.key_prefix)
    async with Reaper(client.link, keys, lease_ms=1_000, cancel_grace_ms=300):
        async with bridge.run(**opening()) as run:
            await asyncio.sleep(2.5)
        assert (await client.ended(run.run_id)).summary.status == "completed"


async def test_run_of_a_bridge_that_vanished_ends(settings: Settings, client: Client) -> None:
    keys = Keys(settings.key_prefix)
    async with AgentWebSocketBridge(settings) as bridge:
        run = await bridge.open(**opening())
        await run.tool("t").begin()
        await run._stream.flush()
        # Gone without a word, as after SIGKILL.
        bridge._let_go(run)
        run._stream.close()
        async with Reaper(client.link, keys, lease_ms=1_000, cancel_grace_ms=300):
            error = (await client.ended(run.run_id)).as_json()["error"]
        assert error["code"] == "worker_lost"
        await client.checked_log(run.run_id)


# --- its own life ---


async def test_closing_ends_what_is_open_and_can_be_repeated(
    settings: Settings, client: Client
) -> None:
    bridge = AgentWebSocketBridge(settings)
    assert bridge.state is BridgeState.STARTING
    with pytest.raises(BridgeClosed):
        await bridge.open(**opening())
    await bridge.__aenter__()
    assert bridge.state is BridgeState.ACTIVE
    run = await bridge.open(**opening())
    with structlog.testing.capture_logs() as logs:
        await bridge.aclose()
        await bridge.aclose()
    assert [line["event"] for line in logs].count("bridge_closed") == 1
    assert bridge.state is BridgeState.CLOSED
    assert (await client.ended(run.run_id)).as_json()["error"]["code"] == "worker_lost"
    for call in (bridge.open(**opening()), bridge.notify("alice", "info", "x", "y")):
        with pytest.raises(BridgeClosed):
            await call
    with pytest.raises(BridgeClosed):
        await bridge.__aenter__()


async def test_closing_stops_blocks_that_are_at_work(settings: Settings, client: Client) -> None:
    bridge = AgentWebSocketBridge(settings)
    await bridge.__aenter__()
    opened: list[BridgedRun] = []

    async def carry_out() -> None:
        async with bridge.run(**opening()) as run:
            opened.append(run)
            await asyncio.Event().wait()

    task = asyncio.create_task(carry_out())

    async def has_started() -> bool:
        return bool(opened)

    await eventually(has_started)
    await bridge.aclose()
    with pytest.raises(PublishRefused, match="closed"):
        await task
    assert (await client.ended(opened[0].run_id)).as_json()["error"]["code"] == "worker_lost"


async def test_redis_that_is_not_there_at_the_start_is_a_failure(key_prefix: str) -> None:
    settings = worker_settings("redis://127.0.0.1:1/0", key_prefix)
    bridge = AgentWebSocketBridge(settings, name=f"b-{secrets.token_hex(2)}")
    with pytest.raises(RedisUnavailable):
        await bridge.__aenter__()
    health = bridge.health()
    assert health.state is BridgeState.FAILED
    assert not health.is_healthy
    assert "does not answer" in str(health.last_error)
    with pytest.raises(BridgeClosed, match="make another one"):
        await bridge.__aenter__()
    await bridge.aclose()
    await bridge.aclose()


def counted(bridge: AgentWebSocketBridge, name: str, **labels: str) -> float | None:
    labels = {"agent": "researcher", **labels}
    return bridge.metrics.registry.get_sample_value(f"relay_worker_{name}", labels)


async def test_metrics_are_each_bridges_own_and_tell_how_runs_ended(
    settings: Settings, client: Client
) -> None:
    async with AgentWebSocketBridge(settings) as one, AgentWebSocketBridge(settings) as other:
        async with one.run(**opening()):
            assert [counted(bridge, "runs_active") for bridge in (one, other)] == [1, None]
        with pytest.raises(AgentError):
            async with one.run(**opening()):
                raise AgentError("timeout")
        stopped = await one.open(**opening())
        await client.registry.cancel("alice", stopped.run_id)
        await client.ended(stopped.run_id)
        with pytest.raises(PublishRefused):
            await stopped.complete()
        taken = await one.open(**opening())
        await client.link.client.hset(
            client.keys.user("alice").run(taken.run_id), "fence", "another"
        )
        with pytest.raises(StaleFence):
            await taken.complete()
        await one.open(**opening())
    assert counted(one, "runs_active") == 0
    ended = {
        status: counted(one, "runs_ended_total", status=status)
        for status in ("completed", "error", "cancelled", "refused", "unfinished")
    }
    # What the close ended is the second error.
    assert ended == {
        "completed": 1,
        "error": 2,
        "cancelled": 1,
        "refused": 1,
        "unfinished": None,
    }
    assert counted(one, "run_seconds_count") == 4
    assert counted(other, "runs_ended_total", status="completed") is None


async def test_event_type_of_the_start_is_there_before_the_block(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    async with bridge.run(**opening()) as run:
        await client.has_event(run.run_id, EventType.AGENT_STARTED)


async def test_key_of_somebody_else_is_named_to_whoever_publishes(
    bridge: AgentWebSocketBridge, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    user = Keys(key_prefix).user("alice")

    async def publish_in_vain() -> None:
        async with bridge.run(**opening()) as run:
            await run.thinking("before")
            await run._stream.flush()
            await redis.delete(user.log)
            await redis.set(user.log, "of somebody else")
            await run.thinking("in vain")
            await run._stream.flush()

    with pytest.raises(PublishRefused, match="holds no stream"):
        await publish_in_vain()
    assert user.log in (bridge.health().last_error or "")
    with pytest.raises(KeyTaken, match="rename or delete the key"):
        async with bridge.run(**opening()):
            pass
    with pytest.raises(KeyTaken, match="holds no stream"):
        await bridge.emitter("alice").notify("info", "Hello", "you")
    async with bridge.run(**opening(user_id="bob")) as other:
        other.result = "as ever"
    assert bridge.state is BridgeState.ACTIVE
