"""A page reloaded at any moment shows what the page next to it shows that was never reloaded."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.load import LoadRun
from tests.faults.scene import under_load
from tests.faults.sizes import sized
from tests.support.fleet import FleetClient, Frame

RELOADS_PER_RUN = 10
STEPS = 60


async def work(run: LoadRun) -> None:
    """Do in a run what agents do, in about a second."""
    chooser = random.Random(run.run_id)
    for _ in range(STEPS):
        chance = chooser.random()
        if chance < 0.1:
            await run.think()
        elif chance < 0.2:
            await run.call_tool()
        else:
            await run.delta()
        await asyncio.sleep(0.015)
    await run.complete()


def final_state(client: FleetClient, run: LoadRun) -> tuple[list[Frame], dict[object, str]]:
    """Give what a page shows of a run: its lifecycle events and its texts."""
    lifecycle = [
        event for event in client.current if event.get("run_id") == run.run_id and "seq" in event
    ]
    return lifecycle, dict(client.texts(run.run_id).pieces)


@sized(small=10, full=100)
async def test_a_reload_at_any_moment_ends_in_the_same_state(
    size: int, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    chooser = random.Random(6)
    async with under_load(tmp_path, server.url) as (_, load, fleet):
        tab = fleet.add("alice", name="tab")
        await fleet.connect()
        done = 0
        while done < size:
            run = await load.open("alice")
            working = asyncio.create_task(work(run))
            reloaded = []
            for number in range(min(RELOADS_PER_RUN, size - done)):
                # The last one reloads when the run has just ended.
                if number == RELOADS_PER_RUN - 1:
                    await working
                else:
                    await asyncio.sleep(chooser.random() * 0.2)
                page = fleet.add("alice", name=f"reload-{done}")
                await page.start()
                reloaded.append(page)
                done += 1
            await working
            pages = [tab, *reloaded]
            await arrive([run], pages)
            verify([run], pages)
            expected = final_state(tab, run)
            for page in reloaded:
                assert final_state(page, run) == expected, page.name
                await page.leave()
                fleet.clients.remove(page)
