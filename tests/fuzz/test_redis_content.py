"""Whatever somebody writes into Redis: gateway and worker survive, say so, and serve the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import msgpack
import pytest
import redis.asyncio
import structlog

from gateway.app import running_gateway
from relay.keys import Keys, UserKeys
from tests.integration.gateway_support import Work, eventually, gateway_settings, http, raw_tab, tab
from tests.integration.gateway_support import bearer as bearer_of
from tests.integration.test_rolling_upgrade import echo_worker
from tests.integration.worker_support import worker_settings

SEED = 20261123

Corruption = Callable[[Random, "redis.asyncio.Redis", UserKeys, str], Awaitable[object]]


def garbage(random: Random) -> bytes:
    """Give bytes that are nothing, or nearly something."""
    values: list[Any] = [None, -1, 2**63, 1.5, "é", b"\xff", [], {}, [1, "e", [[]]], {"v": 1}]
    match random.randrange(5):
        case 0:
            return random.randbytes(random.choice((0, 1, 30, 3_000)))
        case 1:
            packed: bytes = msgpack.packb(random.choice(values))
            return packed
        case 2:
            entries = [[random.choice(values) for _ in range(random.randrange(7))]]
            message: bytes = msgpack.packb([random.choice((1, 1, 2)), "e1", entries])
            return message
        case 3:
            return random.choice((b"{", b"null", b"[]", b'{"a":', b"1e999", b"\x00", b"nan", b"-"))
        case _:
            return b"%d" % random.choice((-1, 0, 2**31, 2**53, 2**63, 2**64, 10**30))


async def wrong_type(random: Random, client: redis.asyncio.Redis, key: str) -> None:
    # In one step: gateway and worker write to the same keys meanwhile.
    async with client.pipeline(transaction=True) as step:
        step.delete(key)
        match random.randrange(4):
            case 0:
                step.set(key, garbage(random))
            case 1:
                step.rpush(key, garbage(random))
            case 2:
                step.sadd(key, garbage(random) or b"x")
            case _:
                step.hset(key, garbage(random).hex(), garbage(random))
        await step.execute()


async def live(random: Random, client: redis.asyncio.Redis, user: UserKeys, run_id: str) -> None:
    await client.publish(user.live, garbage(random))


async def run_hash(
    random: Random, client: redis.asyncio.Redis, user: UserKeys, run_id: str
) -> None:
    # What was corrupted before may be no hash any more.
    with contextlib.suppress(redis.asyncio.ResponseError):
        names = [name.decode() for name in await client.hkeys(user.run(run_id))] or ["status"]
        await client.hset(user.run(run_id), random.choice(names), garbage(random))


async def channel_hash(
    random: Random, client: redis.asyncio.Redis, user: UserKeys, run_id: str
) -> None:
    names = ["epoch", "offset", "floor", "tail", "bytes", "instance", "previous", "touched"]
    with contextlib.suppress(redis.asyncio.ResponseError):
        await client.hset(user.channel, random.choice(names), garbage(random))


async def log_entry(
    random: Random, client: redis.asyncio.Redis, user: UserKeys, run_id: str
) -> None:
    fields = {name: garbage(random) for name in ("s", "r", "e", "t", "z", "d", "x")}
    kept = {name: fields[name] for name in random.sample(sorted(fields), random.randint(1, 7))}
    with contextlib.suppress(redis.asyncio.ResponseError):
        await client.xadd(user.log, kept, id=random.choice(("*", "5-5", "999999-0")))


async def text(random: Random, client: redis.asyncio.Redis, user: UserKeys, run_id: str) -> None:
    name = random.choice((f"{run_id}:1:m", f"{run_id}:x:m", "\x00", "a:b", ":::"))
    with contextlib.suppress(redis.asyncio.ResponseError):
        await client.zadd(user.texts, {name: random.choice((-1.5, 0, 3, 2**53, float("inf")))})
        await client.set(user.base + "text:" + name, garbage(random))


async def any_key(random: Random, client: redis.asyncio.Redis, user: UserKeys, run_id: str) -> None:
    keys = (user.channel, user.log, user.texts, user.runs, user.threads, user.run(run_id))
    await wrong_type(random, client, random.choice(keys))


CORRUPTIONS: list[Corruption] = [live, run_hash, channel_hash, log_entry, text, any_key]


async def poison_tasks(random: Random, client: redis.asyncio.Redis, keys: Keys) -> None:
    fields = random.choice(({"task": garbage(random)}, {"x": garbage(random)}))
    await client.xadd(keys.tasks("echo"), fields)  # type: ignore[arg-type]


async def rounds(redis_url: str, key_prefix: str, seed: int, count: int) -> None:
    """Corrupt one user's keys again and again, while that user and another one go on."""
    print(f"seed {seed}")
    random = Random(seed)
    settings = gateway_settings(redis_url, key_prefix)
    worker = echo_worker().running(worker_settings(redis_url, key_prefix))
    async with (
        redis.asyncio.Redis.from_url(redis_url) as client,
        running_gateway(settings) as gateway,
        Work(settings) as work,
        worker,
        # It goes on for longer than a token of the tests is good for.
        tab(gateway, "bystander", ttl_s=3_600) as bystander,
    ):
        for number in range(count):
            victim = f"victim-{number}"
            user = work.keys.user(victim)
            run_id = await work.submit(victim)
            async with contextlib.AsyncExitStack() as stack:
                opened = await stack.enter_async_context(
                    raw_tab(gateway, headers=bearer_of(victim))
                )
                await opened.until("connection_established")
                for _ in range(random.randint(1, 3)):
                    await random.choice(CORRUPTIONS)(random, client, user, run_id)
                await poison_tasks(random, client, work.keys)
                # The victim's own requests are answered, if only by a problem.
                async with http(gateway, victim) as api:
                    for answer in (
                        await api.get("/v1/runs"),
                        await api.get(f"/v1/runs/{run_id}"),
                        await api.post(f"/v1/runs/{run_id}/cancel"),
                    ):
                        assert answer.status_code in (200, 202, 404, 409, 500, 503)
                        assert answer.json()
                # One that returns is held off, or served; either way without an end to the others.
                late = raw_tab(gateway, headers=bearer_of(victim), query="?since=0")
                await stack.enter_async_context(late)
            # And nobody else notices.
            other = await work.submit("bystander")
            await bystander.until("agent_completed", run_id=other)
            assert await bystander.is_alive()
        await check_tasks(client, work.keys)
        assert gateway.health.is_ready


