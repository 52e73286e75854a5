from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from data_request import (
    MAX_FILE_BYTES,
    MIN_RESAMPLES,
    find_table_lines,
    list_files,
    parse_request,
    read_file,
)
from data_table import UnreadableTableError
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

FILES = ["bikes.csv"]


def test_a_code_block_is_the_table() -> None:
    request = parse_request("Look:\n```csv\na,b\n1,2\n```\nat a and b in x.csv", {}, FILES)
    assert request.csv_text == "a,b\n1,2"
    assert "at a and b" in request.question
    assert request.file is None


def test_an_unclosed_code_block_reaches_to_the_end() -> None:
    assert parse_request("```\na,b\n1,2", {}, FILES).csv_text == "a,b\n1,2"


def test_a_table_in_the_text_is_found_between_sentences() -> None:
    request = parse_request("What do you think?\na;b\n1;2\n3;4\n\nThanks!", {}, FILES)
    assert request.csv_text == "a;b\n1;2\n3;4"
    assert request.question == "What do you think?\n\nThanks!"


def test_a_list_of_numbers_is_a_table() -> None:
    assert parse_request("height\n1.8\n1.7\n1.9", {}, FILES).csv_text == "height\n1.8\n1.7\n1.9"


def test_a_named_file_wins_over_prose_with_commas() -> None:
    request = parse_request("Please, look at bikes.csv\nand tell me, quickly", {}, FILES)
    assert (request.file, request.csv_text) == ("bikes.csv", None)


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ("analyse deep/er/bikes.csv.", "deep/er/bikes.csv"),
        ("analyse `my bikes.csv` now", "my bikes.csv"),
        ("../../etc/passwd.csv", "../../etc/passwd.csv"),
        ("/etc/hosts.csv", "/etc/hosts.csv"),
        ("BIKES.TSV", "BIKES.TSV"),
    ],
)
def test_files_are_found_in_the_text(content: str, file: str) -> None:
    assert parse_request(content, {}, FILES).file == file


def test_a_file_can_be_given_as_an_option() -> None:
    assert parse_request("compare a and b", {"file": "bikes.csv"}, FILES).file == "bikes.csv"
    with pytest.raises(UnreadableTableError, match="must be a text"):
        parse_request("x", {"file": 5}, FILES)


def test_without_a_table_the_files_are_offered() -> None:
    with pytest.raises(UnreadableTableError, match="no table in the message") as caught:
        parse_request("hello", {}, FILES)
    assert any("bikes.csv" in suggestion for suggestion in caught.value.suggestions)


@pytest.mark.parametrize(
    ("content", "metadata", "resamples"),
    [
        ("bikes.csv", {}, None),
        ("bikes.csv resamples=500", {}, 500),
        ("bikes.csv, Resamples: 1_000.", {}, 1_000),
        ("bikes.csv resamples=500", {"resamples": 40}, 40),
        ("bikes.csv", {"resamples": "40"}, 40),
    ],
)
def test_resamples_can_be_chosen(
    content: str, metadata: dict[str, object], resamples: int | None
) -> None:
    assert parse_request(content, metadata, FILES).resamples == resamples


@pytest.mark.parametrize(
    "wanted", [True, 1.5, -1, MIN_RESAMPLES - 1, 10**7, "many", [], "9" * 5_000]
)
def test_resamples_that_make_no_sense_are_refused(wanted: object) -> None:
    with pytest.raises(UnreadableTableError, match="whole number"):
        parse_request("bikes.csv", {"resamples": wanted}, FILES)
    if isinstance(wanted, str):
        with pytest.raises(UnreadableTableError, match="whole number"):
            parse_request(f"bikes.csv resamples={wanted}", {}, FILES)


@given(st.text())
def test_any_message_is_understood_or_refused(content: str) -> None:
    try:
        request = parse_request(content, {}, FILES)
    except UnreadableTableError:
        return
    assert (request.csv_text is None) != (request.file is None)


@given(st.lists(st.text(max_size=10)))
def test_the_lines_of_a_table_are_lines_of_the_message(lines: list[str]) -> None:
    first, last = find_table_lines(lines)
    assert 0 <= first <= last <= len(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "bikes.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (folder / "deep" / "more.TSV").write_text("a\tb\n", encoding="utf-8-sig")
    (folder / "notes.txt").write_text("secret", encoding="utf-8")
    (tmp_path / "outside.csv").write_text("secret,x\n1,2\n", encoding="utf-8")
    return folder


def test_files_of_the_folder_are_read(folder: Path) -> None:
    assert read_file(folder, "bikes.csv") == "a,b\n1,2\n"
    assert read_file(folder, "deep/more.TSV") == "a\tb\n"
    assert list_files(folder) == ["bikes.csv", "deep/more.TSV"]
    assert list_files(folder / "nowhere") == []


@pytest.mark.parametrize(
    "name",
    [
        "../outside.csv",
        "deep/../../outside.csv",
        "deep/..",
        "/etc/hosts.csv",
        "~/x.csv",
        "..\\outside.csv",
        "bikes.csv\0.csv",
        "nowhere.csv",
        "notes.txt",
        "deep",
        "",
        ".",
        "x" * 5_000 + ".csv",
        "bikes.csv/x.csv",
    ],
)
def test_other_paths_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(UnreadableTableError) as caught:
        read_file(folder, name)
    assert "bikes.csv" in " ".join(caught.value.suggestions)
    assert str(folder) not in caught.value.problem


def test_links_may_not_leave_the_folder(folder: Path) -> None:
    (folder / "inside.csv").symlink_to(folder / "bikes.csv")
    (folder / "out.csv").symlink_to(folder.parent / "outside.csv")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    assert read_file(folder, "inside.csv") == "a,b\n1,2\n"
    for name in ("out.csv", "up/outside.csv", "loop.csv"):
        with pytest.raises(UnreadableTableError):
            read_file(folder, name)
    assert list_files(folder) == ["bikes.csv", "deep/more.TSV", "inside.csv"]


def test_a_link_out_of_a_folder_that_is_a_link_itself(folder: Path) -> None:
    alias = folder.parent / "alias"
    alias.symlink_to(folder)
    assert read_file(alias, "bikes.csv") == "a,b\n1,2\n"


def test_what_is_no_file_is_refused_without_waiting(folder: Path) -> None:
    os.mkfifo(folder / "pipe.csv")
    (folder / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv"):
        with pytest.raises(UnreadableTableError, match="There is no table"):
            read_file(folder, name)


def test_too_large_and_undecodable_files_are_refused(folder: Path) -> None:
    (folder / "large.csv").write_bytes(b"1,2\n" * (MAX_FILE_BYTES // 4 + 1))
    (folder / "latin.csv").write_bytes("café,1\n".encode("latin-1"))
    with pytest.raises(UnreadableTableError, match="larger than 8 MiB"):
        read_file(folder, "large.csv")
    with pytest.raises(UnreadableTableError, match="UTF-8"):
        read_file(folder, "latin.csv")
