"""Redis may lose any key of a user, in any order: no wedge, no stale floor, no silence."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import redis.asyncio

from relay.errors import PublishRefused
from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.load import Load
from tests.faults.scene import under_load
from tests.faults.sizes import sized
from tests.support.fleet import Fleet
from tests.support.stack import Stack

USERS_AT_ONCE = 10
NAMES = ("channel", "log", "texts", "runs", "threads")


async def expire(client: redis.asyncio.Redis, key: str) -> None:
    """Let a key expire as it does by itself."""
    await client.pexpire(key, 1)
    await asyncio.sleep(0.003)


@sized(small=12, full=120)
async def test_keys_that_expire_in_any_order_leave_a_channel_that_works(
    size: int, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    orders = list(itertools.permutations(NAMES))
    chosen = random.Random(7).sample(orders, size)
    async with (
        under_load(tmp_path, server.url) as (stack, load, fleet),
        server.client() as client,
    ):
        places = asyncio.Semaphore(USERS_AT_ONCE)

        async def live_through(number: int, order: tuple[str, ...]) -> None:
            async with places:
                await _live_through(f"user-{number}", order, load, fleet, client)

        async with asyncio.TaskGroup() as group:
            for number, order in enumerate(chosen):
                group.create_task(live_through(number, order))
        stack.assert_no_defects()


async def _live_through(
    user_id: str,
    order: tuple[str, ...],
    load: Load,
    fleet: Fleet,
    client: redis.asyncio.Redis,
) -> None:
    watcher = fleet.add(user_id, name=f"{user_id}/{'-'.join(order)}")
    away = fleet.add(user_id, name=f"{watcher.name}/away")
    await watcher.start()
    await away.start()
    keys = load.keys.user(user_id)
    run = await load.open(user_id)
    await run.think()
    await run.delta()
    await run.settle()
    await away.until(lambda one: bool(one.texts(run.run_id).pieces))
    await away.leave()
    for name in order:
        await expire(client, getattr(keys, name))
        # The run itself is kept: it goes on, whatever else is gone.
        await run.think()
        await run.delta()
        await run.settle()
    await run.complete()
    stored = await client.hmget(keys.channel, ["offset", "floor"])
    assert int(stored[1]) <= int(stored[0])

    # From here on everything must be as if nothing had happened, for everybody.
    after = await load.open(user_id)
    await away.start()
    newcomer = fleet.add(user_id, name=f"{watcher.name}/newcomer")
    await newcomer.start()
    await after.think()
    await after.delta()
    await after.complete()
    followers = [watcher, away, newcomer]
    await arrive([after], followers)
    verify([after], followers)
    for one in (watcher, away):
        # Never silence: the end of the run that went on, or a reset.
        assert one.has_ended(run.run_id) or one.resets, one.name

    # A position that is up to date is not below the floor.
    resets = len(watcher.resets)
    await watcher.leave()
    await watcher.start()
    last = await load.open(user_id)
    await last.complete()
    await arrive([last], followers)
    verify([last], followers)
    assert len(watcher.resets) == resets
    for one in followers:
        await one.leave()


@sized(small=4, full=40)
async def test_a_run_whose_key_is_gone_is_refused_and_the_next_one_works(
    size: int, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    async with (
        Stack(tmp_path, server.url) as stack,
        Load(server.url, stack.key_prefix) as load,
        server.client() as client,
    ):
        await stack.start_gateway()
        async with Fleet(stack.urls, stack.token) as fleet:
            for number in range(size):
                user_id = f"user-{number}"
                watcher = fleet.add(user_id)
                await watcher.start()
                run = await load.open(user_id)
                await run.delta()
                await run.settle()
                await expire(client, load.keys.user(user_id).run(run.run_id))
                await run.think()
                try:
                    await run.settle()
                    raise AssertionError("a run that Redis does not know was published to")
                except PublishRefused:
                    run.is_lost = run.has_ended = True
                after = await load.open(user_id)
                await after.complete()
                await arrive([after], [watcher])
                verify([after], [watcher])
