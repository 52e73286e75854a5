"""What the soak takes for growth, and what for noise."""

from __future__ import annotations

import random

import pytest

from benchmarks.figures import Distribution
from benchmarks.soak import Diary, report
from benchmarks.trend import trend_of

HOUR = [20.0 * number for number in range(180)]


def noisy(level: float, per_hour: float, noise: float, seed: int = 1) -> list[float]:
    chooser = random.Random(seed)
    return [level + per_hour * at / 3600 + chooser.uniform(-noise, noise) for at in HOUR]


def test_a_line_is_found_through_noise() -> None:
    trend = trend_of(HOUR, noisy(100_000, per_hour=5_000, noise=1_000))
    assert trend.per_hour == pytest.approx(5_000, abs=500)
    assert 3_500 < trend.sure_growth < 5_000


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_growth(seed: int) -> None:
    assert trend_of(HOUR, noisy(100_000, 0, 1_000, seed)).sure_growth < 200


def test_shrinking_is_no_growth() -> None:
    assert trend_of(HOUR, noisy(100_000, -5_000, 100)).sure_growth == 0


def test_two_values_say_nothing() -> None:
    assert trend_of([0.0, 1.0], [0.0, 9.0]).sure_growth == 0
    assert trend_of([], []).sure_growth == 0


def diary(*, memory_per_hour: float = 0, p99_per_hour: float = 0) -> Diary:
    p99 = noisy(5.0, p99_per_hour, 1.0)
    return Diary(
        at_s=list(HOUR),
        latency=[Distribution(1_000, 1.0, each, 2 * each, 3 * each) for each in p99],
        memory_kib={
            "gateway": [round(size) for size in noisy(90_000, memory_per_hour, 200)],
            "Redis": [round(size) for size in noisy(50_000, 90_000, 200)],
        },
        delivered=1,
    )


def test_a_quiet_hour_is_well() -> None:
    text, is_well = report(diary(), runs=1, rate=1, minutes=60, history="")
    assert is_well, text
    assert "all is well" in text


def test_memory_that_grows_is_not_well() -> None:
    text, is_well = report(diary(memory_per_hour=6_000), runs=1, rate=1, minutes=60, history="")
    assert not is_well
    assert "NOT WELL: memory of the gateway grows" in text


def test_latency_that_drifts_is_not_well() -> None:
    text, is_well = report(diary(p99_per_hour=6), runs=1, rate=1, minutes=60, history="")
    assert not is_well
    assert "NOT WELL: p99 latency drifts" in text
