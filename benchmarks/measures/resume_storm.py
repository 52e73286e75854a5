"""Many clients return at once, each of which has missed something."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from benchmarks.canary import Canary
from benchmarks.figures import Check, Section, Table, format_ms, format_spread
from benchmarks.load import (
    Target,
    first_position,
    open_channels,
    plain_target,
    relay_feeds,
    relay_target,
)
from benchmarks.stage import Plan, Stage

NAME = "storm"
CLIENTS = 2_000
MISSED = 50
AT_ONCE = 500
"""Handshakes under way. Those beyond 512 are answered 503: their clients would come back later."""
BYSTANDER = 0
BYSTANDER_RATE = 200.0
RATIO_LIMIT, STRETCH_S = 2.5, 1.5
DELAY_LIMIT_MS = 100.0

_METHOD = """\
{clients} clients of as many users connect to a gateway that was just started, {at_once} at a time
and without a pause, each with a position {missed} events back. The time is from the first
connection to the last of the {total:,} events, each of which every client got once and in order.
Beside it, in the same round:
*bare handshakes*, as many connections to the same server with an application that takes them and
does nothing else (`benchmarks/bare_handshake.py`); *nothing missed*, the same clients at a gateway
to which they come without a position; and the C floor's handshakes. Another user is connected all
the while and gets {rate:g} events a second. Medians of {rounds} rounds, each with a Redis and
gateways of its own; in brackets the range."""


@dataclass
class _Results:
    """Seconds by round; and how late the other user's events were at worst, in milliseconds."""

    storm: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    nothing_missed: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    storm_cpu: list[float] = field(default_factory=list)
    delay_p99_ms: list[float] = field(default_factory=list)
    delay_max_ms: list[float] = field(default_factory=list)


def measure(plan: Plan) -> Section:
    clients, rounds = plan.size(CLIENTS, 100), plan.size(5, 1)
    results = _Results()
    with Canary() as canary:
        for number in range(rounds):
            plan.say(f"resume storm, round {number + 1} of {rounds}")
            with Stage(plan) as stage:
                _run(stage, clients, results)
    method = _METHOD.format(
        clients=f"{clients:,}",
        missed=MISSED,
        at_once=min(AT_ONCE, clients),
        total=clients * MISSED,
        rate=BYSTANDER_RATE,
        rounds=rounds,
    )
    section = Section(NAME, "Resume storm", method)
    section.tables = [_times(results), _delays(results)]
    _judge(section, results)
    section.notes.append(canary.note())
    return section


def _run(stage: Stage, clients: int, results: _Results) -> None:
    server = stage.redis()
    users = clients + 1
    open_channels(server, users)
    away = range(BYSTANDER + 1, users)

    bare = stage.bare_handshake()
    results.bare.append(_connect(stage, [plain_target(user, bare.port, "b") for user in away]))
    bare.stop()
    floor = stage.floor(server, "each")
    if floor is not None:
        targets = [plain_target(user, floor.port, "f") for user in away]
        results.floor.append(_connect(stage, targets))
        floor.stop()
    warm = stage.gateway(server)
    targets = [relay_target(user, warm.port) for user in away]
    results.nothing_missed.append(_connect(stage, targets, is_relay=True))
    warm.stop()

    writer = stage.load([])
    writer.use_redis(server, relay_feeds(server, users))
    writer.write(server, MISSED)
    writer.stop()

    cold = stage.gateway(server)
    bystander = stage.load([relay_target(BYSTANDER, cold.port)])
    bystander.connect(is_relay=True)
    bystander.use_redis(server, relay_feeds(server, 1))
    storm = stage.load([relay_target(user, cold.port, first_position(user)) for user in away])
    storm.reset()
    bystander.begin_trickle(BYSTANDER_RATE)
    before_s = cold.process.cpu_s()
    storm.connect(is_relay=True, concurrency=AT_ONCE)
    count = storm.collect(clients * MISSED, timeout_s=120)
    results.storm.append(count.elapsed_s)
    results.storm_cpu.append(cold.process.cpu_s() - before_s)
    latency = bystander.end().latency
    results.delay_p99_ms.append(latency.p99_ms)
    results.delay_max_ms.append(latency.max_ms)


def _connect(stage: Stage, targets: list[Target], *, is_relay: bool = False) -> float:
    load = stage.load(targets)
    took_s = load.connect(is_relay=is_relay, concurrency=AT_ONCE)
    load.stop()
    return took_s


def _times(results: _Results) -> Table:
    table = Table(["all of them", "seconds", "relative to bare handshakes"])
    rows = {
        "bare handshakes": results.bare,
        "handshakes of the C floor": results.floor,
        "relay, nothing missed": results.nothing_missed,
        f"relay, {MISSED} events missed": results.storm,
    }
    for name, times in rows.items():
        if times:
            ratio = median(_relative(times, results.bare))
            table.rows.append([name, format_spread(times, 2), f"{ratio:.2f} x"])
    cpu = format_spread(results.storm_cpu, 2)
    table.rows.append(["gateway CPU within the last", cpu, ""])
    return table


def _delays(results: _Results) -> Table:
    table = Table(["another user's events meanwhile", "p99 ms", "max ms"])
    cells = [format_spread(results.delay_p99_ms), format_spread(results.delay_max_ms)]
    table.rows.append(["by round", *cells])
    return table


def _relative(times: list[float], others: list[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(times, others, strict=True)]


def _judge(section: Section, results: _Results) -> None:
    ratios = _relative(results.storm, results.bare)
    section.rounds["storm.resume/bare-handshakes"] = ratios
    section.rounds["storm.handshakes/bare-handshakes"] = _relative(
        results.nothing_missed, results.bare
    )
    section.checks = [
        Check(
            "time until all are complete, relative to bare handshakes",
            median(ratios),
            RATIO_LIMIT,
            "x",
        ),
        Check(
            "longest delay of another user's events meanwhile, median of the rounds",
            median(results.delay_max_ms),
            DELAY_LIMIT_MS,
            "ms",
        ),
    ]
    took_s, worst_ms = median(results.storm), max(results.delay_max_ms)
    verdict = "met" if took_s <= STRETCH_S else "not met"
    section.notes.append(
        f"Stretch goal {verdict}: complete within {STRETCH_S:g} s ({took_s:.2f} s). The other "
        f"user's longest delay in any round was {format_ms(worst_ms)} ms."
    )
