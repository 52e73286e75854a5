"""Writes the results of the data agent as Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from data_statistics import (
        Correlation,
        Interval,
        NumberSummary,
        Outliers,
        TextSummary,
    )
    from data_table import Table

MAX_NAME_CHARS = 40
MAX_CORRELATIONS = 8
MAX_OUTLIERS = 5


@dataclass(frozen=True, slots=True)
class Resampling:
    """How the intervals were made."""

    intervals: tuple[Interval, ...]
    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was computed about one table.

    Attributes:
        title: Name of the file, or of the message's table.
        table: The table.
        numbers: Summaries of its numeric columns.
        texts: Summaries of its other columns.
        outliers: Outliers by column; columns for which they mean nothing are left out.
        correlations: Strongest first.
        resampling: Intervals of the means; None without numeric columns.
        left_out: Numeric columns that were too many to correlate and resample.
        mentioned: Columns that the question names; their correlations are shown first.
    """

    title: str
    table: Table
    numbers: tuple[NumberSummary, ...]
    texts: tuple[TextSummary, ...]
    outliers: tuple[Outliers, ...]
    correlations: tuple[Correlation, ...]
    resampling: Resampling | None
    left_out: tuple[str, ...] = ()
    mentioned: tuple[str, ...] = ()


def format_number(value: float) -> str:
    """Give a number with as many digits as people read: about four that count."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e9 or size < 1e-4:
        return f"{value:.3e}"
    if float(value).is_integer():
        return f"{int(value):,}"
    if size >= 1_000:
        return f"{value:,.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def format_year(value: float) -> str:
    """Give a year, or a mean of years: its thousands are not set apart."""
    return str(int(value)) if float(value).is_integer() else f"{value:.1f}"


def mentioned_columns(question: str, names: Sequence[str]) -> list[str]:
    """Give the columns that a question names, in their order, however they are spelled."""
    words = f" {_normalize(question)} "
    return [name for name in names if _normalize(name) and f" {_normalize(name)} " in words]


def compose_report(findings: Findings) -> str:
    """Write the whole answer."""
    parts = [_title(findings), *_headlines(findings)]
    if findings.numbers:
        parts.extend(("### Numeric columns", _number_table(findings), _spread_table(findings)))
    if findings.texts:
        parts.extend(("### Other columns", _text_table(findings.texts)))
    if findings.correlations:
        parts.extend(("### Correlations", _correlation_table(findings)))
    listed = [found for found in findings.outliers if found.values]
    if listed:
        parts.extend(("### Outliers", _outlier_list(findings, listed)))
    parts.extend(("### How this was computed", _method(findings)))
    return "\n\n".join(parts) + "\n"


def _normalize(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _title(findings: Findings) -> str:
    table = findings.table
    return (
        f"## {_cell(findings.title)}: {_count(table.row_count, 'row')}, "
        f"{_count(len(table.columns), 'column')}"
    )


def _headlines(findings: Findings) -> list[str]:
    lines = []
    ranked = _ranked_correlations(findings)
    if ranked:
        best = ranked[0]
        lines.append(
            f"- **{_cell(best.first)}** and **{_cell(best.second)}** have a {_strength(best.r)} "
            f"correlation (r = {best.r:+.2f} over {_count(best.pairs, 'row')})."
        )
    summaries: list[NumberSummary | TextSummary] = [*findings.numbers, *findings.texts]
    missing = [(summary.missing, summary.name) for summary in summaries if summary.missing]
    if missing:
        count, name = max(missing)
        total = sum(number for number, _ in missing)
        lines.append(
            f"- {_count(total, 'cell')} missing, most in **{_cell(name)}** "
            f"({count} of {findings.table.row_count})."
        )
    else:
        lines.append("- No cell is missing.")
    with_outliers = [found for found in findings.outliers if found.values]
    if with_outliers:
        most = max(with_outliers, key=lambda found: len(found.values))
        row, farthest = most.values[0]
        lines.append(
            f"- {_count(len(most.values), 'outlier')} in **{_cell(most.name)}**, "
            f"the farthest {_format_of(findings, most.name)(farthest)} in row {row}."
        )
    if not findings.numbers:
        lines.append("- No column is numeric, so there is nothing to correlate or resample.")
    return ["\n".join(lines)]


def _number_table(findings: Findings) -> str:
    intervals = (
        {interval.name: interval for interval in findings.resampling.intervals}
        if findings.resampling
        else {}
    )
    percent = f"{findings.resampling.confidence:.0%}" if findings.resampling else ""
    rows = []
    for summary in findings.numbers:
        interval = intervals.get(summary.name)
        form = _format_of(findings, summary.name)
        rows.append(
            (
                _cell(summary.name),
                f"{summary.count:,}",
                f"{summary.missing:,}",
                form(summary.mean),
                f"{form(interval.low)} to {form(interval.high)}" if interval else "",
                "" if summary.stdev is None else format_number(summary.stdev),
            )
        )
    header = ("Column", "Count", "Missing", "Mean", f"{percent} interval of the mean", "Stdev")
    return _markdown_table(header, rows)


def _spread_table(findings: Findings) -> str:
    counts = {found.name: str(len(found.values)) for found in findings.outliers}
    rows = []
    for summary in findings.numbers:
        spread = (
            summary.minimum,
            summary.lower_quartile,
            summary.median,
            summary.upper_quartile,
            summary.maximum,
        )
        rows.append(
            (
                _cell(summary.name),
                *map(_format_of(findings, summary.name), spread),
                f"{summary.distinct:,}",
                counts.get(summary.name, ""),
            )
        )
    header = ("Column", "Min", "Q1", "Median", "Q3", "Max", "Distinct", "Outliers")
    return _markdown_table(header, rows)


def _format_of(findings: Findings, name: str) -> Callable[[float], str]:
    """Give how the values of a column are written."""
    is_year = any(summary.is_year for summary in findings.numbers if summary.name == name)
    return format_year if is_year else format_number


def _text_table(texts: Sequence[TextSummary]) -> str:
    rows = []
    for summary in texts:
        if summary.kind == "date":
            says = f"{_cell(summary.first)} to {_cell(summary.last)}"
        elif summary.distinct == summary.count > 1:
            says = "every value differs"
        else:
            says = ", ".join(f"{_cell(value)} ({count})" for value, count in summary.top)
        rows.append(
            (
                _cell(summary.name),
                summary.kind,
                f"{summary.count:,}",
                f"{summary.missing:,}",
                f"{summary.distinct:,}",
                says,
            )
        )
    header = ("Column", "Kind", "Count", "Missing", "Distinct", "Most frequent, or range")
    return _markdown_table(header, rows, left_aligned=(0, 1, 5))


def _correlation_table(findings: Findings) -> str:
    rows = [
        (
            f"{_cell(found.first)} and {_cell(found.second)}",
            f"{found.r:+.3f}",
            f"{found.pairs:,}",
            _strength(found.r),
        )
        for found in _ranked_correlations(findings)[:MAX_CORRELATIONS]
    ]
    return _markdown_table(("Columns", "r", "Rows", "Strength"), rows, left_aligned=(0, 3))


def _ranked_correlations(findings: Findings) -> list[Correlation]:
    """Pairs of which the question names both columns first, then one, then by strength."""
    mentioned = set(findings.mentioned)
    return sorted(
        findings.correlations,
        key=lambda found: (-len(mentioned & {found.first, found.second}), -abs(found.r)),
    )


def _outlier_list(findings: Findings, outliers: Sequence[Outliers]) -> str:
    lines = []
    for found in outliers:
        form = _format_of(findings, found.name)
        shown = ", ".join(
            f"{form(value)} (row {row})" for row, value in found.values[:MAX_OUTLIERS]
        )
        more = len(found.values) - MAX_OUTLIERS
        lines.append(
            f"- **{_cell(found.name)}**, outside {form(found.lower_fence)} to "
            f"{form(found.upper_fence)}: {shown}{f', and {more} more' if more > 0 else ''}"
        )
    return "\n".join(lines)


def _method(findings: Findings) -> str:
    table = findings.table
    lines = [
        f"- The delimiter is the {table.delimiter}; "
        + (
            "the first row names the columns."
            if table.has_header
            else "the first row holds numbers, so it was read as data."
        )
    ]
    if table.short_rows or table.long_rows:
        lines.append(
            f"- {_count(table.short_rows, 'row')} had too few cells (filled as missing), "
            f"{table.long_rows:,} too many (the rest left out)."
        )
    for column in table.columns:
        if column.unreadable:
            examples = ", ".join(f"“{_cell(cell)}”" for cell in column.unreadable[:3])
            lines.append(
                f"- {_count(len(column.unreadable), 'cell')} of **{_cell(column.name)}** "
                f"could not be read as a number and count as missing: {examples}."
            )
    if findings.numbers:
        lines.append(
            "- Quartiles by linear interpolation; outliers lie more than 1.5 interquartile "
            "ranges from the quartiles; correlations are Pearson's r over rows that have both."
        )
    if findings.resampling:
        made = findings.resampling
        lines.append(
            f"- Intervals by the percentile bootstrap: {_count(made.resamples, 'resample')} of "
            f"each column, seed {made.seed}; `resamples={made.resamples}` gives them again."
        )
    if findings.left_out:
        names = ", ".join(_cell(name) for name in findings.left_out)
        lines.append(f"- Too many columns to correlate and resample these as well: {names}.")
    return "\n".join(lines)


def _strength(r: float) -> str:
    words = ((0.9, "very strong"), (0.7, "strong"), (0.4, "moderate"), (0.2, "weak"))
    strength = next((word for limit, word in words if abs(r) >= limit), "negligible")
    return f"{strength} {'positive' if r > 0 else 'negative'}" if abs(r) >= 0.2 else strength


def _markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left_aligned: Sequence[int] = (0,)
) -> str:
    rule = ["---" if index in left_aligned else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _cell(text: str) -> str:
    """Shorten and escape a text of the table: it must not end its cell or become markup."""
    flat = " ".join(text.split())
    if len(flat) > MAX_NAME_CHARS:
        flat = f"{flat[: MAX_NAME_CHARS - 1]}…"
    # An underscore within a word is no markup.
    return re.sub(r"([\\`*\[\]<>|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", flat)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
