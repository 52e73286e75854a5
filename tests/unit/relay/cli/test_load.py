"""Finding the worker that the command line names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agent_worker import Worker
from relay.cli.load import load_worker
from relay.errors import ConfigurationError

MODULES = {
    "fine_agents.py": "from agent_worker import Worker\nworker = Worker(name='fine')\n",
    "broken_agents.py": "x = 1\ndef broken(:\n",
    "needy_agents.py": "import not_installed_anywhere\n",
    "failing_agents.py": "def fail():\n    raise OSError('disk')\n\nfail()\n",
    "misnamed_agents.py": "from agent_worker import Worker\nwrker = Worker()\nnumber = 3\n",
    "empty_agents.py": "",
    "packed_agents/__init__.py": "",
    "packed_agents/inner.py": (
        "from agent_worker import Worker\nclass Box:\n    worker = Worker()\n"
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        monkeypatch.delitem(sys.modules, name.partition(".")[0].partition("/")[0], raising=False)
    return tmp_path


def test_worker_is_found_in_the_folder(folder: Path) -> None:
    assert load_worker("fine_agents:worker", folder).name == "fine"


def test_worker_is_found_in_packages_and_objects(folder: Path) -> None:
    assert isinstance(load_worker("packed_agents.inner:Box.worker", folder), Worker)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("fine_agents", ["MODULE:ATTR"]),
        (":worker", ["MODULE:ATTR"]),
        ("fine_agents:", ["MODULE:ATTR"]),
        ("fine_agents.py:worker", ["is a file", "fine_agents:worker"]),
        ("no_such_agents:worker", ["no module 'no_such_agents'", "--app-dir"]),
        ("packed_agents.none:worker", ["no module 'packed_agents.none'"]),
        ("broken_agents:worker", ["syntax error", "broken_agents.py, line 2", "def broken(:"]),
        ("needy_agents:worker", ["'not_installed_anywhere'", "needy_agents.py, line 1"]),
        ("failing_agents:worker", ["OSError: disk", "failing_agents.py, line 2"]),
        ("misnamed_agents:worker", ["no 'worker'", "misnamed_agents:wrker"]),
        ("misnamed_agents:number", ["is not a Worker but an int"]),
        ("empty_agents:worker", ["no Worker at all"]),
    ],
)
def test_what_is_wrong_is_named(folder: Path, reference: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_worker(reference, folder)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--app-dir does not exist"):
        load_worker("fine_agents:worker", tmp_path / "none")