async def check_tasks(client: redis.asyncio.Redis, keys: Keys) -> None:
    """All poison has gone to the dead letters, or waits for newer workers."""
    stream = keys.tasks("echo")

    async def is_settled() -> bool:
        entries = await client.xrange(stream)
        return all(b"first" in fields for _, fields in entries) or not entries

    await eventually(is_settled)
    assert await client.xlen(keys.dead_letters) > 0


async def play(redis_url: str, key_prefix: str, seed: int, count: int) -> None:
    with structlog.testing.capture_logs() as logs:
        await rounds(redis_url, key_prefix, seed, count)
    said = {line["event"] for line in logs if line["log_level"] in ("error", "warning")}
    assert "task_dead_lettered" in said
    if count > 20:
        assert "history not understood" in said
        assert "live message not understood: history is read instead" in said
    # Only what was expected to fail did: no task of the gateway ended, and nothing of the worker.
    for broken in ("feed work failed", "a part of the gateway failed", "task_failed"):
        assert broken not in said, [line for line in logs if line["event"] == broken]


async def test_gateway_and_worker_survive_whatever_redis_holds(
    redis_url: str, key_prefix: str
) -> None:
    async with asyncio.timeout(100):
        await play(redis_url, key_prefix, SEED, 3)


@pytest.mark.faults_full
async def test_gateway_and_worker_survive_whatever_redis_holds_for_long(
    redis_url: str, key_prefix: str
) -> None:
    seed = Random().getrandbits(32)
    await play(redis_url, key_prefix, seed, 300)
