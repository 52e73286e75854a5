"""A named step of a run: what happens within the block belongs to it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from agent_worker.run import Run


class Step:
    """A step, announced as a numbered thought when its block begins.

    Attributes:
        name: What it is called, for people.
        number: Its number in the run, from 1, once the block has begun.
    """

    def __init__(self, run: Run, name: str, number: int, total_steps: int | None) -> None:
        self.name = name
        self.number = number
        self._run = run
        self._total_steps = total_steps

    async def begin(self) -> None:
        """Announce the step."""
        await self._run.thinking(self.name, step=self.number, total_steps=self._total_steps)

    async def __aenter__(self) -> Self:
        await self.begin()
        return self

    async def __aexit__(
        self,
        _exc_type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """End the block; the next step, or the run's end, tells the user."""
