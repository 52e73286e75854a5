"""Showing a run as it happens: live on a terminal, plainly everywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from relay.cli import console
from relay.cli.story import Say, Write, printable


class View(Protocol):
    """Somewhere to show a run. A context manager."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave what was shown in a readable state."""

    def show(self, line: Say | Write) -> None:
        """Add a line about what happens, or a piece of the answer."""

    def wait_on(self, status: str) -> None:
        """Show what is going on."""

    def pause(self) -> None:
        """Redraw nothing until ``resume``: somebody types."""

    def prompt(self, text: str) -> None:
        """Say what to type, and leave the cursor behind it."""

    def resume(self) -> None:
        """Nobody types any more."""


class LiveView:
    """The answer grows on the terminal, what runs spins below it.

    Whole lines are printed for good; only the unfinished line and the spinner are redrawn, so
    an answer of any length scrolls as it should.
    """

    def __init__(self, target: Console) -> None:
        self._console = target
        self._line = ""
        self._last: type[Say | Write] = Say
        self._spinner = Spinner("dots", style="name")
        self._live = self._new_live()

    def _new_live(self) -> Live:
        return Live(console=self._console, refresh_per_second=12.5, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finish_line()
        self._live.stop()

    def show(self, line: Say | Write) -> None:
        """Add a line about what happens, or a piece of the answer."""
        if type(line) is not self._last:
            # The answer stands apart from what is said about it.
            self._finish_line()
            self._console.print()
            self._last = type(line)
        if isinstance(line, Say):
            self._console.print(_styled(line))
            return
        *whole, self._line = (self._line + printable(line.text)).split("\n")
        # First the part below, which every print draws again: a line must not be seen twice.
        self._redraw()
        for text in whole:
            self._console.print(Text(text))

    def wait_on(self, status: str) -> None:
        """Show what is going on."""
        self._spinner.update(text=Text(printable(status), style="quiet"))
        self._redraw()

    def pause(self) -> None:
        """Take the spinner away until ``resume``: it would overwrite what is typed."""
        self._finish_line()
        self._live.stop()

    def prompt(self, text: str) -> None:
        """Say what to type, and leave the cursor behind it."""
        self._console.print(Text(text, style="care"), end="")

    def resume(self) -> None:
        """Show the spinner again."""
        # A new one: the old one remembers how many lines to go up, over what was typed since.
        self._live = self._new_live()
        self._live.start()
        self._redraw()

    def _finish_line(self) -> None:
        if self._line:
            text, self._line = self._line, ""
            self._redraw()
            self._console.print(Text(text))

    def _redraw(self) -> None:
        parts: list[RenderableType] = [Text(self._line)] if self._line else []
        self._live.update(Group(*parts, self._spinner))


class PlainView:
    """The answer goes to stdout as it comes, everything about it to stderr."""

    def __init__(self) -> None:
        self._is_within_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_within_line:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def show(self, line: Say | Write) -> None:
        """Add a line about what happens, or a piece of the answer."""
        if isinstance(line, Say):
            console.err.print(_styled(line), soft_wrap=True)
            return
        sys.stdout.write(line.text)
        sys.stdout.flush()
        self._is_within_line = not line.text.endswith("\n")

    def wait_on(self, status: str) -> None:
        """What is going on is told when it is over."""

    def pause(self) -> None:
        """Nothing is ever redrawn here."""

    def prompt(self, text: str) -> None:
        """Say what to type, and leave the cursor behind it."""
        console.err.print(Text(text, style="care"), end="")

    def resume(self) -> None:
        """Nothing is ever redrawn here."""


def view_for(target: Console) -> View:
    """Give the view that suits where the output goes."""
    return LiveView(target) if target.is_terminal else PlainView()


def _styled(line: Say) -> Text:
    return Text.assemble((line.mark, line.style), " ", (printable(line.text), "quiet"))
