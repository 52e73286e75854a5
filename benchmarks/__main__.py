"""``python -m benchmarks``: measure everything, print the tables, write RESULTS.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import guard
from benchmarks.compiled import compiled_relay
from benchmarks.measures import (
    bridge,
    encoding,
    example_run,
    first_event,
    memory,
    profile,
    publish_cost,
    rates,
    reconnect,
    resume_storm,
    stalls,
    sustained,
    throughput,
    worker_memory,
)
from benchmarks.measuring import Measure, exit_status, measure_all
from benchmarks.processes import (
    BenchmarkFailed,
    Placement,
    raise_file_limit,
    stop_in_order_on_sigterm,
)
from benchmarks.report import FAULT_ROUNDS, kept_section, render
from benchmarks.stage import Plan

RESULTS = Path(__file__).parent / "RESULTS.md"
FILES_NEEDED = 12_000
"""Ten thousand connections in one process, or five thousand with as many to Redis."""

MEASURES: dict[str, Measure] = {
    module.NAME: module.measure
    for module in (
        throughput,
        first_event,
        example_run,
        sustained,
        bridge,
        reconnect,
        rates,
        memory,
        resume_storm,
        stalls,
        publish_cost,
        encoding,
        worker_memory,
    )
}


def main() -> int:
    options = _parser().parse_args()
    limit = raise_file_limit()
    stop_in_order_on_sigterm()
    if limit < FILES_NEEDED and not options.quick:
        _say(f"only {limit} open files are permitted here; {FILES_NEEDED} may be needed")
    load_before, began_s = os.getloadavg()[0], time.monotonic()
    chosen = {name: MEASURES[name] for name in options.only or MEASURES}
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
        chosen[profile.NAME] = profile.measure
    try:
        compiled = None if options.quick else compiled_relay(_say)
    except BenchmarkFailed as failure:
        print(f"Error: {failure}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="agent-relay-bench-") as folder:
        plan = Plan(options.quick, Path(folder), Placement(), _say, options.profile, compiled)
        sections = measure_all(chosen, plan)
    is_worse = False
    if not options.quick:
        measured = {name: ratios for section in sections for name, ratios in section.rounds.items()}
        guard.remember(measured)
        compared, is_worse = guard.compare(measured)
        sections.append(compared)
        print(compared.markdown(), flush=True)
    seconds = time.monotonic() - began_s
    path = options.output or (None if options.quick or options.only else RESULTS)
    if path is not None:
        kept = kept_section(path, FAULT_ROUNDS)
        is_compiled = compiled is not None
        text = render(sections, _command(options), load_before, seconds, is_compiled=is_compiled)
        path.write_text(text + kept)
        print(f"Written: {path}")
    print(f"Took {seconds:.0f} s.")
    return exit_status(sections, is_worse=is_worse, is_quick=options.quick)


def _command(options: argparse.Namespace) -> str:
    """Give the command that measures the same again; where its results went does not matter."""
    quick = ["--quick"] if options.quick else []
    profiled = ["--profile"] if options.profile is not None else []
    only = [f"--only={name}" for name in options.only or ()]
    return " ".join(["python -m benchmarks", *quick, *only, *profiled])


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure throughput, latency, memory and the cost of publishing.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute; figures for a glance only"
    )
    parser.add_argument(
        "--only", action="append", choices=list(MEASURES), help="one measurement; repeatable"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the results go (default: RESULTS.md beside this package, for a full run)",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="?",
        const=Path("build/profile"),
        metavar="FOLDER",
        help="also profile a saturated gateway; leaves flame graphs (default: build/profile)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
