"""Log lines: one form for everything, and no secrets in tracebacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from relay.cli.logs import configure_logging
from relay.config import load_settings


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = ("uvicorn.access", "websockets", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers, root.level = handlers, level
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)
    structlog.reset_defaults()


def fail_with(token: str) -> None:
    raise OSError(f"no token of {len(token)} characters")


@pytest.mark.parametrize("form", ["json", "console"])
def test_traceback_shows_no_local_variables(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(load_settings(env_file=None, log_format=form))
    try:
        fail_with("ey" + "SECRET" * 3)
    except OSError:
        structlog.get_logger("relay.test").exception("it_failed")
    written = capsys.readouterr().err
    assert "it_failed" in written
    assert "fail_with" in written
    assert "SECRETSECRET" not in written


def test_json_lines_of_ours_and_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(load_settings(env_file=None, log_format="json"))
    structlog.get_logger("relay.test").info("ours", port=1)
    logging.getLogger("library").warning("theirs %s", 2)
    logging.getLogger("library").debug("not wanted")
    ours, theirs = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["port"], ours["level"]) == ("ours", 1, "info")
    assert (theirs["event"], theirs["level"]) == ("theirs 2", "warning")
    assert ours["timestamp"].endswith("Z")


def test_level_is_respected(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(load_settings(env_file=None, log_format="json", log_level="error"))
    structlog.get_logger("relay.test").warning("quiet")
    structlog.get_logger("relay.test").error("loud")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["loud"]
