"""Distributions, and tables of what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Distribution:
    """Latencies in milliseconds."""

    samples: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float

    def cells(self) -> list[str]:
        """Give the cells for columns p50, p99, p99.9, max, samples."""
        times = (self.p50_ms, self.p99_ms, self.p999_ms, self.max_ms)
        return [*(format_ms(time_ms) for time_ms in times), f"{self.samples:,}"]


DISTRIBUTION_COLUMNS = ("p50 ms", "p99 ms", "p99.9 ms", "max ms", "samples")


def distribution_of(samples_ms: Sequence[float]) -> Distribution:
    """Sum up samples by nearest rank."""
    ordered = sorted(samples_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    return Distribution(len(ordered), at(0.5), at(0.99), at(0.999), at(1.0))


def over_rounds(parts: Sequence[Distribution]) -> Distribution:
    """Give the median of each percentile over rounds, the largest maximum, and all samples."""
    return Distribution(
        samples=sum(part.samples for part in parts),
        p50_ms=median(part.p50_ms for part in parts),
        p99_ms=median(part.p99_ms for part in parts),
        p999_ms=median(part.p999_ms for part in parts),
        max_ms=max(part.max_ms for part in parts),
    )


def format_ms(time_ms: float) -> str:
    return f"{time_ms:.2f}" if time_ms < 10 else f"{time_ms:.0f}"


def format_spread(values: Sequence[float], digits: int = 1) -> str:
    """Give the median with the range of the rounds behind it."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


@dataclass(frozen=True)
class Check:
    """A bound that a measurement is held to.

    Attributes:
        stretch: What would be better still; missing it is told, and no fault.
    """

    name: str
    value: float
    bound: float
    unit: str
    stretch: float | None = None

    @property
    def is_met(self) -> bool:
        return self.value <= self.bound

    def line(self) -> str:
        verdict = "met" if self.is_met else "NOT MET"
        text = f"{verdict}: {self.name}: {self.value:.2f} {self.unit}, at most {self.bound:g}"
        if self.stretch is None:
            return text
        reached = "met" if self.value <= self.stretch else "not met"
        return f"{text} (stretch goal {self.stretch:g}: {reached})"


@dataclass
class Table:
    """Rows of text under named columns."""

    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        widths = [
            max(len(str(row[index])) for row in [self.columns, *self.rows])
            for index in range(len(self.columns))
        ]
        ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(
            "| " + " | ".join(_aligned(row, widths)) + " |"
            for row in [self.columns, ruler, *self.rows]
        )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first = row[0].ljust(widths[0])
    return [first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


@dataclass
class Section:
    """What one measurement has to say.

    Attributes:
        name: As ``--only`` takes it.
        figures: The numbers that other programs may want, by name.
        rounds: The ratios that the guard holds against the accepted ones, by name, one for each
            round. Less is better.
        failure: Why there are no figures; None: there are.
    """

    name: str
    title: str
    method: str
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, Sequence[float]] = field(default_factory=dict)
    failure: str | None = None

    def markdown(self) -> str:
        if self.failure is not None:
            return f"## {self.title}\n\nNot measured: {self.failure}\n"
        paragraphs = self.method.split("\n\n")
        parts = [f"## {self.title}", *(_filled(paragraph) for paragraph in paragraphs)]
        parts += [table.markdown() for table in self.tables]
        if self.checks:
            parts.append("\n".join(f"- {check.line()}" for check in self.checks))
        parts += self.notes
        return "\n\n".join(parts) + "\n"
