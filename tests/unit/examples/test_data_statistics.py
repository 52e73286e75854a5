from __future__ import annotations

import math
import statistics

import pytest
from data_statistics import (
    Bootstrap,
    correlate,
    correlations,
    find_outliers,
    mean,
    next_chunk,
    quantile,
    round_to_digits,
    stdev,
    summarize_numbers,
    summarize_text,
)
from data_table import Column, type_column
from hypothesis import given
from hypothesis import strategies as st

finite = st.floats(min_value=-1e150, max_value=1e150)
some_values = st.lists(finite, min_size=1)


def numbers(name: str, *values: float | None) -> Column:
    return type_column(name, ["" if value is None else repr(float(value)) for value in values])


@given(some_values, st.floats(min_value=0, max_value=1))
def test_quantiles_lie_between_the_extremes(values: list[float], share: float) -> None:
    assert min(values) <= quantile(sorted(values), share) <= max(values)


@given(some_values, st.floats(min_value=0, max_value=1), st.floats(min_value=0, max_value=1))
def test_quantiles_rise_with_their_share(values: list[float], one: float, other: float) -> None:
    ordered = sorted(values)
    low, high = quantile(ordered, min(one, other)), quantile(ordered, max(one, other))
    assert low <= high or math.isclose(low, high)


@given(some_values)
def test_means_lie_between_the_extremes_and_nothing_overflows(values: list[float]) -> None:
    assert min(values) <= mean(values) <= max(values)
    spread = stdev(values)
    assert (spread is None) == (len(values) == 1)
    assert spread is None or (math.isfinite(spread) and spread >= 0)


@given(st.lists(st.integers(-1_000, 1_000), min_size=2))
def test_statistics_agree_with_the_standard_library(values: list[int]) -> None:
    floats = sorted(map(float, values))
    assert mean(floats) == pytest.approx(statistics.fmean(floats))
    assert stdev(floats) == pytest.approx(statistics.stdev(floats), abs=1e-9)
    quartiles = statistics.quantiles(floats, n=4, method="inclusive")
    assert [quantile(floats, share) for share in (0.25, 0.5, 0.75)] == pytest.approx(quartiles)


def test_a_numeric_column_is_summarized() -> None:
    summary = summarize_numbers(numbers("x", 4, 1, None, 2, 1))
    assert (summary.count, summary.missing, summary.distinct) == (4, 1, 3)
    assert (summary.minimum, summary.median, summary.maximum) == (1, 1.5, 4)
    assert summary.mean == 2
    assert summarize_numbers(numbers("x", 7)).stdev is None


def test_a_text_column_is_summarized_in_an_order_of_its_own() -> None:
    summary = summarize_text(type_column("x", ["b", "a", "c", "b", "", "a", "d"]))
    assert summary.top == (("a", 2), ("b", 2), ("c", 1))
    assert (summary.count, summary.missing, summary.distinct) == (6, 1, 4)
    assert summarize_text(type_column("x", ["", ""])).top == ()


def test_outliers_are_listed_farthest_first_with_their_rows() -> None:
    found = find_outliers(numbers("x", 10, 11, None, 12, 13, 11, 40, -90, 12))
    assert found is not None
    assert found.values == ((8, -90.0), (7, 40.0))


def test_outliers_mean_nothing_for_few_or_equal_values() -> None:
    assert find_outliers(numbers("x", 1, 2, 3, 400)) is None
    assert find_outliers(numbers("x", 1, 1, 1, 1, 1, 9)) is None


def test_correlation_uses_the_rows_that_have_both() -> None:
    found = correlate(numbers("x", 1, 2, 3, None, 5), numbers("y", 2, 4, 6, 8, 10))
    assert found is not None
    assert (found.r, found.pairs) == (pytest.approx(1.0), 4)
    opposite = correlate(numbers("x", 1, 2, 3), numbers("y", 3, 2, 1))
    assert opposite is not None
    assert opposite.r == pytest.approx(-1.0)


def test_correlation_needs_rows_and_spread() -> None:
    assert correlate(numbers("x", 1, 2), numbers("y", 1, 2)) is None
    assert correlate(numbers("x", 1, 2, 3), numbers("y", 5, 5, 5)) is None
    assert list(correlations([numbers("x", 1, 2, 3), numbers("y", 5, 5, 5)])) == []


@given(st.lists(st.tuples(finite, finite), min_size=3))
def test_correlations_are_finite_and_within_their_range(rows: list[tuple[float, float]]) -> None:
    found = correlate(numbers("x", *(x for x, _ in rows)), numbers("y", *(y for _, y in rows)))
    assert found is None or -1 <= found.r <= 1


@given(
    st.lists(finite, min_size=1, max_size=20), st.lists(st.integers(1, 40), min_size=1, max_size=9)
)
def test_intervals_do_not_depend_on_the_steps(values: list[float], steps: list[int]) -> None:
    resamples = sum(steps)
    at_once = Bootstrap({"x": values}, resamples, seed=7)
    at_once.advance(resamples)
    stepwise = Bootstrap({"x": values}, resamples, seed=7)
    for step in steps:
        stepwise.advance(step)
    assert stepwise.is_finished
    assert stepwise.intervals(0.95) == at_once.intervals(0.95)


def test_an_interval_holds_the_mean_of_well_behaved_values() -> None:
    values = [float(number % 10) for number in range(200)]
    bootstrap = Bootstrap({"x": values}, 500, seed=1)
    bootstrap.advance(10_000)
    assert bootstrap.done == 500
    (interval,) = bootstrap.intervals(0.95)
    assert interval.low < 4.5 < interval.high
    # The normal approximation: 1.96 * 2.87 / sqrt(200) on each side.
    assert interval.high - interval.low == pytest.approx(0.796, rel=0.15)


@given(st.integers(1, 10_000), st.floats(0, 100), st.floats(0.001, 1))
def test_chunks_grow_slowly_and_never_vanish(rounds: int, took_s: float, target_s: float) -> None:
    assert 1 <= next_chunk(rounds, took_s, target_s) <= 4 * rounds


def test_chunks_approach_their_time() -> None:
    assert next_chunk(100, took_s=0.1, target_s=0.05) == 50


def test_rounding_keeps_significant_digits() -> None:
    assert round_to_digits(890.9000000000001) == 890.9
    assert round_to_digits(0.000123456789) == 0.000123457
