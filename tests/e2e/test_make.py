"""`make` on machines that lack something says in one sentence what to do."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with make and a shell only: the folder is all of PATH, and the project's copy."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh", "touch", "rm", "env"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run_make(machine: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "run"],
        cwd=machine,
        env={"PATH": str(machine / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def add_python(machine: Path, name: str, script: str) -> None:
    program = machine / "bin" / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_no_python(machine: Path) -> None:
    done = run_make(machine)
    assert done.returncode != 0
    assert "No Python 3.11 or newer was found" in done.stderr
    assert not (machine / ".venv").exists()


def test_only_an_old_python(machine: Path) -> None:
    # The version check is what the Makefile runs first; an old interpreter answers it with 1.
    add_python(machine, "python3", "exit 1")
    assert "No Python 3.11 or newer was found" in run_make(machine).stderr


def test_python_without_ensurepip(machine: Path) -> None:
    add_python(machine, "python3", 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac')
    done = run_make(machine)
    assert done.returncode != 0
    assert "python3 has no ensurepip module" in done.stderr
    assert "apt-get install python3-venv" in done.stderr


def test_a_name_with_nothing_behind_it_is_passed_over(machine: Path) -> None:
    # pyenv puts such names on PATH for versions that are not selected.
    add_python(machine, "python3.12", "echo 'command not found' >&2; exit 127")
    add_python(machine, "python3.11", 'case "$1" in -m) echo "made by 3.11"; exit 3;; esac; exit 0')
    assert "made by 3.11" in run_make(machine).stdout
