"""P2 and P3 while pub/sub loses messages, connections and answers: repaired, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from relay.codec import decode_live
from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.conftest import Report
from tests.faults.load import Load, keep_publishing
from tests.faults.scene import under_load
from tests.faults.sizes import one_size, sized
from tests.support.fleet import Fleet, FleetClient, percentile
from tests.support.proxy import RedisProxy
from tests.support.stack import GatewayProcess, Stack

NOTICE_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Size:
    users: int
    published_per_s: float
    seconds: float
    delay_limit_ms: float
    last_one_limit_s: float


SMALL = Size(8, published_per_s=160, seconds=4, delay_limit_ms=2_000, last_one_limit_s=10)


@sized(
    small=SMALL,
    full=Size(50, published_per_s=500, seconds=30, delay_limit_ms=1_000, last_one_limit_s=5),
)
async def test_subscriptions_killed_every_second_are_not_noticed(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with (
        under_load(tmp_path, server.url) as (stack, load, fleet),
        server.client() as redis,
    ):
        users = [f"user-{number}" for number in range(size.users)]
        for user_id in users:
            fleet.add(user_id)
            fleet.add(user_id)
        await fleet.connect()
        runs = [await load.open(user_id) for user_id in users]
        end_s = time.monotonic() + size.seconds
        publishing = asyncio.create_task(
            keep_publishing(runs, size.published_per_s, lambda: time.monotonic() > end_s)
        )
        killed = 0
        while time.monotonic() < end_s:
            await asyncio.sleep(1.0)
            killed += await redis.client_kill_filter(_type="pubsub")
        await publishing
        await load.complete_all()
        await arrive(load.runs, fleet.clients)
        verify(load.runs, fleet.clients)
        assert not fleet.outages()
        assert killed >= size.seconds
        delays = [
            client.delay_s(index) * 1_000
            for client in fleet.clients
            for index, event in enumerate(client.events)
            if event["type"] == "agent_thinking"
        ]
        assert percentile(delays, 0.99) < size.delay_limit_ms
        report(killed=killed, p50_ms=percentile(delays, 0.5), p99_ms=percentile(delays, 0.99))
        stack.assert_no_defects()


@sized(
    small=SMALL,
    full=Size(50, published_per_s=1_000, seconds=30, delay_limit_ms=250, last_one_limit_s=5),
)
async def test_swallowed_messages_are_repaired_by_the_next_or_the_position_check(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    with RedisProxy(server.port, seed=1) as first, RedisProxy(server.port, seed=2) as second:
        async with (
            Stack(tmp_path, server.url) as stack,
            Load(server.url, stack.key_prefix) as load,
        ):
            proxies = [first, second]
            for proxy in proxies:
                await stack.start_gateway(redis_url=proxy.redis_url)
            async with Fleet(stack.urls, stack.token) as fleet:
                users = [f"user-{number}" for number in range(size.users)]
                for user_id in users:
                    for url in stack.urls:
                        fleet.add(user_id, urls=[url])
                await fleet.connect()
                runs = [await load.open(user_id) for user_id in users]
                for proxy in proxies:
                    proxy.swallow_messages(0.05)
                end_s = time.monotonic() + size.seconds
                await keep_publishing(
                    runs, size.published_per_s, lambda: time.monotonic() > end_s, lifecycle_share=2
                )
                for run in runs:
                    await run.think()
                await load.settle()
                swallowed = [list(proxy.swallowed) for proxy in proxies]
                for client in fleet.clients:
                    run = next(run for run in runs if run.user_id == client.user_id)
                    await client.until(lambda one, run=run: _has(one, run.lifecycle[-1][0]), 10.0)
                repairs = _repairs(fleet, stack, swallowed)

                # The last one of a burst: nothing follows that would show the gap.
                for proxy in proxies:
                    proxy.swallow_messages(1.0)
                for run in runs:
                    await run.think()
                await load.settle()
                await asyncio.sleep(0.1)
                for proxy in proxies:
                    proxy.swallow_messages(0.0)
                last_ones = [
                    len(proxy.swallowed) - len(before)
                    for proxy, before in zip(proxies, swallowed, strict=True)
                ]
                assert min(last_ones) >= len(runs), "not every last one was swallowed"
                waits = await asyncio.gather(
                    *(
                        client.until(
                            lambda one, run=run: _has(one, run.lifecycle[-1][0]),
                            size.last_one_limit_s,
                        )
                        for run in runs
                        for client in fleet.clients
                        if client.user_id == run.user_id
                    )
                )
                await load.complete_all()
                await arrive(load.runs, fleet.clients)
                verify(load.runs, fleet.clients)
                assert not fleet.outages()
                report(
                    swallowed=sum(map(len, swallowed)),
                    repair_p50_ms=percentile(repairs, 0.5),
                    repair_p99_ms=percentile(repairs, 0.99),
                    last_one_max_ms=max(waits) * 1_000,
                )
                assert percentile(repairs, 0.99) < size.delay_limit_ms
            stack.assert_no_defects()


def _has(client: FleetClient, seq: int) -> bool:
    return any(event.get("seq") == seq for event in reversed(client.events))


def _repairs(fleet: Fleet, stack: Stack, swallowed: list[list[bytes]]) -> list[float]:
    """Give how long after the following event each swallowed one arrived, in ms."""
    repairs = []
    for url, payloads in zip(stack.urls, swallowed, strict=True):
        lost = {}
        for payload in payloads:
            for publication in decode_live(payload).publications:
                lost.setdefault(publication.run_id, set()).add(publication.offset)
        for client in fleet.clients:
            if client.urls != [url]:
                continue
            for index, event in enumerate(client.events[:-1]):
                is_lost = event["offset"] in lost.get(event["run_id"], ())
                if is_lost and client.events[index + 1]["offset"] not in lost[event["run_id"]]:
                    repairs.append(max(0.0, client.delay_s(index, since=index + 1)) * 1_000)
    assert repairs
    return repairs


@contextlib.asynccontextmanager
async def watched_readiness(gateway: GatewayProcess) -> AsyncIterator[list[tuple[float, bool]]]:
    """Ask for readiness all the time; gives the answers with their times."""
    answers: list[tuple[float, bool]] = []

    async def watch() -> None:
        while True:
            answers.append((time.monotonic(), await gateway.is_ready()))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield answers
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@one_size
async def test_a_cut_subscription_is_noticed_and_readiness_is_red_meanwhile(
    own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    with RedisProxy(server.port) as proxy:
        async with (
            Stack(tmp_path, server.url) as stack,
            Load(server.url, stack.key_prefix) as load,
        ):
            gateway = await stack.start_gateway(redis_url=proxy.redis_url)
            async with Fleet(stack.urls, stack.token) as fleet:
                client = fleet.add("alice")
                await fleet.connect()
                run = await load.open("alice")
                await client.until(lambda one: len(one.events) == 2)
                async with watched_readiness(gateway) as answers:
                    began_s = time.monotonic()
                    assert proxy.blackhole(pubsub_only=True) == 1
                    await run.think()
                    await run.delta()
                    await client.until(lambda one: bool(one.texts(run.run_id).pieces), 5.0)
                    repaired_s = time.monotonic() - began_s
                    await gateway.wait_ready(5.0)
                    red = [at_s - began_s for at_s, is_ready in answers if not is_ready]
                await run.complete()
                await arrive(load.runs, fleet.clients)
                verify(load.runs, fleet.clients)
                assert not fleet.outages()
                assert red
                assert min(red) < NOTICE_DEADLINE_S
                report(repaired_ms=repaired_s * 1_000, red_after_ms=min(red) * 1_000)


@one_size
async def test_gateways_keep_their_connections_while_redis_is_away(
    own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    with RedisProxy(server.port) as proxy:
        async with (
            Stack(tmp_path, server.url) as stack,
            Load(server.url, stack.key_prefix) as load,
        ):
            gateway = await stack.start_gateway(redis_url=proxy.redis_url)
            async with Fleet(stack.urls, stack.token) as fleet:
                client = fleet.add("alice")
                await fleet.connect()
                run = await load.open("alice")
                began_s = time.monotonic()
                proxy.blackhole()
                await client.until(lambda one: _degraded(one) == [True], 10.0)
                told_s = time.monotonic() - began_s
                assert not await gateway.is_ready()
                answer = await open_websocket(gateway, stack.token("alice"))
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
                await run.think()
                await load.settle()
                proxy.accept()
                proxy.cut()
                back_s = await client.until(lambda one: _degraded(one) == [True, False], 10.0)
                await run.complete()
                await arrive(load.runs, fleet.clients)
                verify(load.runs, fleet.clients)
                assert not fleet.outages()
                await gateway.wait_ready(5.0)
                report(told_after_ms=told_s * 1_000, back_after_ms=back_s * 1_000)


def _degraded(client: FleetClient) -> list[bool]:
    frames = [frame for _, frame in client.frames if frame["type"] == "degraded"]
    return [not frame.get("ended", False) for frame in frames]


async def open_websocket(gateway: GatewayProcess, token: str) -> httpx.Response:
    """Ask for an upgrade and give the answer, which is a refusal."""
    headers = {
        "Authorization": f"Bearer {token}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=15.0) as client:
        return await client.get("/v1/ws", headers=headers)


@sized(small=30, full=1_000)
async def test_lost_acknowledgements_double_nothing(
    size: int, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    with RedisProxy(server.port) as proxy:
        async with (
            Stack(tmp_path, server.url) as stack,
            Load(proxy.redis_url, stack.key_prefix) as load,
        ):
            await stack.start_gateway()
            async with Fleet(stack.urls, stack.token) as fleet:
                fleet.add("alice")
                await fleet.connect()
                runs = [await load.open("alice") for _ in range(3)]
                for step in range(size):
                    if step % 3 == 0:
                        proxy.lose_next_reply()
                    run = runs[step % len(runs)]
                    await run.think()
                    await run.delta()
                    await run.settle()
                proxy.lose_next_reply()
                await load.complete_all()
                assert proxy.replies_to_lose == 0
                await arrive(load.runs, fleet.clients)
                verify(load.runs, fleet.clients)
                report(lost_acknowledgements=size // 3 + 1)
