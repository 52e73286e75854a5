"""Figures of the fault rounds, collected for the table in benchmarks/RESULTS.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_FIGURES = pytest.StashKey[dict[str, dict[str, Any]]]()

Report = Callable[..., None]


@pytest.fixture
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Keep figures under the test's name, ``report(p99_ms=12.5)``; also in ``faults.json``."""
    figures = request.config.stash.setdefault(_FIGURES, {})
    path: Path = tmp_path_factory.getbasetemp() / "faults.json"

    def keep(**values: Any) -> None:
        rounded = {
            name: round(value, 1) if isinstance(value, float) else value
            for name, value in values.items()
        }
        figures.setdefault(request.node.name, {}).update(rounded)
        path.write_text(json.dumps(figures, indent=1))

    return keep


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what was measured, a line for each test."""
    figures = config.stash.get(_FIGURES, {})
    if figures:
        terminalreporter.section("measured")
    for name, values in figures.items():
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        terminalreporter.write_line(f"{name}: {shown}")
