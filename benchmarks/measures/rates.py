"""Latency at fixed rates, beside the floor at the same rates."""

from __future__ import annotations

from statistics import median

from benchmarks.canary import Canary
from benchmarks.figures import DISTRIBUTION_COLUMNS, Section, Table, over_rounds
from benchmarks.load import (
    Count,
    LoadClient,
    open_channels,
    plain_feeds,
    plain_target,
    relay_feeds,
    relay_target,
)
from benchmarks.processes import BenchmarkFailed, Process
from benchmarks.stage import Plan, Stage

NAME = "rates"
USERS = 500

_METHOD = """\
{users} users with one connection each on one gateway process. The load generator publishes single
events to Redis at a fixed rate, whatever comes back, each to the next user in turn. Latency counts
from when an event was due to its arrival, so a generator or gateway that lags cannot hide it.
Candidates take turns; medians of {rounds} rounds of {seconds:g} s."""


def measure(plan: Plan) -> Section:
    users, rounds = plan.size(USERS, 100), plan.size(3, 1)
    rates, seconds = plan.size((1_000, 5_000, 20_000), (500, 2_000)), plan.size(3.0, 1.0)
    counts: dict[tuple[int, str], list[Count]] = {}
    cpu_us: dict[tuple[int, str], list[float]] = {}
    section = Section(
        NAME,
        "Latency at fixed rates",
        _METHOD.format(users=users, rounds=rounds, seconds=seconds),
    )
    with Stage(plan) as stage, Canary() as canary:
        candidates = _start(stage, users)
        for number in range(rounds):
            for rate in rates:
                plan.say(f"latency at {rate:,} events/s, round {number + 1} of {rounds}")
                for name, (process, load) in candidates.items():
                    before_s = process.cpu_s()
                    try:
                        count = load.pace(seconds, rate=rate)
                    except BenchmarkFailed as failure:
                        section.notes.append(f"{name} at {rate:,} events/s: {failure}")
                        continue
                    used_s = process.cpu_s() - before_s
                    counts.setdefault((rate, name), []).append(count)
                    cpu_us.setdefault((rate, name), []).append(used_s / count.received * 1e6)
    columns = ["events/s", "candidate", *DISTRIBUTION_COLUMNS, "delivered/s", "CPU us/event"]
    table = Table(columns)
    for (rate, name), parts in counts.items():
        latency = over_rounds([count.latency for count in parts])
        delivered = f"{median(count.rate for count in parts):,.0f}"
        cost = f"{median(cpu_us[rate, name]):.1f}"
        table.rows.append([f"{rate:,}", name, *latency.cells(), delivered, cost])
        section.figures[f"rates.{rate}.{name}.p99_ms"] = latency.p99_ms
    section.tables = [table]
    section.notes.append(canary.note())
    return section


def _start(stage: Stage, users: int) -> dict[str, tuple[Process, LoadClient]]:
    server = stage.redis()
    open_channels(server, users)
    gateway = stage.gateway(server)
    load = stage.load([relay_target(user, gateway.port) for user in range(users)])
    load.connect(is_relay=True)
    load.use_redis(server, relay_feeds(server, users))
    started = {"relay": (gateway.process, load)}
    for name, reference in (
        ("usual way", stage.starlette(server)),
        ("C floor", stage.floor(server, "each")),
    ):
        if reference is None:
            continue
        label = name[0]
        load = stage.load([plain_target(user, reference.port, label) for user in range(users)])
        load.connect(is_relay=False)
        load.use_redis(server, plain_feeds(users, label))
        started[name] = (reference.process, load)
    return started
