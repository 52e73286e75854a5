from __future__ import annotations

import re

import pytest
from data_report import (
    Findings,
    Resampling,
    compose_report,
    format_number,
    mentioned_columns,
)
from data_statistics import (
    Bootstrap,
    correlations,
    find_outliers,
    holds_years,
    summarize_numbers,
    summarize_text,
)
from data_table import UnreadableTableError, read_table
from hypothesis import given
from hypothesis import strategies as st


def report(text: str, *mentioned: str) -> str:
    table = read_table(text)
    outliers = [found for column in table.numeric if (found := find_outliers(column))]
    resampling = None
    if table.numeric:
        bootstrap = Bootstrap({column.name: column.values for column in table.numeric}, 20, 1)
        bootstrap.advance(20)
        resampling = Resampling(tuple(bootstrap.intervals(0.95)), 0.95, 20, 1)
    return compose_report(
        Findings(
            title="t.csv",
            table=table,
            numbers=tuple(summarize_numbers(column) for column in table.numeric),
            texts=tuple(summarize_text(c) for c in table.columns if c.kind != "number"),
            outliers=tuple(outliers),
            correlations=tuple(correlations(table.numeric)),
            resampling=resampling,
            mentioned=mentioned,
        )
    )


def test_the_report_states_what_was_computed() -> None:
    rows = "\n".join(f"{number},{number * 2},{'x' if number % 2 else 'y'}" for number in range(9))
    text = report(f"a,b,kind\n{rows}\n100,,z\n")
    assert text.startswith("## t.csv: 10 rows, 3 columns\n")
    assert "**a** and **b** have a very strong positive correlation (r = +1.00 over 9 rows)" in text
    assert "- 1 cell missing, most in **b** (1 of 10)." in text
    assert "1 outlier in **a**, the farthest 100 in row 10." in text
    assert "| kind | text | 10 | 0 | 3 | y (5), x (4), z (1) |" in text
    assert "20 resamples of each column, seed 1" in text


def test_years_are_written_as_years_and_quantities_as_quantities() -> None:
    rows = "\n".join(f"{2019 + number % 5},{2019 + number},{4000 + number}" for number in range(9))
    text = report(f"year,sold,price\n{rows}\n1850,2020,9000\n")
    [mean, spread] = [line for line in text.splitlines() if line.startswith("| year |")]
    assert "2,0" not in mean + spread
    assert spread.startswith("| year | 1850 | 2019.2 | 2020.5 | 2021.8 | 2023 |")
    assert "outside 2015.5 to 2025.5: 1850 (row 10)" in text
    assert "| sold | 2019 |" in text
    assert "| price | 4,000 |" in text


@pytest.mark.parametrize(
    ("name", "values", "is_year"),
    [
        ("birth_year", [1066.0, 2024.0], True),
        ("Years", [1999.0], True),
        ("season", [1990.0, 2024.0], True),
        ("weight", [1066.0, 2024.0], False),
        ("yearly_cost", [1500.0, 2500.0], False),
        ("year", [1999.5, 2000.0], False),
        ("years", [3.0, 2000.0], False),
    ],
)
def test_years_are_known_by_name_or_by_range(name: str, values: list[float], is_year: bool) -> None:
    assert holds_years(name, values) is is_year


def test_pairs_that_the_question_names_come_first() -> None:
    text = report("a,b,c\n1,1,5\n2,2,1\n3,3,7\n4,4,2\n", "a", "c")
    assert text.index("| a and c |") < text.index("| a and b |")
    assert "**a** and **c** have a" in text


def test_columns_are_recognised_however_they_are_spelled() -> None:
    names = ["temperature_c", "hires", "Wind km/h"]
    assert mentioned_columns("Temperature C vs. HIRES?", names) == ["temperature_c", "hires"]
    assert mentioned_columns("is the wind (km h) strong", names) == ["Wind km/h"]
    assert mentioned_columns("hiresome", names) == []


def test_a_table_without_numbers_says_so() -> None:
    text = report("a,b\nx,y\nz,w\n")
    assert "No column is numeric" in text
    assert "### Correlations" not in text


def test_guesses_and_repairs_are_admitted() -> None:
    rows = "\n".join(f"{number},{number}" for number in range(12))
    text = report(f"{rows}\noops,1\n5\n6,7,8\n")
    assert "was read as data" in text
    assert "1 row had too few cells" in text
    assert "“oops”" in text


def test_cells_can_not_break_out_of_the_markdown() -> None:
    text = report('"a|b","<i>*x*</i>"\n"one|two\nthree",`y`\n"one|two\nthree",`y`\n')
    assert r"a\|b" in text
    assert r"\<i\>\*x\*\</i\>" in text
    assert r"one\|two three (2)" in text


@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), min_size=2, max_size=6))
def test_every_table_of_every_report_has_equally_many_cells(rows: list[list[str]]) -> None:
    quoted = ['"' + '","'.join(cell.replace('"', '""') for cell in row) + '"' for row in rows]
    try:
        text = report("\n".join(quoted))
    except UnreadableTableError:
        return
    for block in text.split("\n\n"):
        if block.startswith("|"):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.split("\n")}
            assert len(widths) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (-12345.0, "-12,345"),
        (12345.678, "12,345.7"),
        (2.345, "2.35"),
        (0.012345, "0.0123"),
        (0.00001, "1.000e-05"),
        (5e12, "5.000e+12"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert format_number(value) == text
