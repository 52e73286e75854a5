"""Reads CSV text into typed columns. Real files are untidy: what was guessed is recorded."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CELLS = 500_000
MAX_COLUMNS = 100

ColumnKind = Literal["number", "date", "text", "empty"]

_DELIMITERS = (",", ";", "\t", "|")
_DELIMITER_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_MISSING = frozenset(("", "-", "--", "?", "na", "n/a", "nan", "null", "none", "nil", "#n/a"))
# No leading zeros: 00417 is a post code or a key, not a quantity.
_INTEGER = r"[+-]?(?:0|[1-9]\d*)"
_POINT = re.compile(rf"(?:{_INTEGER}(?:\.\d*)?|[+-]?\.\d+)(?:[eE][+-]?\d+)?$", re.ASCII)
_COMMA = re.compile(rf"{_INTEGER}(?:,\d+)?(?:[eE][+-]?\d+)?$", re.ASCII)
_COMMA_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?$", re.ASCII)
_POINT_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+(?:,\d+)?$", re.ASCII)
# Squares and their sums must stay finite.
_LARGEST = 1e150
# With fewer good cells than this, a column with some numbers in it is text.
_NUMERIC_SHARE = 0.9


class UnreadableTableError(Exception):
    """The text is no table that can be worked with.

    Attributes:
        problem: What is wrong, safe to show.
        suggestions: What the sender can do about it.
    """

    def __init__(self, problem: str, *suggestions: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.suggestions = list(suggestions)


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: Unique in its table.
        kind: What its cells are.
        cells: The text of each cell, None where it is missing.
        numbers: For a numeric column the value of each row, None where it is missing.
        unreadable: Cells of a numeric column that are no number; they count as missing.
    """

    name: str
    kind: ColumnKind
    cells: tuple[str | None, ...]
    numbers: tuple[float | None, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        """The numbers that are there."""
        return [number for number in self.numbers if number is not None]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of equally long columns, and what was guessed while reading it.

    Attributes:
        columns: At least one.
        row_count: At least one; the header does not count.
        delimiter: Name of the sign between cells.
        has_header: Whether the first row gave the names.
        short_rows: Rows that were filled with missing cells.
        long_rows: Rows whose cells beyond the last column were left out.
    """

    columns: tuple[Column, ...]
    row_count: int
    delimiter: str
    has_header: bool
    short_rows: int = 0
    long_rows: int = 0

    @property
    def numeric(self) -> list[Column]:
        """The numeric columns."""
        return [column for column in self.columns if column.kind == "number"]


def read_table(text: str) -> Table:
    """Read CSV text: the delimiter, the header and the types of columns are found out.

    Raises:
        UnreadableTableError: There is no table in it, or it is beyond the limits.
    """
    text = text.removeprefix("\ufeff").strip("\r\n")
    if not text.strip():
        raise UnreadableTableError("The table is empty.", "Send a header row and rows of values.")
    delimiter = sniff_delimiter(text)
    rows = _rows(text, delimiter)
    width = Counter(len(row) for row in rows).most_common(1)[0][0]
    _check_shape(rows, width)
    has_header = _has_header(rows)
    body = rows[1:] if has_header else rows
    if not body:
        raise UnreadableTableError(
            "The table has a header and no rows.", "Send at least one row of values."
        )
    names = _unique_names(rows[0] if has_header else [], width)
    decimal_commas = delimiter == ";"
    columns = tuple(
        type_column(name, [row[index] if index < len(row) else "" for row in body], decimal_commas)
        for index, name in enumerate(names)
    )
    return Table(
        columns=columns,
        row_count=len(body),
        delimiter=_DELIMITER_NAMES[delimiter],
        has_header=has_header,
        short_rows=sum(len(row) < width for row in body),
        long_rows=sum(len(row) > width for row in body),
    )


def sniff_delimiter(text: str) -> str:
    """Give the delimiter that cuts the most lines into the same number of cells.

    A comma if nothing does: the text then has one column.
    """
    sample = "\n".join(text.splitlines()[:200])
    best, best_score = ",", (0.0, 0)
    for delimiter in _DELIMITERS:
        try:
            widths = [len(row) for row in csv.reader(io.StringIO(sample), delimiter=delimiter)]
        except csv.Error:
            continue
        width, count = Counter(width for width in widths if width).most_common(1)[0]
        score = (count / len(widths), width)
        if width > 1 and score > best_score:
            best, best_score = delimiter, score
    return best


def type_column(name: str, cells: Sequence[str], prefers_decimal_comma: bool = False) -> Column:
    """Find out what a column holds.

    Args:
        name: The column's name.
        cells: The text of its cells.
        prefers_decimal_comma: How to read 1,234: as 1.234 if true, as 1234 if not.
    """
    present = tuple(_present(cell) for cell in cells)
    values = [cell for cell in present if cell is not None]
    if not values:
        return Column(name, "empty", present)
    numbers, unreadable = _parse_numbers(present, prefers_decimal_comma)
    if len(values) - len(unreadable) >= max(1, _NUMERIC_SHARE * len(values)):
        return Column(name, "number", present, numbers, unreadable)
    if all(_is_date(value) for value in values):
        return Column(name, "date", present)
    return Column(name, "text", present)


def _rows(text: str, delimiter: str) -> list[list[str]]:
    try:
        rows = _parse(text, delimiter, is_strict=True)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UnreadableTableError(
                'A quotation mark (") is opened and not closed.',
                'Close every quoted cell; write "" for a quotation mark within one.',
            ) from error
        try:
            rows = _parse(text, delimiter, is_strict=False)
        except csv.Error as lenient_error:
            raise UnreadableTableError(
                f"The text cannot be read as CSV: {lenient_error}.",
                "Send plain CSV text.",
            ) from lenient_error
    if not rows:
        raise UnreadableTableError("The table is empty.", "Send a header row and rows of values.")
    return rows


def _parse(text: str, delimiter: str, *, is_strict: bool) -> list[list[str]]:
    rows = []
    cell_count = 0
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=is_strict
    )
    for row in reader:
        if any(cell.strip() for cell in row):
            rows.append(row)
            cell_count += len(row)
        if cell_count > MAX_CELLS:
            raise UnreadableTableError(
                f"The table has more than {MAX_CELLS:,} cells.", "Send fewer rows or columns."
            )
    return rows


def _check_shape(rows: Sequence[Sequence[str]], width: int) -> None:
    if width > MAX_COLUMNS:
        raise UnreadableTableError(
            f"The table has {width} columns; at most {MAX_COLUMNS} are read.",
            "Send the columns that matter.",
        )
    ragged = sum(len(row) != width for row in rows)
    if ragged > 0.2 * len(rows):
        raise UnreadableTableError(
            f"{ragged} of {len(rows)} rows do not have {width} cells, so this is no table.",
            "Use one delimiter throughout.",
            'Put cells that contain the delimiter in quotation marks (").',
        )


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the first row names the columns: it does if none of its cells is a number."""
    first = [_present(cell) for cell in rows[0]]
    return not any(cell is not None and _number(cell, _POINT) is not None for cell in first)


def _unique_names(header: Sequence[str], width: int) -> list[str]:
    names: list[str] = []
    taken: set[str] = set()
    for index in range(width):
        given = " ".join(header[index].split()) if index < len(header) else ""
        base = name = given or f"column {index + 1}"
        copy = 2
        while name in taken:
            name = f"{base} ({copy})"
            copy += 1
        taken.add(name)
        names.append(name)
    return names


def _present(cell: str) -> str | None:
    stripped = cell.strip()
    return None if stripped.lower() in _MISSING else stripped


def _parse_numbers(
    cells: Sequence[str | None], prefers_decimal_comma: bool
) -> tuple[tuple[float | None, ...], tuple[str, ...]]:
    """Read a column in the one notation that reads most of it."""
    notations = [(_POINT, _COMMA_GROUPS, ","), (_COMMA, _POINT_GROUPS, ".")]
    if prefers_decimal_comma:
        notations.reverse()
    best: tuple[tuple[float | None, ...], tuple[str, ...]] | None = None
    for plain, grouped, group_sign in notations:
        numbers = tuple(
            None if cell is None else _read_number(cell, plain, grouped, group_sign)
            for cell in cells
        )
        unreadable = tuple(
            cell
            for cell, number in zip(cells, numbers, strict=True)
            if cell is not None and number is None
        )
        if best is None or len(unreadable) < len(best[1]):
            best = (numbers, unreadable)
    return best or ((), ())


def _read_number(
    cell: str, plain: re.Pattern[str], grouped: re.Pattern[str], group_sign: str
) -> float | None:
    if grouped.match(cell):
        return _finite(cell.replace(group_sign, "").replace(",", "."))
    return _number(cell, plain)


def _number(cell: str, plain: re.Pattern[str]) -> float | None:
    return _finite(cell.replace(",", ".")) if plain.match(cell) else None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) and abs(value) <= _LARGEST else None


def _is_date(cell: str) -> bool:
    for parse in (date.fromisoformat, datetime.fromisoformat):
        try:
            parse(cell)
        except ValueError:
            continue
        return True
    return False
