"""What an idle connection weighs, and how quickly connections are made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import Section, Table
from benchmarks.load import Target, plain_target, relay_target
from benchmarks.processes import Process
from benchmarks.stage import Plan, Stage

NAME = "memory"

_METHOD = """\
Connections of as many users, idle, to one gateway process: resident memory with them less that
before, divided by their number. A hundred connections were made and measured around before, so that
what a process loads once is not counted. For the relay a connection is verified, subscribed and has
its `connection_established`; 64 handshakes are under way at a time."""

WARM_UP = 100
SETTLE_S = 1.0


@dataclass(frozen=True)
class _Weight:
    kib: float
    rate: float
    cpu_ms: float


def measure(plan: Plan) -> Section:
    steps: tuple[int, ...] = plan.size((1_000, 5_000), (300,))
    section = Section(NAME, "Memory of an idle connection", _METHOD)
    memory = Table(["KiB per connection", *(f"{step:,} connections" for step in steps)])
    columns = ["connections a second", *memory.columns[1:], "gateway CPU ms each"]
    rates = Table(columns)
    for name in ("relay", "usual way", "C floor"):
        plan.say(f"memory of idle connections: {name}")
        weights = _weigh(plan, name, steps)
        if weights is None:
            continue
        memory.rows.append([name, *(f"{weight.kib:.1f}" for weight in weights)])
        speeds = [f"{weight.rate:,.0f}" for weight in weights]
        rates.rows.append([name, *speeds, f"{weights[-1].cpu_ms:.2f}"])
        for step, weight in zip(steps, weights, strict=True):
            section.figures[f"memory.{name}.{step}"] = weight.kib
    section.tables = [memory, rates]
    return section


def _weigh(plan: Plan, name: str, steps: Sequence[int]) -> list[_Weight] | None:
    with Stage(plan) as stage:
        server = stage.redis()
        if name == "relay":
            gateway = stage.gateway(server)
            port, process = gateway.port, gateway.process
        else:
            reference = (
                stage.starlette(server) if name == "usual way" else stage.floor(server, "each")
            )
            if reference is None:
                return None
            port, process = reference.port, reference.process
        users = iter(range(WARM_UP + max(steps)))
        _connect(stage, name, port, process, [next(users) for _ in range(WARM_UP)])
        before_kib = process.rss_kib()
        weights: list[_Weight] = []
        connected = 0
        for step in steps:
            cpu_s = process.cpu_s()
            more = [next(users) for _ in range(step - connected)]
            took_s, used_s = _connect(stage, name, port, process, more)
            connected = step
            kib = (process.rss_kib() - before_kib) / step
            weights.append(_Weight(kib, len(more) / took_s, (used_s - cpu_s) / len(more) * 1e3))
        return weights


def _connect(
    stage: Stage, name: str, port: int, process: Process, users: Sequence[int]
) -> tuple[float, float]:
    """Open connections that stay open; give how long it took and the gateway's CPU time by then."""
    targets: list[Target] = [
        relay_target(user, port) if name == "relay" else plain_target(user, port, "m")
        for user in users
    ]
    load = stage.load(targets)
    took_s = load.connect(is_relay=name == "relay")
    used_s = process.cpu_s()
    time.sleep(SETTLE_S)
    return took_s, used_s
