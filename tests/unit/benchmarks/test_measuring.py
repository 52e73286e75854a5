"""What a run of the benchmarks makes of a measurement that fails, and of bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.figures import Check, Section
from benchmarks.measuring import exit_status, measure_all
from benchmarks.processes import BenchmarkFailed, Placement
from benchmarks.report import render
from benchmarks.stage import Plan

if TYPE_CHECKING:
    from pathlib import Path

MET, MISSED = Check("delay", 1.0, 2.0, "ms"), Check("delay", 3.0, 2.0, "ms")


def sound(plan: Plan) -> Section:
    return Section("sound", "Something sound", "As ever.", checks=[MET], rounds={"a/b": [1.0]})


def without_a_server(plan: Plan) -> Section:
    raise BenchmarkFailed("gateway did not start:\n/a/path/of/this/machine: no such thing")


def mistaken(plan: Plan) -> Section:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (without_a_server, "gateway did not start:"),
        (mistaken, "ZeroDivisionError: division by zero"),
    ],
)
def test_the_others_go_on_when_one_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failing: object,
    reason: str,
) -> None:
    plan = Plan(True, tmp_path, Placement(), lambda _: None)
    sections = measure_all({"first": sound, "second": failing, "third": sound}, plan)  # type: ignore[dict-item]
    results = render(sections, "make bench", 0.0, 1.0)
    assert results.count("## Something sound") == 2
    assert "Not measured, because it failed: second." in results
    assert f"## Failed: second\n\nNot measured: {reason}\n" in results
    assert "/a/path" not in results
    assert exit_status(sections, is_worse=False, is_quick=True) == 1
    said = capsys.readouterr()
    assert f"Not measured: {reason}" in said.out
    assert said.out.count("## Something sound") == 2
    assert "Error: second:" in said.err
    assert ("/a/path" in said.err) == (failing is without_a_server)
    assert ("Traceback" in said.err) == (failing is mistaken)


def test_whoever_stops_a_run_ends_it(tmp_path: Path) -> None:
    def stopped(plan: Plan) -> Section:
        raise KeyboardInterrupt

    plan = Plan(True, tmp_path, Placement(), lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        measure_all({"first": stopped, "second": sound}, plan)


@pytest.mark.parametrize(
    ("check", "is_worse", "is_quick", "status"),
    [
        (MET, False, False, 0),
        (MISSED, False, False, 1),
        (MET, True, False, 1),
        (MISSED, True, True, 0),
    ],
)
def test_bounds_and_accepted_ratios_count_in_a_full_run(
    check: Check, is_worse: bool, is_quick: bool, status: int
) -> None:
    sections = [Section("one", "One", "", checks=[check])]
    assert exit_status(sections, is_worse=is_worse, is_quick=is_quick) == status
