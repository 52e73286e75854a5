"""What an idle connection weighs, and how quickly connections are made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import Check, Section, Table
from benchmarks.load import LoadClient, Target, open_channels, plain_target, relay_target
from benchmarks.processes import Process
from benchmarks.stage import Plan, Stage

NAME = "memory"
RELAY, USUAL, BARE, FLOOR = "relay", "usual way", "bare handshakes", "C floor"
LIMIT_KIB, STRETCH_KIB = 8.0, 6.0

_METHOD = """\
Connections of as many users, idle, to one gateway process: resident memory with them less that
before, divided by their number. A hundred connections were made and measured around before, so that
what a process loads once is not counted. For the relay a connection is verified, subscribed and has
its `connection_established`; 64 handshakes are under way at a time. Once all are open, those of
the relay stay for {hold_s:g} s, in which each gets heartbeats and pings; then they are weighed once
more. All are still open at the end. *Bare handshakes*: the same server with an application that
takes connections and does nothing else (`benchmarks/bare_handshake.py`). The usual way needs a
connection to Redis for each client, and so more files at {most:,} than one process may open."""

WARM_UP = 100
SETTLE_S = 1.0
HOLD_S = 25.0
"""Longer than the intervals of heartbeats and pings."""


@dataclass(frozen=True)
class _Weight:
    kib: float
    rate: float
    cpu_ms: float


@dataclass(frozen=True)
class _Candidate:
    steps: Sequence[_Weight]
    later_kib: float | None


def measure(plan: Plan) -> Section:
    steps: tuple[int, ...] = plan.size((1_000, 5_000, 10_000), (300,))
    hold_s = plan.size(HOLD_S, 0.2)
    most = max(steps)
    method = _METHOD.format(hold_s=hold_s, most=most)
    section = Section(NAME, "Memory of an idle connection", method)
    columns = [f"{step:,} connections" for step in steps]
    memory = Table(["KiB per connection", *columns, f"{hold_s:g} s later"])
    rates = Table(["connections a second", *columns, "gateway CPU ms each"])
    for name in (RELAY, BARE, USUAL, FLOOR):
        plan.say(f"memory of idle connections: {name}")
        mine = steps[:-1] if name == USUAL and len(steps) > 1 else steps
        candidate = _weigh(plan, name, mine, hold_s)
        if candidate is None:
            continue
        missing = [""] * (len(steps) - len(mine))
        weights = [f"{weight.kib:.1f}" for weight in candidate.steps]
        later = "" if candidate.later_kib is None else f"{candidate.later_kib:.1f}"
        memory.rows.append([name, *weights, *missing, later])
        speeds = [f"{weight.rate:,.0f}" for weight in candidate.steps]
        rates.rows.append([name, *speeds, *missing, f"{candidate.steps[-1].cpu_ms:.2f}"])
        if candidate.later_kib is not None:
            section.rounds[f"memory.{most}.KiB"] = [candidate.later_kib]
            last = candidate.steps[-1].kib
            for title, kib in (("", last), (f", {hold_s:g} s later", candidate.later_kib)):
                check = f"idle connection, {most:,} of them{title}"
                section.checks.append(Check(check, kib, LIMIT_KIB, "KiB", STRETCH_KIB))
    section.tables = [memory, rates]
    return section


def _weigh(plan: Plan, name: str, steps: Sequence[int], hold_s: float) -> _Candidate | None:
    with Stage(plan) as stage:
        started = _start(stage, name, WARM_UP + max(steps))
        if started is None:
            return None
        port, process = started
        users = iter(range(WARM_UP + max(steps)))
        settle_s = plan.size(SETTLE_S, 0.1)
        _connect(stage, name, port, process, [next(users) for _ in range(WARM_UP)], settle_s)
        before_kib = process.rss_kib()
        weights: list[_Weight] = []
        loads: list[LoadClient] = []
        connected = 0
        for step in steps:
            cpu_s = process.cpu_s()
            more = [next(users) for _ in range(step - connected)]
            load, took_s, used_s = _connect(stage, name, port, process, more, settle_s)
            loads.append(load)
            connected = step
            kib = (process.rss_kib() - before_kib) / step
            weights.append(_Weight(kib, len(more) / took_s, (used_s - cpu_s) / len(more) * 1e3))
        later_kib = None
        if name == RELAY:
            time.sleep(hold_s)
            later_kib = (process.rss_kib() - before_kib) / connected
        for load in loads:
            load.collect(0, timeout_s=1)
        return _Candidate(weights, later_kib)


def _start(stage: Stage, name: str, users: int) -> tuple[int, Process] | None:
    if name == BARE:
        bare = stage.bare_handshake()
        return bare.port, bare.process
    server = stage.redis()
    if name == RELAY:
        open_channels(server, users)
        gateway = stage.gateway(server)
        return gateway.port, gateway.process
    reference = stage.starlette(server) if name == USUAL else stage.floor(server, "each")
    return None if reference is None else (reference.port, reference.process)


def _connect(
    stage: Stage, name: str, port: int, process: Process, users: Sequence[int], settle_s: float
) -> tuple[LoadClient, float, float]:
    """Open connections that stay open; give how long it took and the gateway's CPU time by then."""
    targets: list[Target] = [
        relay_target(user, port) if name == RELAY else plain_target(user, port, "m")
        for user in users
    ]
    load = stage.load(targets)
    took_s = load.connect(is_relay=name == RELAY)
    used_s = process.cpu_s()
    time.sleep(settle_s)
    return load, took_s, used_s
