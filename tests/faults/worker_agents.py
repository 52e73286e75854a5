"""Agents that are still at work when the fault comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Any

from agent_worker import AgentError, Run, Worker

STEP_S = 0.02
BEGUN = "begun "
FINISHED = "finished"
STALL_AFTER_MS = 300

worker = Worker("faults")


async def _hold(run: Run) -> str:
    await run.delta(BEGUN)
    async with run.tool("wait", {"seconds": run.request.content}):
        if run.attempt == 1:
            await asyncio.sleep(float(run.request.content))
    await run.delta(FINISHED)
    return run.text


async def _talk(run: Run) -> str:
    steps, _, step_s = run.request.content.partition(" ")
    for step in range(int(steps)):
        if step % 4 == 0:
            await run.thinking(f"{run.run_id}.{run.attempt}.{step}")
        await run.delta(f"{step} ")
        await asyncio.sleep(float(step_s or STEP_S))
    return run.text


def talked(steps: int) -> str:
    """Give the text that a talk of so many steps has."""
    return "".join(f"{step} " for step in range(steps))


worker.agent("hold")(_hold)
worker.agent("hold-again", max_attempts=3)(_hold)
worker.agent("talk")(_talk)
worker.agent("talk-again", max_attempts=3)(_talk)


@worker.agent("echo", max_attempts=3)
async def echo(run: Run) -> str:
    """Be done at once."""
    return run.request.content


@worker.agent("linger", max_attempts=3)
async def linger(run: Run) -> str:
    """Be done a moment later, so that beginning and end are not sent in one batch."""
    await asyncio.sleep(0.1)
    return run.request.content


@worker.agent("block", stall_after_s=STALL_AFTER_MS / 1_000)
async def block(run: Run) -> str:
    """Hold the event loop up, as no agent should."""
    await run.delta(BEGUN)
    await asyncio.sleep(0.1)
    time.sleep(float(run.request.content))  # noqa: ASYNC251 (what agents should not do)
    await run.delta(FINISHED)
    return run.text


@worker.agent("ask")
async def ask(run: Run) -> Any:
    """Ask as many questions as the request says, one after the other."""
    answers = [
        await run.ask(f"Question {number}", timeout_s=60)
        for number in range(int(run.request.content))
    ]
    # A second answer to the last question shall find the run at work.
    await asyncio.sleep(1)
    return answers


@worker.agent("approve", max_attempts=3)
async def approve(run: Run) -> str:
    """Go on when the user says so."""
    is_approved = await run.approve("Go on?", timeout_s=60)
    return f"{is_approved} in attempt {run.attempt}"


@worker.agent("flaky", max_attempts=2)
async def flaky(run: Run) -> str:
    """Need a second attempt, which follows after a while."""
    if run.attempt == 1:
        raise AgentError("upstream_unavailable", "Not yet.", retry_after_ms=30_000)
    return "second"


@worker.agent("stubborn")
async def stubborn(run: Run) -> None:
    """Never stop by itself."""
    await run.delta(BEGUN)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)


@worker.agent("poison", max_attempts=2)
async def poison(run: Run) -> None:
    """Take the whole process along."""
    await run.thinking("This will not end well")
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
