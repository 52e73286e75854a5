"""The worker beside which the HTTP side is fuzzed."""

from __future__ import annotations

from agent_worker import Run, Worker

worker = Worker()


@worker.agent("echo", policy="parallel")
async def echo(run: Run) -> str:
    return run.request.content
