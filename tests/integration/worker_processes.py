"""A worker in a process of its own, for what only signals and separate processes can show.

Run as ``python -m tests.integration.worker_processes``; it reads ``RELAY_*`` like any worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop

from agent_worker import Run, Worker
from relay.config import Settings, load_settings

worker = Worker("process")


@worker.agent("timed")
async def timed(run: Run) -> str:
    """Work for as many seconds as the request says."""
    await run.delta("begun ")
    await asyncio.sleep(float(run.request.content))
    await run.delta("and finished")
    return run.text


@worker.agent("stubborn")
async def stubborn(run: Run) -> None:
    """Never stop by itself."""
    await run.delta("begun")
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)


@worker.agent("repeatable", max_attempts=2)
async def repeatable(run: Run) -> str:
    """Get nowhere at the first attempt."""
    await run.delta(f"attempt {run.attempt}")
    async with run.tool("work"):
        if run.attempt == 1:
            await asyncio.Event().wait()
    return run.text


@worker.agent("approved", max_attempts=2)
async def approved(run: Run) -> str:
    """Wait for the user."""
    if await run.approve("Go on?", timeout_s=60):
        return f"approved in attempt {run.attempt}"
    return "not approved"


@worker.agent("calling")
async def calling(run: Run) -> None:
    """Call an agent of another worker that does not end."""
    await run.call_agent("endless", "wait")


class WorkerProcess:
    """Seen from the test."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()

    async def exit_code(self) -> int:
        async with asyncio.timeout(20):
            return await self._process.wait()

    async def output(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.read()).decode()


@asynccontextmanager
async def worker_process(settings: Settings) -> AsyncIterator[WorkerProcess]:
    environment = {
        **os.environ,
        "RELAY_REDIS_URL": settings.redis_url,
        "RELAY_KEY_PREFIX": settings.key_prefix,
        "RELAY_WORKER_GRACE_S": str(settings.worker_grace_s),
        "RELAY_CANCEL_GRACE_MS": str(settings.cancel_grace_ms),
        "RELAY_LEASE_MS": str(settings.lease_ms),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.worker_processes",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield WorkerProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # The transport holds the pipe until it is read to its end.
        assert process.stdout is not None
        await process.stdout.read()


if __name__ == "__main__":
    uvloop.run(worker.serve(load_settings(env_file=None)))
