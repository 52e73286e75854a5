"""Work beside the event that started it: tasks and timers that end with their owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from relay.cancellation import end_tasks

log = structlog.stdlib.get_logger(__name__)


class Background:
    """Tasks and timers of one owner. What fails is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Begin a task."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Call something after a while."""

        def run() -> None:
            self._timers.discard(timer)
            action()

        timer = asyncio.get_running_loop().call_later(delay_s, run)
        self._timers.add(timer)

    async def aclose(self) -> None:
        """End all of it."""
        await end_tasks(self._tasks)
        for timer in tuple(self._timers):
            timer.cancel()
        self._timers.clear()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed", task=task.get_name(), exc_info=error)
