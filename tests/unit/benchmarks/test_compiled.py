"""Where the relay's compiled wheel is, and what runs from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import compiled_relay, environment
from benchmarks.processes import ROOT


def test_without_a_compiler_the_source_is_measured_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    assert compiled_relay(said.append) is None
    assert said == ["no C compiler: the relay is measured as its source"]
    assert environment(None) == {}


def test_what_lies_in_the_folder_comes_before_the_source(tmp_path: Path) -> None:
    (tmp_path / "relay").mkdir()
    (tmp_path / "relay" / "__init__.py").touch()
    where = "import relay, benchmarks; print(relay.__file__, benchmarks.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where],
        cwd=ROOT,
        env={**os.environ, **environment(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        str(tmp_path / "relay" / "__init__.py"),
        str(ROOT / "benchmarks" / "__init__.py"),
    ]
