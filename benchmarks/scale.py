"""``python -m benchmarks.scale``: what an event costs as everything grows; SCALE.md and a chart.

One thing at a time is varied, the rest stays as in the throughput measurement. The relay and the C
floor take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.chart import Panel, draw
from benchmarks.compiled import compiled_relay
from benchmarks.figures import Table, format_ms, format_spread
from benchmarks.load import (
    Count,
    LoadClient,
    event_sizes,
    open_channels,
    plain_feeds,
    plain_target,
    relay_feeds,
    relay_target,
)
from benchmarks.measures.throughput import ON_THEIR_WAY, USERS
from benchmarks.processes import (
    ROOT,
    BenchmarkFailed,
    Placement,
    Process,
    raise_file_limit,
    stop_in_order_on_sigterm,
)
from benchmarks.report import kept_section, machine
from benchmarks.stage import Plan, Stage

RESULTS = Path(__file__).parent / "SCALE.md"
CHART = ROOT / "docs" / "images" / "scale.svg"
BENDS = "Where the curves bend"

RELAY, FLOOR = "relay", "C floor"
TABS_USERS = 100
BYTES_ON_THEIR_WAY = 16 * 1_048_576

_METHOD = """\
Written by `make scale`; [README.md](README.md) says how each figure is made, and
[RESULTS.md](RESULTS.md) has the rest. One gateway process, saturated, {users} users with one
connection each and {each} events on their way to it on average, of {stored} bytes, one a PUBLISH;
in each table one of these is varied. CPU is that of the gateway alone, in microseconds for each
event and client; the C floor is `benchmarks/native/floor.c` with one `send` an event. Medians of
{rounds} rounds of {seconds:g} s in which the two take turns; in brackets the range."""


@dataclass
class Figures:
    """One candidate at one point."""

    cpu_us: list[float] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def add(self, processes: Sequence[Process], run: Callable[[], Count]) -> None:
        before_s = sum(process.cpu_s() for process in processes)
        count = run()
        used_s = sum(process.cpu_s() for process in processes) - before_s
        self.cpu_us.append(used_s / count.received * 1e6)
        self.counts.append(count)

    def cells(self) -> list[str]:
        rate = median(count.rate for count in self.counts)
        p99_ms = median(count.latency.p99_ms for count in self.counts)
        return [format_spread(self.cpu_us), f"{rate:,.0f}", format_ms(p99_ms)]


@dataclass
class Curve:
    """What grows, and what an event then costs."""

    title: str
    x_label: str
    note: str = ""
    points: dict[float, dict[str, Figures]] = field(default_factory=dict)

    def markdown(self) -> str:
        columns = ["relay us/event", "events/s", "p99 ms", "C floor us/event", "ratio"]
        table = Table([self.x_label, *columns])
        for x, by_name in self.points.items():
            relay, floor = by_name[RELAY], by_name.get(FLOOR)
            other = ["", ""]
            if floor is not None:
                pairs = zip(relay.cpu_us, floor.cpu_us, strict=True)
                ratio = median(mine / theirs for mine, theirs in pairs)
                other = [format_spread(floor.cpu_us), f"{ratio:.2f} x"]
            table.rows.append([f"{x:,.0f}", *relay.cells(), *other])
        note = f"\n\n{self.note}" if self.note else ""
        return f"## {self.title}\n\n{table.markdown()}{note}\n"

    def panel(self) -> Panel:
        series: dict[str, list[tuple[float, float]]] = {}
        for x, by_name in self.points.items():
            for name, figures in by_name.items():
                series.setdefault(name, []).append((x, median(figures.cpu_us)))
        return Panel(self.title, self.x_label, series)


@dataclass(frozen=True)
class Bench:
    """How thorough it is, and how to run one point."""

    plan: Plan
    rounds: int
    seconds: float

    @contextmanager
    def candidates(
        self,
        users: int,
        *,
        tabs: int = 1,
        padding: int = 0,
        gateways: int = 1,
        is_saturated: bool = True,
        is_pinned: bool = True,
    ) -> Iterator[dict[str, _Candidate]]:
        """Start a relay and a floor with connected users."""
        with Stage(self.plan, is_pinned=is_pinned) as stage:
            server = stage.redis()
            open_channels(server, users)
            relays = [stage.gateway(server) for _ in range(gateways)]
            ports = [relay.port for relay in relays]
            targets = [relay_target(user, ports[user % gateways]) for user in range(users)]
            load = stage.load(targets * tabs, is_beside=is_saturated)
            load.connect(is_relay=True)
            load.use_redis(server, relay_feeds(server, users, padding))
            started = {RELAY: _Candidate([relay.process for relay in relays], load, stage, ports)}
            floor = stage.floor(server, "each") if gateways == 1 else None
            if floor is not None:
                targets = [plain_target(user, floor.port, "f") for user in range(users)]
                load = stage.load(targets * tabs, is_beside=is_saturated)
                load.connect(is_relay=False)
                load.use_redis(server, plain_feeds(users, "f", padding))
                started[FLOOR] = _Candidate([floor.process], load, stage, [floor.port])
            yield started

    def saturate(self, candidates: dict[str, _Candidate], window: int) -> dict[str, Figures]:
        return self._measure(candidates, lambda load: load.flow(self.seconds, window=window))

    def pace(self, candidates: dict[str, _Candidate], rate: float) -> dict[str, Figures]:
        return self._measure(candidates, lambda load: load.pace(self.seconds, rate=rate))

    def _measure(
        self, candidates: dict[str, _Candidate], run: Callable[[LoadClient], Count]
    ) -> dict[str, Figures]:
        measured = {name: Figures() for name in candidates}
        for _ in range(self.rounds):
            for name, candidate in candidates.items():
                measured[name].add(candidate.processes, lambda load=candidate.load: run(load))  # type: ignore[misc]
        return measured


@dataclass(frozen=True)
class _Candidate:
    processes: list[Process]
    load: LoadClient
    stage: Stage
    ports: list[int]


def by_connections(bench: Bench, idle: Sequence[int]) -> Curve:
    curve = Curve("Connections", f"connections, {USERS} of them active")
    with bench.candidates(USERS) as candidates:
        opened = USERS
        for count in idle:
            bench.plan.say(f"scale: {count:,} connections")
            more = range(opened, count)
            for name, candidate in candidates.items():
                is_relay, port = name == RELAY, candidate.ports[0]
                targets = [
                    relay_target(user, port) if is_relay else plain_target(user, port, "f")
                    for user in more
                ]
                candidate.stage.load(targets).connect(is_relay=is_relay)
            opened = max(opened, count)
            curve.points[count] = bench.saturate(candidates, USERS * ON_THEIR_WAY)
    return curve


def by_users(bench: Bench, users: Sequence[int]) -> Curve:
    curve = Curve("Users", "users, all of them active")
    for count in users:
        bench.plan.say(f"scale: {count:,} users")
        with bench.candidates(count) as candidates:
            curve.points[count] = bench.saturate(candidates, count * ON_THEIR_WAY)
    return curve


def by_rate(bench: Bench, rates: Sequence[int]) -> Curve:
    note = "At a fixed rate; latency is from when an event was due."
    curve = Curve("Events per second", "events/s offered", note)
    with bench.candidates(USERS, is_saturated=False) as candidates:
        for rate in rates:
            bench.plan.say(f"scale: {rate:,} events/s")
            curve.points[rate] = bench.pace(candidates, rate)
    return curve


def by_tabs(bench: Bench, tabs: Sequence[int]) -> Curve:
    curve = Curve("Tabs per user", f"tabs of each of {TABS_USERS} users", "Counted for each tab.")
    for count in tabs:
        bench.plan.say(f"scale: {count:,} tabs a user")
        with bench.candidates(TABS_USERS, tabs=count) as candidates:
            window = TABS_USERS * count * ON_THEIR_WAY
            curve.points[count] = bench.saturate(candidates, window)
    return curve


def by_size(bench: Bench, sizes: Sequence[int]) -> Curve:
    note = "With fewer events on their way where they are large: 16 MiB at most."
    curve = Curve("Size of an event", "bytes stored", note)
    for size in sizes:
        bench.plan.say(f"scale: events of {size:,} bytes")
        stored = event_sizes()[0]
        with bench.candidates(USERS, padding=max(0, size - stored)) as candidates:
            window = min(USERS * ON_THEIR_WAY, BYTES_ON_THEIR_WAY // size)
            curve.points[max(size, stored)] = bench.saturate(candidates, window)
    return curve


def by_processes(bench: Bench, processes: Sequence[int]) -> Curve:
    note = (
        "The users are spread over gateway processes; CPU is that of all of them together. Nothing "
        "is pinned here: Redis and the load generator share the processors with the gateways."
    )
    curve = Curve("Gateway processes", "gateway processes", note)
    for count in processes:
        bench.plan.say(f"scale: {count} gateway processes")
        with bench.candidates(USERS, gateways=count, is_pinned=False) as candidates:
            candidates.pop(FLOOR, None)
            curve.points[count] = bench.saturate(candidates, USERS * ON_THEIR_WAY)
    return curve


def measure(plan: Plan) -> list[Curve]:
    """Give all curves; less than ten minutes on two processors."""
    bench = Bench(plan, plan.size(3, 1), plan.size(1.0, 0.2))
    return [
        by_connections(bench, plan.size((USERS, 2_000, 5_000, 10_000), (USERS, 600))),
        by_users(bench, plan.size((100, 500, 2_000, 5_000), (50,))),
        by_rate(bench, plan.size((500, 1_000, 2_000, 5_000, 10_000, 20_000), (500, 1_000))),
        by_tabs(bench, plan.size((1, 2, 5, 10, 20), (2,))),
        by_size(bench, plan.size((200, 1_000, 4_000, 16_000, 48_000), (1_000,))),
        by_processes(bench, plan.size((1, 2), (2,))),
    ]


def render(bench_method: str, curves: Sequence[Curve], kept: str) -> str:
    """Give the text of SCALE.md."""
    picture = "![Gateway CPU per delivered event](../docs/images/scale.svg)"
    parts = ["# Scale", bench_method, picture, *(curve.markdown() for curve in curves)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n" + kept


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds; figures for a glance only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of SCALE.md")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="instead of docs/images")
    options = parser.parse_args()
    raise_file_limit()
    stop_in_order_on_sigterm()
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"... {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="agent-relay-scale-") as folder:
        try:
            compiled = None if options.quick else compiled_relay(say)
            plan = Plan(options.quick, Path(folder), Placement(), say, compiled=compiled)
            curves = measure(plan)
        except BenchmarkFailed as failure:
            print(f"Error: {failure}", file=sys.stderr)
            return 1
    method = _METHOD.format(
        each=ON_THEIR_WAY,
        users=USERS,
        stored=event_sizes()[0],
        rounds=plan.size(3, 1),
        seconds=plan.size(1.0, 0.2),
    )
    output = options.output or (None if options.quick else RESULTS)
    chart = options.chart or (None if options.quick else CHART)
    kept = kept_section(output, BENDS) if output is not None else ""
    table = machine(time.monotonic() - began_s, is_compiled=plan.compiled is not None)
    text = render(f"{method}\n\n{table}", curves, kept)
    print(text)
    if output is not None:
        output.write_text(text)
    if chart is not None:
        title = "What a delivered event costs as everything grows"
        y_label = "gateway CPU, microseconds for each event and client"
        chart.write_text(draw([curve.panel() for curve in curves], title, y_label))
    return 0


if __name__ == "__main__":
    sys.exit(main())
