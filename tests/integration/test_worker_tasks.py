from __future__ import annotations

import asyncio
import time

import pytest
import structlog
from redis.asyncio.connection import Connection

from agent_worker import Run, Worker
from agent_worker.task_streams import TaskStreams
from relay.codec import Task, encode_task
from relay.config import Settings
from relay.errors import ConfigurationError, RedisMisconfigured, RedisUnavailable
from relay.events import EventType
from relay.run_model import AgentInfo
from tests.conftest import OwnRedis
from tests.integration.worker_support import Client, echo_worker, eventually, worker_settings


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


POISON: list[tuple[dict[str | bytes, str | bytes], bytes, str]] = [
    ({"task": b"\xc1\x00garbage"}, b"\xc1\x00garbage", "not a task"),
    ({"task": b""}, b"", "not a task"),
    ({"task": b"\x80"}, b"\x80", "not a task"),
    ({"other": "x"}, b"other=x", "no such field"),
    ({"task": encode_task(Task("u" * 300, "run_x", "echo"))}, b"uuu", "not a task"),
    (
        {"task": encode_task(Task("alice", "run_x", "nobody"))},
        encode_task(Task("alice", "run_x", "nobody")),
        "agent 'nobody' is unknown here",
    ),
]


@pytest.mark.parametrize(("fields", "raw", "reason"), POISON)
async def test_poison_task_goes_to_the_dead_letters_and_the_next_task_works(
    settings: Settings, fields: dict[str | bytes, str | bytes], raw: bytes, reason: str
) -> None:
    async with Client(settings) as client, echo_worker().running(settings):
        redis = client.link.client
        stream = client.keys.tasks("echo")
        entry_id = await redis.xadd(stream, fields)  # type: ignore[arg-type]
        assert (await client.ended(await client.submit("echo"))).summary.status == "completed"

        async def dead_letters() -> object:
            return await redis.xrange(client.keys.dead_letters)

        [(_, letter)] = await eventually(dead_letters)
        assert raw in letter[b"task"]
        assert reason in letter[b"reason"].decode()
        assert letter[b"agent"] == b"echo"
        assert letter[b"entry_id"] == entry_id
        assert int(letter[b"at_ms"]) > 1_700_000_000_000

        async def is_settled() -> bool:
            return (await redis.xpending(stream, "workers"))["pending"] == 0

        await eventually(is_settled)
        assert await redis.xlen(stream) == 0


async def test_run_whose_hash_cannot_be_read_does_not_stop_the_worker(settings: Settings) -> None:
    async with Client(settings) as client:
        async with echo_worker().running(settings):
            await client.ended(await client.submit("echo"))
        run_id = await client.submit("echo")
        user = client.keys.user(client.user_id)
        await client.link.client.hset(user.run(run_id), "request", b"\xff not json")
        async with echo_worker().running(settings):
            assert (await client.ended(await client.submit("echo"))).summary.status == "completed"
            [(_, letter)] = await client.link.client.xrange(client.keys.dead_letters)
            assert b"cannot be read" in letter[b"reason"]


