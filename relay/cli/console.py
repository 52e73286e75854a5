"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from relay.config import UnknownVariable

_THEME = Theme(
    {
        "good": "green",
        "bad": "bold red",
        "care": "yellow",
        "quiet": "dim",
        "name": "bold cyan",
        "link": "underline",
    }
)

out = Console(theme=_THEME, highlight=False)
err = Console(theme=_THEME, highlight=False, stderr=True)

show_tracebacks = False
"""Set by ``relay --debug``."""


def print_error(message: str) -> None:
    """Say what went wrong and what to do about it."""
    err.print(Text.assemble(("Error: ", "bad"), message), soft_wrap=True)


def print_warning(message: str) -> None:
    """Say what will probably not work as meant."""
    err.print(Text.assemble(("Warning: ", "care"), message), soft_wrap=True)


def print_advice(suggestions: Sequence[str], retry_after_ms: int | None) -> None:
    """Say what can be done about an error, below it."""
    for suggestion in suggestions:
        err.print(Text.assemble(("→ ", "name"), suggestion), soft_wrap=True)
    if retry_after_ms is not None:
        wait_s = -(-retry_after_ms // 1000)
        err.print(Text.assemble(("→ ", "name"), f"Wait {wait_s} s before the next try."))


def warn_of_unknown(variables: list[UnknownVariable]) -> None:
    """Name variables that no setting reads."""
    for variable in variables:
        print_warning(str(variable))
