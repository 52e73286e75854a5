"""The threat model names the tests that prove it; a name that nobody answers to proves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
WITHOUT_A_TEST = {"listen to clients"}
"""Not the relay's: said in the document, with what does it instead."""


def test_many_tests_are_named() -> None:
    assert len(NAMED) > 50
    assert TEXT.count("::test_") == len(NAMED)


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_named_test_exists(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_every_threat_has_a_test() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.splitlines()
        if line.startswith("| ") and not line.startswith("| tries to")
    ]
    assert len(rows) > 25
    assert {row[0] for row in rows if "::test_" not in row[2]} == WITHOUT_A_TEST
