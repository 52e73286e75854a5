"""Finds out what a message asks the data agent to do, and reads files of its folder."""

from __future__ import annotations

import csv
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_table import UnreadableTableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIN_RESAMPLES = 20
MAX_RESAMPLES = 1_000_000
MAX_FILE_BYTES = 8 * 1024 * 1024
_SUFFIXES = (".csv", ".tsv")

_FENCED = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<body>.*?)\n?[ \t]*(?:(?P=fence)[`~]*[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_QUOTED_PATH = re.compile(r"[`\"'](?P<path>[^`\"'\n]+\.(?:csv|tsv))[`\"']", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w./\\~-])(?P<path>[\w./\\~-]*\.(?:csv|tsv))\b", re.IGNORECASE)
_NUMBER_CELL = re.compile(r"(?:^|[,;\t|])\s*[\"']?[+-]?\d[\d.]*[\"']?\s*(?:[,;\t|]|$)", re.ASCII)
_RESAMPLES = re.compile(r"\bresamples\s*[=:]\s*(?P<number>[^\s,;]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DataRequest:
    """What a message asks for.

    Attributes:
        question: The message without its table.
        csv_text: The table in the message; None if it names a file instead.
        file: The file that it names; None if it brings a table.
        resamples: The wanted number of resamples; None leaves it to the agent.
    """

    question: str
    csv_text: str | None
    file: str | None
    resamples: int | None


def parse_request(
    content: str, metadata: Mapping[str, object], files: Sequence[str]
) -> DataRequest:
    """Find the table or the file in a message.

    A code block wins over a file in the metadata (``file``), that over a table in the
    text, that over a file named in the text.

    Args:
        content: The message.
        metadata: Its options: ``file`` and ``resamples``.
        files: The files that could be named; only for guidance.

    Raises:
        UnreadableTableError: There is neither, or an option makes no sense.
    """
    resamples = _resamples(content, metadata)
    if fenced := _FENCED.search(content):
        question = content[: fenced.start()] + content[fenced.end() :]
        return DataRequest(question, fenced.group("body"), None, resamples)
    file = metadata.get("file")
    if file is not None:
        if not isinstance(file, str):
            raise UnreadableTableError("The option “file” must be a text.", *_guidance(files))
        return DataRequest(content, None, file, resamples)
    lines = content.splitlines()
    first, last = find_table_lines(lines)
    named = _QUOTED_PATH.search(content) or _PATH.search(content)
    # Prose with commas may look like a table; where it names a file, numbers decide.
    if last > first and (not named or _has_number(lines[first + 1 : last])):
        prose = "\n".join(lines[:first] + lines[last:])
        return DataRequest(prose, "\n".join(lines[first:last]), None, resamples)
    if named:
        return DataRequest(content, None, named.group("path").strip(), resamples)
    raise UnreadableTableError("There is no table in the message.", *_guidance(files))


def find_table_lines(lines: Sequence[str]) -> tuple[int, int]:
    """Give the range [first, last) of the first lines that look like CSV; (0, 0) if none do.

    A table starts where two lines in a row have the same number of the same delimiter,
    or at a word above numbers, and ends at an empty line.
    """
    for first in range(len(lines) - 1):
        if _starts_table(lines[first], lines[first + 1]) or _is_number_list(lines, first):
            last = first
            while last < len(lines) and lines[last].strip():
                last += 1
            return first, last
    return 0, 0


def list_files(folder: Path) -> list[str]:
    """Give the names of the tables in ``folder``, sorted; empty if it does not exist."""
    if not folder.is_dir():
        return []
    root = folder.resolve()
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and path.is_file()
        and path.resolve().is_relative_to(root)
    )


def read_file(folder: Path, name: str) -> str:
    """Read a table below ``folder``.

    Raises:
        UnreadableTableError: ``name`` leads out of the folder, by its parts or by a
            link, or is no readable table.
    """
    path = _locate(folder, name)
    # O_NONBLOCK: opening a pipe must not wait for its writer. O_NOFOLLOW: the path
    # is resolved, so a link in its place was put there since.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _no_such_file(folder, name) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _no_such_file(folder, name)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE_BYTES:
        raise UnreadableTableError(
            f"The file is larger than {MAX_FILE_BYTES // 1024 // 1024} MiB.", "Use a smaller one."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableTableError(
            "The file is not UTF-8 text.", "Save it as CSV with the encoding UTF-8."
        ) from error


def _locate(folder: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    is_safe = (
        name.isprintable()
        and "\\" not in name
        and not name.startswith("~")
        and not pure.is_absolute()
        and ".." not in pure.parts
    )
    if not is_safe:
        raise UnreadableTableError(
            "Only files below the data folder can be read.", *_guidance(list_files(folder))
        )
    if pure.suffix.lower() not in _SUFFIXES:
        raise UnreadableTableError(
            "Only .csv and .tsv files can be read.", *_guidance(list_files(folder))
        )
    try:
        root = folder.resolve(strict=True)
        path = (root / pure).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise _no_such_file(folder, name) from error
    if not path.is_relative_to(root):
        raise UnreadableTableError(
            "Only files below the data folder can be read.", *_guidance(list_files(folder))
        )
    return path


def _no_such_file(folder: Path, name: str) -> UnreadableTableError:
    return UnreadableTableError(
        f"There is no table “{name[:100]}” in the data folder.", *_guidance(list_files(folder))
    )


def _guidance(files: Sequence[str]) -> list[str]:
    guidance = ["Paste CSV text, for example in a code block, with a header row."]
    if files:
        shown = ", ".join(files[:10])
        guidance.insert(0, f"Name a file of the data folder: {shown}.")
    return guidance


def _resamples(content: str, metadata: Mapping[str, object]) -> int | None:
    wanted: Any = metadata.get("resamples")
    if wanted is None:
        match = _RESAMPLES.search(content)
        if match is None:
            return None
        wanted = match.group("number").replace("_", "").rstrip(".!?")
    if isinstance(wanted, str) and re.fullmatch(r"\d{1,9}", wanted, re.ASCII):
        wanted = int(wanted)
    is_number = isinstance(wanted, int) and not isinstance(wanted, bool)
    if not is_number or not MIN_RESAMPLES <= wanted <= MAX_RESAMPLES:
        raise UnreadableTableError(
            "The option “resamples” must be a whole number from "
            f"{MIN_RESAMPLES} to {MAX_RESAMPLES:,}.",
            "For example: resamples=2000. Leave it out for as many as a few seconds allow.",
        )
    return int(wanted)


def _starts_table(line: str, following: str) -> bool:
    return any(
        1 < _cell_count(line, delimiter) == _cell_count(following, delimiter)
        for delimiter in ",;\t|"
    )


def _cell_count(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:  # a cell beyond the reader's limit
        return 0


def _has_number(lines: Sequence[str]) -> bool:
    return any(_NUMBER_CELL.search(line) for line in lines)


def _is_number_list(lines: Sequence[str], first: int) -> bool:
    below = lines[first + 1 : first + 3]
    return len(below) == 2 and all(
        re.fullmatch(r"\s*[+-]?\d+(?:[.,]\d+)?\s*", line, re.ASCII) for line in below
    )
