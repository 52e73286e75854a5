from __future__ import annotations

import asyncio
import contextlib

from relay.cancellation import end_tasks


async def test_task_that_loses_its_first_cancellation_ends_all_the_same() -> None:
    lost = 0

    async def loop_for_ever() -> None:
        nonlocal lost
        while True:
            if lost:
                await asyncio.sleep(60)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            lost += 1

    task = asyncio.create_task(loop_for_ever())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await end_tasks([task])
    assert lost == 1
    assert task.cancelled()


async def test_ended_and_failed_tasks_are_no_concern() -> None:
    async def fail() -> None:
        raise ValueError

    done = asyncio.create_task(fail())
    await asyncio.wait({done})
    await end_tasks([done])
    await end_tasks([])
    assert isinstance(done.exception(), ValueError)
