"""Latency at fixed rates, beside the floor at the same rates."""

from __future__ import annotations

from statistics import median

from benchmarks.canary import Canary
from benchmarks.figures import DISTRIBUTION_COLUMNS, Check, Section, Table, over_rounds
from benchmarks.load import (
    Count,
    LoadClient,
    open_channels,
    plain_feeds,
    plain_target,
    relay_feeds,
    relay_target,
)
from benchmarks.processes import BenchmarkFailed, Gateway, Process
from benchmarks.stage import Plan, Stage

NAME = "rates"
USERS = 500
P99_RATE, P99_LIMIT = 5_000, 2.0
P999_RATE = 20_000
LAG_LIMIT_MS = 5.0
RELAY, USUAL, FLOOR = "relay", "usual way", "C floor"

_METHOD = """\
{users} users with one connection each on one gateway process. The load generator publishes single
events to Redis at a fixed rate, whatever comes back, each to the next user in turn. Latency counts
from when an event was due to its arrival, so a generator or gateway that lags cannot hide it.
Candidates take turns; medians of {rounds} rounds of {seconds:g} s. The relay's event loop tells by
how much a timer of 100 ms was late at most in each of them (`relay_loop_lag_max_seconds`)."""


def measure(plan: Plan) -> Section:
    users, rounds = plan.size(USERS, 100), plan.size(5, 1)
    rates, seconds = plan.size((1_000, P99_RATE, P999_RATE), (500, 2_000)), plan.size(1.5, 1.0)
    counts: dict[tuple[int, str], list[Count]] = {}
    cpu_us: dict[tuple[int, str], list[float]] = {}
    section = Section(
        NAME,
        "Latency at fixed rates",
        _METHOD.format(users=users, rounds=rounds, seconds=seconds),
    )
    lags_ms: dict[int, list[float]] = {rate: [] for rate in rates}
    with Stage(plan) as stage, Canary() as canary:
        gateway, candidates = _start(stage, users)
        for number in range(rounds):
            for rate in rates:
                plan.say(f"latency at {rate:,} events/s, round {number + 1} of {rounds}")
                for name, (process, load) in candidates.items():
                    before_s = process.cpu_s()
                    gateway.metrics()
                    try:
                        count = load.pace(seconds, rate=rate)
                    except BenchmarkFailed as failure:
                        section.notes.append(f"{name} at {rate:,} events/s: {failure}")
                        continue
                    used_s = process.cpu_s() - before_s
                    counts.setdefault((rate, name), []).append(count)
                    cpu_us.setdefault((rate, name), []).append(used_s / count.received * 1e6)
                    if name == RELAY:
                        lags_ms[rate].append(gateway.metrics()["relay_loop_lag_max_seconds"] * 1e3)
    columns = ["events/s", "candidate", *DISTRIBUTION_COLUMNS, "delivered/s", "CPU us/event"]
    table = Table(columns)
    for (rate, name), parts in counts.items():
        latency = over_rounds([count.latency for count in parts])
        delivered = f"{median(count.rate for count in parts):,.0f}"
        cost = f"{median(cpu_us[rate, name]):.1f}"
        table.rows.append([f"{rate:,}", name, *latency.cells(), delivered, cost])
        section.figures[f"rates.{rate}.{name}.p99_ms"] = latency.p99_ms
    section.tables = [table]
    _compare(section, counts)
    for rate in rates:
        if rate < P999_RATE and lags_ms[rate]:
            title = f"longest lag of the event loop at {rate:,} events/s"
            section.checks.append(Check(title, median(lags_ms[rate]), LAG_LIMIT_MS, "ms"))
    section.notes.append(canary.note())
    return section


def _compare(section: Section, counts: dict[tuple[int, str], list[Count]]) -> None:
    """Hold the relay's tail against the floor's in the same rounds."""
    for rate in (P99_RATE, P999_RATE):
        ours = [count.latency for count in counts.get((rate, RELAY), [])]
        floors = [count.latency for count in counts.get((rate, FLOOR), [])]
        if not ours or len(ours) != len(floors):
            continue
        pairs = list(zip(ours, floors, strict=True))
        if rate == P99_RATE:
            ratios = [mine.p99_ms / floor.p99_ms for mine, floor in pairs]
            title = f"p99 at {rate:,} events/s, relative to the C floor"
            section.checks.append(Check(title, median(ratios), P99_LIMIT, "x"))
        else:
            ratios = [mine.p999_ms / floor.p999_ms for mine, floor in pairs]
            section.notes.append(
                f"p99.9 at {rate:,} events/s is {median(ratios):.2f} x that of the C floor "
                f"({min(ratios):.2f} to {max(ratios):.2f} by round)."
            )


def _start(stage: Stage, users: int) -> tuple[Gateway, dict[str, tuple[Process, LoadClient]]]:
    server = stage.redis()
    open_channels(server, users)
    gateway = stage.gateway(server)
    load = stage.load([relay_target(user, gateway.port) for user in range(users)])
    load.connect(is_relay=True)
    load.use_redis(server, relay_feeds(server, users))
    started = {RELAY: (gateway.process, load)}
    for name, reference in (
        (USUAL, stage.starlette(server)),
        (FLOOR, stage.floor(server, "each")),
    ):
        if reference is None:
            continue
        label = name[0]
        load = stage.load([plain_target(user, reference.port, label) for user in range(users)])
        load.connect(is_relay=False)
        load.use_redis(server, plain_feeds(users, label))
        started[name] = (reference.process, load)
    return gateway, started
