"""What a worker process weighs, and what each run at work adds to it."""

from __future__ import annotations

import asyncio

from benchmarks.figures import Section, Table
from benchmarks.processes import ROOT, Process, RedisProcess
from benchmarks.stage import Plan, Stage
from relay.keys import Keys
from relay.run_model import RunLimits, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import RedisLink

NAME = "worker-memory"
RUNS_PER_USER = 10
SETTLE_S = 2.0
TIMEOUT_S = 60

_METHOD = """\
One worker process whose agent begins, says that it waits, and waits. Resident memory when it is
idle, and with runs at work less that, divided by their number. Ten runs were carried before and
cancelled, so that what a process loads once is not counted."""


def measure(plan: Plan) -> Section:
    plan.say("memory of a worker and its runs")
    steps: tuple[int, ...] = plan.size((200, 1_000), (50,))
    table = Table(["runs at work", "resident KiB", "KiB per run"])
    section = Section(NAME, "Memory of a worker and its runs", _METHOD, tables=[table])
    with Stage(plan) as stage:
        server = stage.redis()
        worker = stage.worker(server, "idle_agent:worker", str(ROOT / "benchmarks"), max(steps) + 1)
        asyncio.run(_weigh(server, worker, steps, section, table))
    return section


async def _weigh(
    server: RedisProcess, worker: Process, steps: tuple[int, ...], section: Section, table: Table
) -> None:
    link = RedisLink(server.url)
    registry = RunRegistry(link, Keys(), RunLimits(max_active=RUNS_PER_USER))
    try:
        warm = [await _submit(registry, "warm", number) for number in range(RUNS_PER_USER)]
        await _until_waiting(registry, {"warm": RUNS_PER_USER})
        for run_id in warm:
            await registry.cancel("warm", run_id)
        await _until_waiting(registry, {"warm": 0})
        await asyncio.sleep(SETTLE_S)
        idle_kib = worker.rss_kib()
        table.rows.append(["none", f"{idle_kib:,}", ""])
        section.figures["worker-memory.idle"] = idle_kib
        at_work = 0
        for step in steps:
            users: dict[str, int] = {}
            for number in range(at_work, step):
                user = f"u{number // RUNS_PER_USER}"
                await _submit(registry, user, number)
                users[user] = RUNS_PER_USER
            at_work = step
            await _until_waiting(registry, users)
            await asyncio.sleep(SETTLE_S)
            kib = worker.rss_kib()
            table.rows.append([f"{step:,}", f"{kib:,}", f"{(kib - idle_kib) / step:.1f}"])
            section.figures[f"worker-memory.run.{step}"] = (kib - idle_kib) / step
    finally:
        await link.aclose()


async def _submit(registry: RunRegistry, user: str, number: int) -> str:
    request = SubmitRequest(user, f"t{number}", "idle", "wait", f"message-{number}")
    return (await registry.submit(request)).run_id


async def _until_waiting(registry: RunRegistry, users: dict[str, int]) -> None:
    """Return when these users have so many runs whose agent has said that it waits."""
    async with asyncio.timeout(TIMEOUT_S):
        for user, expected in users.items():
            while True:
                runs = await registry.list_runs(user)
                waiting = sum(run.status == "running" and run.seq >= 3 for run in runs)
                if waiting == expected:
                    break
                await asyncio.sleep(0.02)
