"""Which changes of a ratio the benchmark's guard names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.guard import Verdict, accept, compare, judge, remember

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ([2.0], Verdict.SAME),
        ([2.59], Verdict.SAME),
        ([2.61], Verdict.WORSE),
        ([1.55], Verdict.SAME),
        ([1.53], Verdict.BETTER),
        # One far outlier is not a change: the median is held against the accepted ratio.
        ([2.0, 2.1, 9.0], Verdict.SAME),
        ([2.4, 2.4, 2.4, 2.4, 2.4], Verdict.WORSE),
        ([2.4, 2.4, 2.4, 2.4, 2.2], Verdict.SAME),
        ([2.4, 2.4, 2.4, 2.4], Verdict.SAME),
        ([1.7, 1.7, 1.7, 1.7, 1.7], Verdict.BETTER),
        ([1.7, 1.7, 1.7, 1.7, 1.8], Verdict.SAME),
    ],
)
def test_large_changes_and_agreed_ones_are_told(rounds: list[float], verdict: Verdict) -> None:
    [finding] = judge({"ratio": 2.0}, {"ratio": rounds})
    assert finding.verdict is verdict


def test_a_ratio_that_nobody_accepted_is_no_fault(tmp_path: Path) -> None:
    section, is_worse = compare({"new": [3.0]}, tmp_path / "accepted.json")
    assert not is_worse
    assert Verdict.NEW in section.markdown()


def test_what_became_worse_is_named(tmp_path: Path) -> None:
    last_run, accepted = tmp_path / "out" / "ratios.json", tmp_path / "accepted.json"
    remember({"steady": [1.0, 1.1, 1.2], "other": [4.0]}, last_run)
    assert accept(last_run=last_run, path=accepted) == ["steady", "other"]
    section, is_worse = compare({"steady": [1.1], "other": [6.0]}, accepted)
    assert is_worse
    assert section.notes == ["Worse than accepted: other."]
    assert "+50%" in section.markdown()


def test_accepting_by_name_leaves_the_others(tmp_path: Path) -> None:
    last_run, accepted = tmp_path / "out" / "ratios.json", tmp_path / "accepted.json"
    remember({"one": [1.0], "two": [2.0]}, last_run)
    accept(last_run=last_run, path=accepted)
    remember({"one": [5.0], "two": [6.0]}, last_run)
    assert accept(["two"], last_run=last_run, path=accepted) == ["two"]
    assert json.loads(accepted.read_text())["ratios"] == {"one": 1.0, "two": 6.0}


def test_a_partial_run_keeps_the_ratios_of_the_last_whole_one(tmp_path: Path) -> None:
    last_run, accepted = tmp_path / "out" / "ratios.json", tmp_path / "accepted.json"
    remember({"one": [1.0], "two": [2.0]}, last_run)
    remember({"two": [3.0]}, last_run)
    accept(last_run=last_run, path=accepted)
    assert json.loads(accepted.read_text())["ratios"] == {"one": 1.0, "two": 3.0}


def test_nothing_is_accepted_that_was_not_measured(tmp_path: Path) -> None:
    last_run, accepted = tmp_path / "out" / "ratios.json", tmp_path / "accepted.json"
    with pytest.raises(KeyError, match="make bench"):
        accept(last_run=last_run, path=accepted)
    remember({"one": [1.0]}, last_run)
    with pytest.raises(KeyError, match="has no tow"):
        accept(["tow"], last_run=last_run, path=accepted)
    assert not accepted.exists()
