"""Measuring one thing after the other: what fails is reported, and the others go on."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from benchmarks.figures import Section
from benchmarks.processes import BenchmarkFailed
from benchmarks.stage import Plan

Measure = Callable[[Plan], Section]


def measure_all(measures: Mapping[str, Measure], plan: Plan) -> list[Section]:
    """Make each measurement and print it; one that fails gives a section that says so."""
    sections = []
    for name, measure in measures.items():
        section = _attempted(name, measure, plan)
        sections.append(section)
        print(section.markdown(), flush=True)
    return sections


def _attempted(name: str, measure: Measure, plan: Plan) -> Section:
    try:
        return measure(plan)
    except BenchmarkFailed as failure:
        print(f"Error: {name}: {failure}", file=sys.stderr, flush=True)
        return _failed(name, str(failure))
    except Exception as error:  # noqa: BLE001
        # A mistake of one measurement must not cost the minutes that the others took.
        print(f"Error: {name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return _failed(name, f"{type(error).__name__}: {error}")


def _failed(name: str, reason: str) -> Section:
    # The rest may be a whole log, with paths of this machine: that is for the terminal.
    first_line = reason.strip().partition("\n")[0]
    return Section(name, f"Failed: {name}", "", failure=first_line or "no reason was given")


def exit_status(sections: Sequence[Section], *, is_worse: bool, is_quick: bool) -> int:
    """Give what the program exits with.

    Args:
        sections: What was measured.
        is_worse: Whether a ratio is worse than the accepted one.
        is_quick: Whether the figures are for a glance only: they are then held to no bound.
    """
    if any(section.failure is not None for section in sections):
        return 1
    is_missed = any(not check.is_met for section in sections for check in section.checks)
    return 1 if (is_missed or is_worse) and not is_quick else 0
