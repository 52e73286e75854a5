"""Quick agents that put the user and the request into everything they say."""

from __future__ import annotations

import asyncio
import os

from agent_worker import Run, Worker

worker = Worker("marked")

PIECES = 3


def mark(user_id: str, content: str) -> str:
    """Give what proves, within an event, for whom and for which request it was made."""
    return f"<{user_id}|{content}>"


async def say(run: Run, pause_s: float) -> str:
    """Publish one event of every kind, each with the mark."""
    own = mark(run.user_id, run.request.content)
    await run.thinking(f"thinking {own}")
    async with run.tool("look", {"mark": own}, f"calling {own}") as tool:
        await asyncio.sleep(pause_s)
        tool.result = {"mark": own, "pid": os.getpid()}
    for number in range(PIECES):
        await run.delta(f"{number} {own}")
        await asyncio.sleep(pause_s)
    return run.text


@worker.agent("quick", description="Says everything once.")
async def quick(run: Run) -> str:
    """Do it without a pause."""
    return await say(run, 0.0)


@worker.agent("steady", description="Says everything once, with pauses.")
async def steady(run: Run) -> str:
    """Take long enough that runs which are started together are at work together."""
    return await say(run, 0.3)
