"""What publishing costs a worker and Redis, and how many runs a second go through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.figures import Check, Section, Table, format_spread
from benchmarks.load import event_sizes
from benchmarks.stage import Plan, Stage

NAME = "publish"
TEXT_LIMIT_US, ALONE_LIMIT_US = 12.0, 40.0
ALONE_REDIS_LIMIT, BATCHES_REDIS_LIMIT = 2.0, 0.7

_METHOD = """\
A worker process with nothing but the relay's publisher, one Redis, nobody subscribed. Worker CPU
is the process time of that worker; Redis CPU that of its main thread (`INFO cpu`), and script
time what `INFO commandstats` says of script calls alone. Events have {size} bytes and go to runs
of 200 events, unless it says otherwise. The bare script has one XADD and one PUBLISH, called
through redis-py, and neither trims nor numbers anything.

The runs that stream text are driven by one clock, which looks every 5 ms what is due; with a timer
of its own each, asyncio's timers would be what is measured. With few runs most of the figure is a
processor that wakes up again and again. Medians of {rounds} rounds; in brackets the range."""


@dataclass(frozen=True)
class _Case:
    mode: str
    name: str
    events: int


@dataclass
class _Result:
    worker_us: list[float] = field(default_factory=list)
    redis_us: list[float] = field(default_factory=list)
    script_us: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


def _cases(plan: Plan) -> list[_Case]:
    many, some = plan.size(6_000, 600), plan.size(2_000, 200)
    pieces = plan.size(15_000, 5_000)
    cases = [
        _Case("alone", "alone: the next when Redis has the last", many),
        _Case("batches", "ten in one go", many),
        _Case("side-by-side", "fifty runs side by side, alone each", many),
        _Case("deltas", "text: 200 runs, 100 pieces a second each", pieces * 4),
        _Case("bare", "bare script, alone", many),
    ]
    slow = [
        _Case("few-deltas", "text: 50 runs, 100 pieces a second each", pieces),
        _Case("long-run", "alone, in a run of over 2,000 events", some),
        _Case("bare-pipelined", "bare script, fifty in a pipeline", many),
    ]
    return cases if plan.is_quick else cases + slow


def measure(plan: Plan) -> Section:
    rounds = plan.size(5, 1)
    cases = _cases(plan)
    results = {case.mode: _Result() for case in cases}
    runs = {concurrency: _Result() for concurrency in plan.size((1, 32), (32,))}
    for number in range(rounds):
        plan.say(f"publish cost, round {number + 1} of {rounds}")
        # Now the one first and now the other: a machine that slows down favours neither.
        for case in cases if number % 2 == 0 else cases[::-1]:
            _add(results[case.mode], _run(plan, case.mode, case.events))
        for concurrency, result in runs.items():
            count = plan.size(600, 96) if concurrency > 1 else plan.size(200, 30)
            _add(result, _run(plan, "runs", count, concurrency))
    section = Section(
        NAME, "Cost of publishing", _METHOD.format(size=event_sizes()[0], rounds=rounds)
    )
    section.tables = [_ratios(section, results), _costs(cases, results), _runs(runs)]
    _judge(section, results)
    return section


def _run(plan: Plan, mode: str, *arguments: int) -> Mapping[str, float]:
    # A Redis for each: what one case leaves behind must not weigh on the next.
    with Stage(plan) as stage:
        publisher = stage.publisher(stage.redis(), mode, *arguments)
        publisher.answer()
        return publisher.ask("go")


def _add(result: _Result, answer: Mapping[str, float]) -> None:
    events = answer["events"]
    result.worker_us.append(answer["cpu_us"] / events)
    result.redis_us.append(answer["redis_us"] / events)
    result.script_us.append(answer["script_us"] / events)
    result.rate.append(events / answer["elapsed_s"])
    result.calls.append(answer["script_calls"] / events)


def _ratios(section: Section, results: Mapping[str, _Result]) -> Table:
    table = Table(["relative to the bare script, alone", "worker CPU", "Redis CPU", "script time"])
    bare = results["bare"]
    for mode, name in (("alone", "alone"), ("batches", "ten in one go"), ("deltas", "text")):
        result = results[mode]
        workers = _ratio(result.worker_us, bare.worker_us)
        servers = _ratio(result.redis_us, bare.redis_us)
        scripts = _ratio(result.script_us, bare.script_us)
        table.rows.append(
            [name, *(f"{median(ratios):.2f} x" for ratios in (workers, servers, scripts))]
        )
        section.figures[f"publish.{mode}.worker/bare"] = median(workers)
        section.figures[f"publish.{mode}.redis/bare"] = median(servers)
        section.rounds[f"publish.{mode}.worker/bare"] = workers
        section.rounds[f"publish.{mode}.redis/bare"] = servers
    return table


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _judge(section: Section, results: Mapping[str, _Result]) -> None:
    redis = "Redis CPU per event relative to the bare script"
    section.checks = [
        Check(
            "worker CPU per piece of text",
            median(results["deltas"].worker_us),
            TEXT_LIMIT_US,
            "us",
        ),
        Check(
            "worker CPU per event, alone",
            median(results["alone"].worker_us),
            ALONE_LIMIT_US,
            "us",
        ),
        Check(
            f"{redis}, alone", section.figures["publish.alone.redis/bare"], ALONE_REDIS_LIMIT, "x"
        ),
        Check(
            f"{redis}, ten in one go",
            section.figures["publish.batches.redis/bare"],
            BATCHES_REDIS_LIMIT,
            "x",
        ),
    ]


def _costs(cases: Sequence[_Case], results: Mapping[str, _Result]) -> Table:
    columns = ["per event", "worker us", "Redis us", "script us", "calls", "events/s"]
    table = Table(columns)
    for case in cases:
        result = results[case.mode]
        table.rows.append([case.name, *_cells(result)])
    return table


def _runs(results: Mapping[int, _Result]) -> Table:
    columns = ["whole runs, per run", "worker us", "Redis us", "script us", "calls", "runs/s"]
    table = Table(columns)
    for concurrency, result in results.items():
        name = "one after the other" if concurrency == 1 else f"{concurrency} at a time"
        table.rows.append([f"submit, claim, five events, end; {name}", *_cells(result)])
    return table


def _cells(result: _Result) -> list[str]:
    return [
        format_spread(result.worker_us),
        format_spread(result.redis_us),
        format_spread(result.script_us),
        f"{median(result.calls):.2f}",
        f"{median(result.rate):,.0f}",
    ]
