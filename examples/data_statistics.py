"""Statistics of columns, in plain Python: no value is estimated where it can be computed."""

from __future__ import annotations

import math
import random
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from data_table import Column

TUKEY_FACTOR = 1.5
MIN_OUTLIER_VALUES = 5
MIN_PAIRS = 3

YEARS_IF_NAMED = (1000, 2999)
YEARS_UNNAMED = (1900, 2100)
_YEAR = re.compile(r"(?<![^\W_])(year|yr|jahr|anno|année|año)s?(?![^\W_])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class NumberSummary:
    """A numeric column.

    Attributes:
        stdev: That of a sample, None for a single value.
        is_year: Whether its values are years, and not quantities.
    """

    name: str
    count: int
    missing: int
    distinct: int
    mean: float
    stdev: float | None
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float
    is_year: bool = False


@dataclass(frozen=True, slots=True)
class TextSummary:
    """A column of text or dates. ``top`` holds its most frequent values with their counts."""

    name: str
    kind: str
    count: int
    missing: int
    distinct: int
    first: str
    last: str
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Outliers:
    """Values of a column beyond Tukey's fences.

    Attributes:
        name: The column.
        lower_fence: Below it lie outliers.
        upper_fence: Above it lie outliers.
        values: (row number from 1, value), farthest from its fence first.
    """

    name: str
    lower_fence: float
    upper_fence: float
    values: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Correlation:
    """Pearson's r of two columns over the rows that have both."""

    first: str
    second: str
    r: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Interval:
    """A bootstrap confidence interval of a column's mean."""

    name: str
    low: float
    high: float


def mean(values: Sequence[float]) -> float:
    """Give the mean of at least one value; never outside of their range."""
    return min(max(math.fsum(values) / len(values), min(values)), max(values))


def stdev(values: Sequence[float]) -> float | None:
    """Give the standard deviation of a sample; None for fewer than two values."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Give a quantile of sorted values, by linear interpolation (type 7 of Hyndman and Fan).

    Args:
        ordered: At least one value, in rising order.
        share: From 0 (the minimum) to 1 (the maximum).
    """
    position = (len(ordered) - 1) * share
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # Rounding may carry the sum beyond a neighbour by one unit in the last place.
    return min(max(low + (high - low) * (position - below), low), high)


def round_to_digits(value: float, digits: int = 6) -> float:
    """Give ``value`` with ``digits`` significant digits."""
    return float(f"{value:.{digits}g}")


def summarize_numbers(column: Column) -> NumberSummary:
    """Summarize a numeric column."""
    ordered = sorted(column.values)
    return NumberSummary(
        name=column.name,
        count=len(ordered),
        missing=len(column.cells) - len(ordered),
        distinct=len(set(ordered)),
        mean=mean(ordered),
        stdev=stdev(ordered),
        minimum=ordered[0],
        lower_quartile=quantile(ordered, 0.25),
        median=quantile(ordered, 0.5),
        upper_quartile=quantile(ordered, 0.75),
        maximum=ordered[-1],
        is_year=holds_years(column.name, ordered),
    )


def holds_years(name: str, ordered: Sequence[float]) -> bool:
    """Say whether sorted values are years: by the column's name, or because nothing else is likely.

    Args:
        name: The column's.
        ordered: At least one value, in rising order.
    """
    if not all(value.is_integer() for value in map(float, ordered)):
        return False
    first, last = YEARS_IF_NAMED if _YEAR.search(name) else YEARS_UNNAMED
    return first <= ordered[0] and ordered[-1] <= last


def summarize_text(column: Column, top_count: int = 3) -> TextSummary:
    """Summarize a column of text, dates or nothing."""
    values = [cell for cell in column.cells if cell is not None]
    # By count, then by name: the order does not depend on that of the rows.
    ranked = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    return TextSummary(
        name=column.name,
        kind=column.kind,
        count=len(values),
        missing=len(column.cells) - len(values),
        distinct=len(ranked),
        first=min(values, default=""),
        last=max(values, default=""),
        top=tuple(ranked[:top_count]),
    )


def find_outliers(column: Column) -> Outliers | None:
    """Find the values beyond 1.5 interquartile ranges from the quartiles.

    None where that says nothing: for few values, or when half of them are equal.
    """
    ordered = sorted(column.values)
    if len(ordered) < MIN_OUTLIER_VALUES:
        return None
    lower, upper = quantile(ordered, 0.25), quantile(ordered, 0.75)
    if lower == upper:
        return None
    reach = TUKEY_FACTOR * (upper - lower)
    low_fence, high_fence = lower - reach, upper + reach
    outside = [
        (row, value)
        for row, value in enumerate(column.numbers, 1)
        if value is not None and not low_fence <= value <= high_fence
    ]
    outside.sort(key=lambda item: -max(low_fence - item[1], item[1] - high_fence))
    return Outliers(column.name, low_fence, high_fence, tuple(outside))


def correlate(first: Column, second: Column) -> Correlation | None:
    """Give Pearson's r; None for fewer than three common rows or a column without spread."""
    rows = [
        (x, y)
        for x, y in zip(first.numbers, second.numbers, strict=True)
        if x is not None and y is not None
    ]
    if len(rows) < MIN_PAIRS:
        return None
    x_offsets = _scaled_offsets([x for x, _ in rows])
    y_offsets = _scaled_offsets([y for _, y in rows])
    if x_offsets is None or y_offsets is None:
        return None
    together = math.fsum(x * y for x, y in zip(x_offsets, y_offsets, strict=True))
    lengths = math.hypot(*x_offsets) * math.hypot(*y_offsets)
    return Correlation(first.name, second.name, min(max(together / lengths, -1.0), 1.0), len(rows))


def correlations(columns: Sequence[Column]) -> Iterator[Correlation]:
    """Give the correlation of each pair of columns that has one."""
    for first, second in combinations(columns, 2):
        if (found := correlate(first, second)) is not None:
            yield found


def _scaled_offsets(values: Sequence[float]) -> list[float] | None:
    """Give the distances from the mean, the largest being 1; None without spread.

    Unscaled, the squares of very small or large distances leave the range of a float.
    """
    center = mean(values)
    offsets = [value - center for value in values]
    largest = max(abs(offset) for offset in offsets)
    if largest <= abs(center) * 1e-15:
        return None
    return [offset / largest for offset in offsets]


class Bootstrap:
    """Confidence intervals of means by resampling, in steps of any size.

    The result depends on the values, the seed and the number of resamples, not on the
    steps. One thread at a time.
    """

    def __init__(self, columns: Mapping[str, Sequence[float]], resamples: int, seed: int) -> None:
        self.resamples = resamples
        self.done = 0
        self._columns = {name: tuple(values) for name, values in columns.items()}
        self._means = {name: array("d") for name in columns}
        # Statistics, not secrets.
        self._random = random.Random(seed)  # noqa: S311

    @property
    def is_finished(self) -> bool:
        """Whether all resamples are done."""
        return self.done >= self.resamples

    def advance(self, rounds: int) -> None:
        """Do at most ``rounds`` more resamples of every column."""
        choices, fsum = self._random.choices, math.fsum
        for _ in range(min(rounds, self.resamples - self.done)):
            for name, values in self._columns.items():
                count = len(values)
                self._means[name].append(fsum(choices(values, k=count)) / count)
            self.done += 1

    def intervals(self, confidence: float) -> list[Interval]:
        """Give the intervals that hold ``confidence`` of the resampled means so far."""
        tail = (1 - confidence) / 2
        found = []
        for name, means in self._means.items():
            ordered = sorted(means)
            found.append(Interval(name, quantile(ordered, tail), quantile(ordered, 1 - tail)))
        return found


def next_chunk(rounds: int, took_s: float, target_s: float) -> int:
    """Give the number of rounds that should take about ``target_s``.

    At most fourfold the last one, so that one lucky measurement cannot make a chunk long.
    """
    if took_s * 4 <= target_s:
        return rounds * 4
    return max(1, round(rounds * target_s / took_s))
