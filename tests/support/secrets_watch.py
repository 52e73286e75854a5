"""No secret in anything that the suite logged: looked for once, when the session ends.

Tokens and passwords in addresses are known by their form, so whatever a test mints is found without
being told of; secrets without a form are found where ``remember`` was told of them. What is
searched: the logs of all processes that tests started, and all output that pytest captured.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.acl import ROLES, password_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FORMS = {
    # Three parts, the first two of which are JSON objects (RFC 7519).
    "a token": re.compile(r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}"),
    "a password in an address": re.compile(
        r"(?:redis|valkey)s?://[^\s/:@'\"]*:(?!\*\*\*@)[^\s/@]+@"
    ),
    "a ticket": re.compile(r"[?&]ticket=[\w-]{43}"),
}
# What `relay up` and `relay token` print on purpose, for the person who runs them.
_LINK = re.compile(r"#token=\S+")

_OUTPUT = "secrets_in_logs"

_known: dict[str, str] = {password_of(role): f"the password of {role}" for role in ROLES}


def remember(secret: str, what: str) -> str:
    """Look for this secret too; gives it back."""
    _known[secret] = what
    return secret


def find_secrets(text: str) -> list[str]:
    """Name the secrets in a text, each with its surroundings."""
    text = _LINK.sub("#token=", text)
    found = [
        f"{what}: …{_around(text, match.start(), match.end())}…"
        for what, form in _FORMS.items()
        for match in form.finditer(text)
    ]
    for secret, what in _known.items():
        if (at := text.find(secret)) >= 0:
            found.append(f"{what}: …{_around(text, at, at + len(secret))}…")
    return found


def _around(text: str, start: int, end: int) -> str:
    # Not the secret itself: this goes into a log as well.
    return f"{text[max(0, start - 60) : start]}<{end - start} characters>{text[end : end + 20]}"


class SecretsWatch:
    """The part of pytest that fails a session which logged a secret."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # A dictionary for its order: each phase of a test shows what the ones before it have.
        self._found: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Search what was captured in one phase of a test."""
        # A traceback, which failures have beside it, shows the test's own values on purpose.
        for title, text in report.sections:
            self._note(f"{report.nodeid}, {title}", text)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Search the logs, and fail the session if there was anything."""
        for path in self._logs():
            self._note(str(path), path.read_text(errors="replace"))
        if self._found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        # One of several processes that run tests side by side: only it knows what its tests told it
        # to remember, and only the one that started it is asked for the outcome.
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[_OUTPUT] = list(self._found)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a process that ran some of the tests has found."""
        # One that crashed has said nothing.
        self._found |= dict.fromkeys(getattr(node, "workeroutput", {}).get(_OUTPUT, ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was found."""
        if self._found:
            terminalreporter.section("secrets in logs", red=True)
            for line in list(self._found)[:20]:
                terminalreporter.write_line(line)

    def _logs(self) -> Iterator[Path]:
        # The factory of tmp_path; it is made by pytest before any test.
        base: Path = self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        return (path for path in base.rglob("*") if _is_log(path))

    def _note(self, where: str, text: str) -> None:
        self._found |= dict.fromkeys(f"{where}: {each}" for each in find_secrets(text))


def _is_log(path: Path) -> bool:
    is_output = path.suffix == ".log" or path.name.startswith("up-")
    return is_output and path.is_file() and not path.is_symlink()