@pytest.mark.parametrize(("agents", "concurrency"), [(1, 3), (3, 2), (4, 8)])
async def test_worker_never_has_more_tasks_than_its_concurrency(
    redis_url: str, key_prefix: str, agents: int, concurrency: int
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_concurrency=concurrency)
    worker = Worker()
    at_work: set[str] = set()
    most = 0
    most_pending = 0
    is_full = asyncio.Event()
    names = [f"a{n}" for n in range(agents)]

    async with Client(settings) as client:

        async def busy(run: Run) -> str:
            nonlocal most, most_pending
            at_work.add(run.run_id)
            most = max(most, len(at_work))
            # Counted in one step: between two the worker may settle one and take another.
            async with client.link.client.pipeline(transaction=True) as pipe:
                for name in names:
                    pipe.xpending(client.keys.tasks(name), "workers")
                pending = sum(int(summary["pending"]) for summary in await pipe.execute())
            most_pending = max(most_pending, pending)
            # All places must be taken once; after that every run is over at once.
            if len(at_work) == concurrency:
                is_full.set()
            async with asyncio.timeout(5):
                await is_full.wait()
            at_work.discard(run.run_id)
            return "ok"

        for name in names:
            worker.agent(name)(busy)
        await client.registry.register_agents([AgentInfo(name) for name in names])
        clients = [Client(settings, f"user{n}") for n in range(4)]
        runs = [
            (one, await one.submit(name))
            for one in clients
            for name in names
            for _ in range(10 // agents)
        ]
        async with worker.running(settings):
            for one, run_id in runs:
                await one.ended(run_id)
        for one in clients:
            await one.link.aclose()
    assert most == concurrency
    # A task is settled a moment after its run has ended, and until then it keeps its place.
    assert most_pending <= concurrency


async def test_idle_worker_with_one_place_and_several_agents_answers_at_once(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_concurrency=1)
    names = ("a", "b", "c")
    async with Client(settings) as client, echo_worker(*names).running(settings):
        for name in names * 2:
            await asyncio.sleep(0.02)
            began_s = time.monotonic()
            await client.ended(await client.submit(name))
            assert time.monotonic() - began_s < 0.3


async def test_tasks_beyond_the_room_go_back_to_their_stream(settings: Settings) -> None:
    names = ["a", "b", "c"]
    async with Client(settings) as client:
        redis = client.link.client
        streams = TaskStreams(client.link, client.keys, names, "me")
        await streams.prepare([])
        taking = asyncio.create_task(streams.take(1))
        async with redis.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.xadd(client.keys.tasks(name), {"task": name})
            await pipe.execute()
        entries = await taking
        assert len(entries) == 1
        assert [
            (await redis.xpending(client.keys.tasks(name), "workers"))["pending"] for name in names
        ].count(1) == 1
        assert [await redis.xlen(client.keys.tasks(name)) for name in names] == [1, 1, 1]
        await streams.settle(entries[0])
        assert {entry.payload for entry in [*await streams.take(1), *await streams.take(1)]} == {
            name.encode() for name in names if name != entries[0].agent
        }
        await streams.aclose()


async def test_tasks_whose_delivery_was_lost_are_found_again(settings: Settings) -> None:
    async with Client(settings) as client:
        streams = TaskStreams(client.link, client.keys, ["echo"], "me")
        assert await streams.prepare([]) == []
        await client.link.client.xadd(client.keys.tasks("echo"), {"task": "lost"})
        # Redis has delivered it to this consumer, which never saw the reply.
        await client.link.client.xreadgroup("workers", "me", {client.keys.tasks("echo"): ">"})
        [entry] = await streams.prepare([])
        assert entry.payload == b"lost"
        assert await streams.prepare([entry.key]) == []
        await streams.aclose()


async def test_flushed_redis_is_served_again(own_redis: OwnRedis, key_prefix: str) -> None:
    server = await own_redis()
    settings = worker_settings(server.url, key_prefix)
    async with (
        Client(settings) as client,
        echo_worker("echo", "other").running(settings) as running,
    ):
        await client.ended(await client.submit("echo"))
        await client.link.client.flushall()
        # ``submit`` waits until the agent is registered again, without any restart.
        for agent in ("echo", "other"):
            assert (await client.ended(await client.submit(agent))).summary.status == "completed"

        async def presence() -> object:
            return await client.link.client.get(client.keys.worker(running.worker_id))

        await eventually(presence)


async def test_redis_that_goes_away_and_comes_back_loses_nothing(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis(append_only=True)
    settings = worker_settings(server.url, key_prefix)
    worker = echo_worker()
    go_on = asyncio.Event()

    @worker.agent("through")
    async def through(run: Run) -> str:
        await run.delta("before ")
        await go_on.wait()
        await run.thinking("while Redis is away")
        await run.delta("after")
        return run.text

    async with Client(settings) as client, worker.running(settings):
        run_id = await client.submit("through")
        await client.has_event(run_id, EventType.AGENT_STARTED)
        await server.stop()
        go_on.set()
        await asyncio.sleep(0.3)
        await server.start()
        assert (await client.ended(run_id)).as_json()["result"] == "before after"
        await client.checked_log(run_id)
        assert (await client.ended(await client.submit("echo"))).summary.status == "completed"


async def test_task_submitted_while_the_worker_is_cut_off_is_done_afterwards(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis(append_only=True)
    settings = worker_settings(server.url, key_prefix)
    async with Client(settings) as client, echo_worker().running(settings):
        await client.ended(await client.submit("echo"))
        for _ in range(3):
            await client.link.client.client_kill_filter(_type="normal", skipme=True)
            await client.link.client.client_kill_filter(_type="pubsub", skipme=True)
            run_id = await client.submit("echo")
            assert (await client.ended(run_id)).summary.status == "completed"


async def test_redis_that_is_away_at_the_start_is_a_clear_error(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    await server.stop()
    with pytest.raises(RedisUnavailable, match="does not answer"):
        await echo_worker().serve(worker_settings(server.url, key_prefix))


async def test_wrong_password_is_a_clear_error_that_hides_it(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis(password="right-password")
    url = server.url.replace("right-password", "wrong-password")
    with pytest.raises(RedisMisconfigured, match="RELAY_REDIS_URL") as refused:
        async with echo_worker().running(worker_settings(url, key_prefix)):
            pass
    assert "wrong-password" not in str(refused.value)


async def test_worker_without_agents_is_a_clear_error(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="has no agent"):
        await Worker("empty").serve(settings)


async def test_worker_can_be_stopped_while_redis_is_away(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    settings = worker_settings(server.url, key_prefix, cancel_grace_ms=100)
    worker = Worker()

    @worker.agent("waiting")
    async def waiting(run: Run) -> None:
        await asyncio.Event().wait()

    with structlog.testing.capture_logs() as logs:
        async with Client(settings) as client, worker.running(settings):
            run_id = await client.submit("waiting")
            await client.has_event(run_id, EventType.AGENT_STARTED)
            await server.stop()
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 12
    assert "run_left_unfinished" in [line["event"] for line in logs]


async def test_claim_whose_answer_was_lost_is_asked_for_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Client(settings) as client, echo_worker().running(settings):
        await client.ended(await client.submit("echo"))
        lost: list[bytes] = []
        read_response = Connection.read_response

        async def lose_one_claim(self: Connection, *args: object, **kwargs: object) -> object:
            response = await read_response(self, *args, **kwargs)  # type: ignore[arg-type]
            if not lost and isinstance(response, list) and response[:1] == [b"claimed"]:
                lost.append(response[0])
                raise ConnectionError("cut")
            return response

        monkeypatch.setattr(Connection, "read_response", lose_one_claim)
        run_id = await client.submit("echo")
        assert (await client.ended(run_id)).summary.status == "completed"
        assert lost
        events = await client.checked_log(run_id)
        assert [event["attempt"] for event in events[1:]] == [1, 1]
