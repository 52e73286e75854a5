from __future__ import annotations

import math

import pytest
from data_table import UnreadableTableError, read_table, sniff_delimiter, type_column
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("delimiter", "name"),
    [(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "vertical bar")],
)
def test_the_delimiter_is_found_out(delimiter: str, name: str) -> None:
    lines = [["name", "age", "city"], ["Ann", "31", "Bern"], ["Bo", "42", "Graz"]]
    table = read_table("\n".join(delimiter.join(line) for line in lines))
    assert table.delimiter == name
    assert [column.kind for column in table.columns] == ["text", "number", "text"]
    assert table.columns[1].values == [31.0, 42.0]


def test_commas_in_quotes_do_not_count() -> None:
    table = read_table('a;b\n"1, 2, 3";4\n"5, 6, 7";8\n')
    assert table.columns[0].cells == ("1, 2, 3", "5, 6, 7")
    assert sniff_delimiter("no delimiter\nat all") == ","


def test_a_single_column_is_a_table() -> None:
    table = read_table("value\n1\n2\n4\n")
    assert [column.name for column in table.columns] == ["value"]
    assert table.columns[0].values == [1.0, 2.0, 4.0]


def test_a_first_row_with_numbers_is_data() -> None:
    table = read_table("1,2\n3,4\n")
    assert not table.has_header
    assert table.row_count == 2
    assert [column.name for column in table.columns] == ["column 1", "column 2"]


def test_names_are_made_unique() -> None:
    table = read_table("x,x,,x (2)\n1,2,3,4\n")
    assert [column.name for column in table.columns] == ["x", "x (2)", "column 3", "x (2) (2)"]


def test_missing_cells_are_recognised_in_their_usual_spellings() -> None:
    column = type_column("x", ["1", "", "NA", "n/a", "-", " null ", "NaN", "2"])
    assert column.kind == "number"
    assert column.values == [1.0, 2.0]
    assert column.unreadable == ()
    assert type_column("x", ["", "NA"]).kind == "empty"


def test_a_few_unreadable_cells_do_not_make_a_column_text() -> None:
    column = type_column("x", [str(number) for number in range(19)] + ["broken"])
    assert column.kind == "number"
    assert column.unreadable == ("broken",)
    assert column.numbers[-1] is None
    assert type_column("x", ["1", "2", "broken"]).kind == "text"


@pytest.mark.parametrize(
    ("cells", "decimal_comma", "numbers"),
    [
        (["1.5", "-2", "+3.25", ".5", "1e3"], False, [1.5, -2, 3.25, 0.5, 1000]),
        (["1,234", "12,345.6"], False, [1234, 12345.6]),
        (["1,234"], True, [1.234]),
        (["1,5", "2"], False, [1.5, 2]),
        (["1.234,5", "2,25"], True, [1234.5, 2.25]),
    ],
)
def test_numbers_are_read_as_people_write_them(
    cells: list[str], decimal_comma: bool, numbers: list[float]
) -> None:
    assert type_column("x", cells, decimal_comma).values == numbers


@pytest.mark.parametrize("cell", ["00417", "inf", "1e999", "1e200", "0x10", "1_000", "٣"])
def test_what_is_no_quantity_is_no_number(cell: str) -> None:
    assert type_column("x", [cell]).kind == "text"


def test_dates_are_told_from_text() -> None:
    assert type_column("x", ["2025-01-31", "2025-02-01T10:00:00"]).kind == "date"
    assert type_column("x", ["2025-13-31"]).kind == "text"


def test_ragged_rows_are_counted() -> None:
    rows = ["a,b"] + ["1,2"] * 10 + ["3", "4,5,6"]
    table = read_table("\n".join(rows))
    assert (table.short_rows, table.long_rows) == (1, 1)
    assert table.columns[1].numbers[-2:] == (None, 5.0)


def test_empty_lines_and_a_byte_order_mark_are_skipped() -> None:
    assert read_table("\ufeffa,b\n\n1,2\n , \n3,4\n").row_count == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n \n", "empty"),
        ("a,b\n", "no rows"),
        ('a,b\n"1,2\n3,4\n', "quotation mark"),
        ("a,b\n1\n2\n3,4\n5,6,7\n8,9", "do not have"),
        (",".join(["1"] * 101), "101 columns"),
        ("a\n" + "x" * 200_000, "cannot be read"),
    ],
)
def test_bad_tables_are_refused_with_guidance(text: str, problem: str) -> None:
    with pytest.raises(UnreadableTableError, match=problem) as caught:
        read_table(text)
    assert caught.value.suggestions


def test_a_table_beyond_the_limit_is_refused() -> None:
    with pytest.raises(UnreadableTableError, match="500,000 cells"):
        read_table("a,b\n" + "1,2\n" * 250_000)


def test_a_stray_quotation_mark_is_tolerated() -> None:
    assert read_table('a,b\n"x"y,1\nz,2\n').columns[0].cells == ("xy", "z")


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        table = read_table(text)
    except UnreadableTableError:
        return
    assert table.columns
    assert len({column.name for column in table.columns}) == len(table.columns)
    for column in table.columns:
        assert len(column.cells) == table.row_count
        assert all(math.isfinite(value) for value in column.values)


@given(st.lists(st.floats(min_value=-1e15, max_value=1e15), min_size=1))
def test_numbers_survive_being_written_and_read(values: list[float]) -> None:
    table = read_table("value\n" + "\n".join(repr(value) for value in values))
    assert table.columns[0].values == values
