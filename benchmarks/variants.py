"""``python -m benchmarks.variants``: throughput with variants of the gateway's process.

Each variant is a gateway of its own, and all of them take turns, so that ratios to the gateway as
it is are as good as those of ``make bench``. For decisions; their figures stand in docs/adr.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.figures import Table, format_ms, format_spread
from benchmarks.load import LoadClient, open_channels, relay_feeds, relay_target
from benchmarks.measures.throughput import BURST, ON_THEIR_WAY, USERS
from benchmarks.processes import (
    BenchmarkFailed,
    Placement,
    Process,
    raise_file_limit,
    stop_in_order_on_sigterm,
)
from benchmarks.stage import Plan, Stage
from benchmarks.variant import VARIANTS

BASE = "as it is"
_MODES = {"one at a time": (1, False), f"batches of {BURST}": (BURST, True)}


@dataclass
class _Candidate:
    name: str
    process: Process
    load: LoadClient
    kib: float
    connect_ms: float
    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    p99_ms: dict[str, list[float]] = field(default_factory=dict)


def compare(plan: Plan, chosen: Mapping[str, Sequence[str]], rounds: int, seconds: float) -> str:
    """Give a table of the variants, each named with the command that starts it."""
    with Stage(plan) as stage:
        candidates = [_start(stage, *pair) for pair in chosen.items()]
        for number in range(rounds):
            plan.say(f"round {number + 1} of {rounds}")
            for candidate in candidates:
                for mode, (burst, batched) in _MODES.items():
                    _run(candidate, mode, burst, batched, seconds)
        costs = (f"us/event, {mode}" for mode in _MODES)
        ratios = (f"relative, {mode}" for mode in _MODES)
        table = Table(["gateway", *costs, *ratios, "p99 ms", "KiB/connection", "connect ms"])
        for candidate in candidates:
            table.rows.append(_row(candidate, candidates[0]))
        return table.markdown()


def _start(stage: Stage, name: str, command: Sequence[str]) -> _Candidate:
    # A Redis for each: the users are the same, and only one of them is to get what is published.
    server = stage.redis()
    open_channels(server, USERS)
    gateway = stage.gateway(server, command)
    process = gateway.process
    before_kib, before_s = process.rss_kib(), process.cpu_s()
    targets = [relay_target(user, gateway.port) for user in range(USERS)]
    load = stage.load(targets, is_beside=True)
    load.connect(is_relay=True)
    connect_ms = (process.cpu_s() - before_s) / USERS * 1e3
    kib = (process.rss_kib() - before_kib) / USERS
    load.use_redis(server, relay_feeds(server, USERS))
    return _Candidate(name, process, load, kib, connect_ms)


def _run(candidate: _Candidate, mode: str, burst: int, batched: bool, seconds: float) -> None:
    window = USERS * ON_THEIR_WAY // burst
    before_s = candidate.process.cpu_s()
    count = candidate.load.flow(seconds, window=window, burst=burst, batched=batched)
    used_s = candidate.process.cpu_s() - before_s
    candidate.cpu_us.setdefault(mode, []).append(used_s / count.received * 1e6)
    candidate.p99_ms.setdefault(mode, []).append(count.latency.p99_ms)


def _row(candidate: _Candidate, base: _Candidate) -> list[str]:
    ratios = [
        [
            mine / theirs
            for mine, theirs in zip(candidate.cpu_us[mode], base.cpu_us[mode], strict=True)
        ]
        for mode in _MODES
    ]
    return [
        candidate.name,
        *(format_spread(candidate.cpu_us[mode]) for mode in _MODES),
        *(format_spread(by_round, 2) for by_round in ratios),
        format_ms(median(candidate.p99_ms["one at a time"])),
        f"{candidate.kib:.1f}",
        f"{candidate.connect_ms:.2f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="also the gateway as it is on this interpreter; repeatable",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    unknown = set(options.names) - set(VARIANTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    raise_file_limit()
    stop_in_order_on_sigterm()
    runner = ["-m", "benchmarks.variant"]
    names = [BASE, *(name for name in options.names if name != BASE)]
    chosen = {name: [sys.executable, *runner, name] for name in names}
    chosen |= {path: [path, *runner, BASE] for path in options.python}

    def say(text: str) -> None:
        print(f"... {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="agent-relay-variants-") as folder:
        plan = Plan(False, Path(folder), Placement(), say)
        try:
            print(compare(plan, chosen, options.rounds, options.seconds))
        except BenchmarkFailed as failure:
            print(f"Error: {failure}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
