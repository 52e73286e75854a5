"""One call of an agent's function, as a task that can be stopped for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

HURRIED_STEP_S = 0.2
"""What is left of each step's grace time once somebody is in a hurry."""


class AgentExited(Exception):
    """The agent called ``sys.exit``: that ends its run, not the worker with all other runs."""


class AgentCall:
    """Runs an agent's coroutine.

    An agent may catch a cancellation and go on. So it is cancelled twice (``stop``), and then
    ended where it waits (``abandon``).
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        self._coroutine = coroutine
        self._task = asyncio.create_task(_without_exit(coroutine), name=name)
        # An abandoned agent's exception is nobody's business any more.
        self._task.add_done_callback(_retrieve_exception)

    @property
    def task(self) -> asyncio.Task[Any]:
        """What to wait for."""
        return self._task

    @property
    def is_done(self) -> bool:
        """Whether the agent has returned or raised."""
        return self._task.done()

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> bool:
        """Cancel the agent, and once more at half of the grace time.

        Args:
            grace_s: How long the agent may take for its clean-up.
            hurry: Cuts the grace time to the fraction of a second when it is set.

        Returns:
            Whether the agent has ended.
        """
        for _ in range(2):
            self._task.cancel()
            await self._wait(grace_s / 2, hurry)
            if self._task.done():
                return True
        return False

    async def _wait(self, timeout_s: float, hurry: asyncio.Event) -> None:
        hurried = asyncio.create_task(hurry.wait())
        try:
            await asyncio.wait(
                {self._task, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            hurried.cancel()
        if hurry.is_set():
            await asyncio.wait({self._task}, timeout=min(timeout_s, HURRIED_STEP_S))

    def abandon(self) -> None:
        """End an agent that goes on in spite of its cancellation, wherever it waits."""
        try:
            # GeneratorExit passes `except Exception` and `except CancelledError` alike.
            self._coroutine.close()
        except Exception:  # noqa: BLE001
            # It caught even that, or its clean-up failed. What it still publishes raises,
            # because its run has been closed.
            _log.warning("agent_did_not_close", task=self._task.get_name(), exc_info=True)
        # The task wakes up to find its coroutine closed, and ends.
        self._task.cancel()


async def _without_exit(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except SystemExit as error:
        # A task that raises SystemExit takes the whole event loop down.
        raise AgentExited(f"the agent called sys.exit({error.code!r})") from error


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
