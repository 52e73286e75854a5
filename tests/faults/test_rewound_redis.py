"""P3 when Redis comes back with less than it had: told by one ``reset``, or nothing was lost.

In every round two users are followed. Of *alice*, 100 events are lost; each of her clients is in
another place when that happens. *Bob's* channel is quiet all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay.errors import PublishRefused
from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.load import Load, LoadRun
from tests.faults.scene import under_load
from tests.faults.sizes import one_size
from tests.support.fleet import Fleet, FleetClient
from tests.support.proxy import RedisProxy
from tests.support.redis_server import RedisServer
from tests.support.stack import Stack

EARLY_EVENTS = 20
LOST_EVENTS = 100
NEW_EVENTS = 150
"""More than were lost: the offsets of those who were away are passed."""

POSITION_CHECK_S = 6.0


@dataclass
class Round:
    """What a rewind needs to know."""

    server: RedisServer
    proxy: RedisProxy
    prepare: Callable[[], Awaitable[None]]
    rewind: Callable[[], Awaitable[None]]


@contextlib.asynccontextmanager
async def restarted_empty(own_redis: OwnRedis) -> AsyncIterator[Round]:
    server = await own_redis()
    with RedisProxy(server.port) as proxy:
        yield Round(server, proxy, _nothing, lambda: _crash(server))


@contextlib.asynccontextmanager
async def flushed(own_redis: OwnRedis) -> AsyncIterator[Round]:
    server = await own_redis()

    async def flush() -> None:
        async with server.client() as redis:
            await redis.flushall()

    with RedisProxy(server.port) as proxy:
        yield Round(server, proxy, _nothing, flush)


@contextlib.asynccontextmanager
async def replaced_by_an_older_copy(own_redis: OwnRedis) -> AsyncIterator[Round]:
    server = await own_redis()
    copy = server.directory / "copy.rdb"

    async def save() -> None:
        async with server.client() as redis:
            await redis.save()
        shutil.copy(server.directory / "dump.rdb", copy)

    async def replace() -> None:
        await server.kill()
        shutil.copy(copy, server.directory / "dump.rdb")
        await server.start()

    with RedisProxy(server.port) as proxy:
        yield Round(server, proxy, save, replace)


@contextlib.asynccontextmanager
async def replica_promoted(own_redis: OwnRedis) -> AsyncIterator[Round]:
    server = await own_redis(options={"repl-diskless-sync-delay": "0"})
    with RedisProxy(server.port) as proxy, RedisProxy(server.port) as replication:
        address = f"127.0.0.1 {replication.port}"
        replica = await own_redis(options={"replicaof": address, "repl-ping-replica-period": "1"})

        async def stop_replication() -> None:
            async with server.client() as redis, replica.client() as other, asyncio.timeout(20):
                await redis.execute_command("WAIT", 1, 10_000)
                while (await other.info("replication"))["master_link_status"] != "up":
                    await asyncio.sleep(0.05)
            replication.blackhole()

        async def promote() -> None:
            async with replica.client() as redis:
                await redis.replicaof("NO", "ONE")
            proxy.retarget(replica.port)
            await server.kill()
            proxy.cut()

        yield Round(server, proxy, stop_replication, promote)


async def _nothing() -> None:
    return


async def _crash(server: RedisServer) -> None:
    await server.kill()
    await server.start()


async def _publish(run: LoadRun, count: int) -> None:
    for number in range(count):
        await (run.delta() if number % 3 == 0 else run.think())
    await run.settle()


def _is_at(run: LoadRun) -> Callable[[FleetClient], bool]:
    return lambda client: run.lifecycle[-1] in client.lifecycle(run.run_id)[-1:]


@one_size
@pytest.mark.parametrize(
    ("fault", "survives"),
    [
        pytest.param(restarted_empty, False, id="restarted-empty"),
        pytest.param(flushed, False, id="flushall"),
        pytest.param(replaced_by_an_older_copy, True, id="older-copy"),
        pytest.param(replica_promoted, True, id="replica-promoted"),
    ],
)
async def test_who_is_above_what_survived_gets_one_reset_and_nobody_else(
    fault: Callable[[OwnRedis], contextlib.AbstractAsyncContextManager[Round]],
    survives: bool,
    own_redis: OwnRedis,
    tmp_path: Path,
) -> None:
    async with fault(own_redis) as this:
        url = this.proxy.redis_url
        async with Stack(tmp_path, url) as stack, Load(url, stack.key_prefix) as load:
            await stack.start_gateways(2)
            async with Fleet(stack.urls, stack.token) as fleet:
                # Alice on both gateways, and three clients that will be away.
                online = [
                    fleet.add("alice", urls=[url], name=f"online-{url}") for url in stack.urls
                ]
                away_above = fleet.add("alice", name="away-above")
                away_at = fleet.add("alice", name="away-at")
                away_below = fleet.add("alice", name="away-below")
                quiet = fleet.add("bob", name="quiet")
                new = fleet.add("carol", name="new")
                await fleet.connect()

                kept = await load.open("alice")
                quiet_run = await load.open("bob")
                await _publish(quiet_run, 5)
                await _publish(kept, EARLY_EVENTS // 2)
                await away_below.until(_is_at(kept))
                await away_below.leave()
                await _publish(kept, EARLY_EVENTS // 2)
                await kept.think()
                await kept.settle()
                await away_at.until(_is_at(kept))
                await away_at.leave()
                await this.prepare()

                lost = await load.open("alice")
                await _publish(lost, LOST_EVENTS)
                await lost.complete()
                for client in (*online, away_above):
                    await client.until(_is_at(lost))
                await quiet.until(_is_at(quiet_run))
                await away_above.leave()

                await this.rewind()
                lost.is_lost = True
                await load.register()
                await _go_on([kept, quiet_run], survives)
                later = await load.open("alice")
                await _publish(later, NEW_EVENTS)
                for_carol = await load.open("carol")
                for client in (away_above, away_at, away_below):
                    await client.start()
                await load.complete_all()
                await arrive(load.runs, fleet.clients)
                verify(load.runs, fleet.clients)

                assert new.has_ended(for_carol.run_id)
                if not survives:
                    # Nothing is published to him: the position check has to find out.
                    await quiet.until(lambda one: bool(one.resets), POSITION_CHECK_S)
                resets = {client.name: len(client.resets) for client in fleet.clients}
                above = {client.name for client in (*online, away_above)}
                if not survives:
                    above |= {away_at.name, away_below.name, quiet.name}
                assert resets == {name: int(name in above) for name in resets}
                # A gateway that keeps its connections does not drop them for this.
                assert all(not client.outages for client in fleet.clients)


async def _go_on(runs: list[LoadRun], survives: bool) -> None:
    """Publish in runs from before: they go on, or Redis says that it does not know them."""
    for run in runs:
        if survives:
            await _publish(run, 3)
        else:
            await run.think()
            with pytest.raises(PublishRefused):
                await run.settle()
            run.is_lost = run.has_ended = True


@one_size
async def test_a_restart_with_a_complete_append_only_file_is_not_noticed(
    own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis(append_only=True)
    async with under_load(tmp_path, server.url) as (stack, load, fleet):
        clients = [fleet.add("alice", urls=[url]) for url in stack.urls]
        away = fleet.add("alice", name="away")
        await fleet.connect()
        run = await load.open("alice")
        for _ in range(3):
            await _publish(run, 20)
            await away.until(_is_at(run))
            await away.leave()
            publishing = asyncio.create_task(_publish(run, 20))
            await asyncio.sleep(0.01)
            await server.kill()
            await server.start()
            await publishing
            await run.think()
            await run.settle()
            await away.start()
            for client in clients:
                await client.until(_is_at(run))
        await load.complete_all()
        await arrive(load.runs, fleet.clients)
        verify(load.runs, fleet.clients)
        assert not any(client.resets for client in fleet.clients)
        assert not any(client.outages for client in clients)
