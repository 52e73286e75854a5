"""What relay up leaves in its folder for the other commands."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from relay.cli.local import (
    DataFolder,
    RunningStack,
    default_folder,
    gateway_addresses,
    mint,
    signing_secret,
)
from relay.config import load_settings
from relay.errors import ConfigurationError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("RELAY_"):
            monkeypatch.delenv(name)
    return tmp_path


def stack(pid: int) -> RunningStack:
    return RunningStack(pid, ["http://127.0.0.1:1"], "unix:///s", "relay")


def test_secret_is_made_once_for_its_owner_only(here: Path) -> None:
    folder = default_folder()
    assert folder.path == here / ".relay"
    folder.create()
    assert folder.secret() is None
    secret = folder.ensure_secret()
    assert len(secret.encode()) >= 32
    assert DataFolder(folder.path).ensure_secret() == secret
    assert stat.S_IMODE((folder.path / "jwt-secret").stat().st_mode) == 0o600
    assert (folder.path / ".gitignore").read_text() == "*\n"


def test_running_stack_is_found_until_it_is_gone(here: Path) -> None:
    folder = default_folder()
    folder.create()
    assert folder.running() is None
    folder.announce(stack(os.getpid()))
    assert folder.running() == stack(os.getpid())
    assert gateway_addresses(load_settings(), None) == ["http://127.0.0.1:1"]
    folder.withdraw()
    assert folder.running() is None
    assert gateway_addresses(load_settings(), None) == ["http://127.0.0.1:8080"]


def test_note_of_a_killed_stack_is_not_believed(here: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = default_folder()
    folder.create()
    folder.announce(stack(ended.pid))
    assert folder.running() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "null"])
def test_broken_note_is_no_stack(here: Path, text: str) -> None:
    folder = default_folder()
    folder.create()
    (folder.path / "running.json").write_text(text)
    assert folder.running() is None


def test_address_is_what_was_asked_for(here: Path) -> None:
    folder = default_folder()
    folder.create()
    folder.announce(stack(os.getpid()))
    assert gateway_addresses(load_settings(), "http://h") == ["http://h"]
    assert gateway_addresses(load_settings(port=9, host="0.0.0.0"), None) == ["http://127.0.0.1:9"]
    assert gateway_addresses(load_settings(port=9, host="::1"), None) == ["http://[::1]:9"]


def test_configured_secret_signs_before_the_folders(here: Path) -> None:
    folder = default_folder()
    folder.create()
    made = folder.ensure_secret()
    assert signing_secret(load_settings()) == made
    assert signing_secret(load_settings(jwt_secret="a" * 32 + "," + "b" * 32)) == "a" * 32


def test_without_any_secret_the_remedy_is_named(here: Path) -> None:
    with pytest.raises(ConfigurationError, match="RELAY_JWT_SECRET"):
        signing_secret(load_settings())


def test_user_that_cannot_be_one_is_named(here: Path) -> None:
    with pytest.raises(ConfigurationError, match="--user '' is not allowed"):
        mint(load_settings(jwt_secret="a" * 32), "", 60)


def test_folder_below_a_file_is_named(here: Path) -> None:
    (here / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--data-dir"):
        DataFolder(here / "file" / "data").create()


def test_read_only_folder_leads_to_the_users_state(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever runs the tests as root may write everywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    assert default_folder().path == here / "state" / "agent-relay"
