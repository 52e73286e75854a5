"""An agent that begins and then waits: what a run at work weighs, without what its work weighs."""

from __future__ import annotations

import asyncio

from agent_worker import Run, Worker

worker = Worker(name="benchmark-idle")


@worker.agent("idle", description="Waits until it is cancelled.")
async def wait(run: Run) -> None:
    await run.thinking("waiting")
    await asyncio.Event().wait()
