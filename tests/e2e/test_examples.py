"""The example project for test authors passes as it is printed, by its own configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/testing_your_agent"


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a project's tests as its owner does, on the kind of Redis that this session uses."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    if not entry_points(group="pytest11", name="relay"):
        command += ["-p", "relay.testing.plugin"]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_example_project_for_test_authors_passes() -> None:
    done = run_pytest(EXAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    assert "warning" not in done.stdout
