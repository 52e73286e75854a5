"""Does anything hold the event loop up, when what is heaviest happens at once?"""

from __future__ import annotations

from statistics import median

from benchmarks.canary import Canary
from benchmarks.figures import (
    DISTRIBUTION_COLUMNS,
    Check,
    Distribution,
    Section,
    Table,
    format_spread,
    over_rounds,
)
from benchmarks.load import first_position, open_channels, relay_target
from benchmarks.stage import Plan, Stage

NAME = "stalls"
CLIENTS = 2_000
RESULTS_EACH = 3
PROBE_MS = 5.0
PROBERS = 12
"""Connections that ping in turn: a gateway takes 20 pings a second from one."""

LIMIT_MS = 50.0
READER, PROBER = 0, 1

_METHOD = """\
One gateway process. {clients} clients return to it with their positions, 64 at a time, while one
user's runs end with results of 10 MiB, {results} one after the other. A prober with connections of
its own sends a WebSocket ping every {probe_ms:g} ms, on one after the other, and takes the time of
the answer, from when the ping was due: whatever holds the event loop up is in it, and so is the way
through the kernel. The gateway's own view is its metric `relay_loop_lag_max_seconds`, by which a
timer of 100 ms was late. {rounds} rounds; before each the clients of the last one are cut off."""


def measure(plan: Plan) -> Section:
    clients, rounds = plan.size(CLIENTS, 100), plan.size(5, 1)
    results = plan.size(RESULTS_EACH, 1)
    probes: list[Distribution] = []
    lags_ms: list[float] = []
    large: list[Distribution] = []
    seconds: list[float] = []
    with Stage(plan) as stage, Canary() as canary:
        server = stage.redis()
        open_channels(server, clients + 2)
        gateway = stage.gateway(server)
        prober = stage.load([relay_target(PROBER, gateway.port)] * PROBERS)
        prober.connect(is_relay=True)
        reader = stage.load([relay_target(READER, gateway.port)])
        reader.connect(is_relay=True)
        publisher = stage.large_results(server, READER)
        publisher.answer()
        received = 0
        users = range(2, clients + 2)
        for number in range(rounds):
            plan.say(f"stalls of the event loop, round {number + 1} of {rounds}")
            targets = [relay_target(user, gateway.port, first_position(user)) for user in users]
            load = stage.load(targets)
            gateway.metrics()
            prober.begin_probe(PROBE_MS)
            for _ in range(results):
                publisher.tell("go")
            seconds.append(load.connect(is_relay=True))
            for _ in range(results):
                publisher.answer()
            received += results
            large.append(reader.collect(received, timeout_s=60).latency)
            probes.append(prober.end().latency)
            lags_ms.append(gateway.metrics()["relay_loop_lag_max_seconds"] * 1e3)
            load.stop()
    method = _METHOD.format(
        clients=f"{clients:,}", results=results, probe_ms=PROBE_MS, rounds=rounds
    )
    section = Section(NAME, "Stalls of the event loop", method)
    table = Table(["", *DISTRIBUTION_COLUMNS])
    table.rows.append(["prober's pings", *over_rounds(probes).cells()])
    table.rows.append(["10 MiB, publish to whole at the client", *large[-1].cells()])
    longest_ms = [probe.max_ms for probe in probes]
    by_round = Table(["by round", "median (range)"])
    by_round.rows = [
        ["prober's longest wait, ms", format_spread(longest_ms)],
        ["gateway's own greatest loop lag, ms", format_spread(lags_ms)],
        ["until all were connected, s", format_spread(seconds, 2)],
    ]
    section.tables = [table, by_round]
    section.checks = [
        Check("prober's longest wait, median of the rounds", median(longest_ms), LIMIT_MS, "ms"),
        Check("gateway's own loop lag, median of the rounds", median(lags_ms), LIMIT_MS, "ms"),
    ]
    section.notes.append(canary.note())
    return section
