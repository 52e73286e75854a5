"""The tables that say what is shown where name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = {"docs/seed-coverage.md": ROOT, "tests/README.md": ROOT / "tests"}
_NAMED = re.compile(r"`([a-z0-9_/]+/test_[a-z0-9_]+\.py|[a-z/]+\.test\.mjs)(?:::(\w+))?`")


def named_in(table: str) -> list[tuple[Path, str]]:
    """Give file and function of each test that a document names."""
    text = (ROOT / table).read_text()
    return [(TABLES[table] / path, function) for path, function in _NAMED.findall(text)]


def is_there(path: Path, function: str) -> bool:
    """Tell whether a file, and the test in it that is named, are there."""
    if not path.is_file():
        return False
    return not function or f"def {function}(" in path.read_text()


@pytest.mark.parametrize("table", TABLES)
def test_every_test_that_a_table_names_exists(table: str) -> None:
    named = named_in(table)
    assert len(named) > 20
    missing = [
        f"{path.relative_to(ROOT)}::{function}"
        for path, function in named
        if not is_there(path, function)
    ]
    assert not missing, "\n".join(missing)


def test_every_row_about_a_behaviour_names_a_test() -> None:
    rows = [
        line
        for line in (ROOT / "docs/seed-coverage.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| behaviour")
    ]
    assert len(rows) > 30
    assert not [row for row in rows if not _NAMED.search(row)]
