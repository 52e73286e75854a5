"""The run for agents that are plain functions: the same calls, without ``await``.

A plain function runs in a thread of its own, so it may block. Its calls are carried out on the
event loop, in order; each returns when the event was accepted there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from agent_worker.run import Request, Run
from agent_worker.step import Step
from agent_worker.tool import Tool

P = ParamSpec("P")
T = TypeVar("T")


def _waits_for(
    method: Callable[Concatenate[Run, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncRun, P], T]:
    """Give a call of ``Run`` as a plain method that returns when it has been carried out."""

    @functools.wraps(method)
    def call(self: SyncRun, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.carry_out(method(self._run, *args, **kwargs))

    return call


class SyncRun:
    """One attempt at a run, as a plain function sees it. See ``Run`` for what the calls do.

    A thread cannot be interrupted. After a cancellation the next call on the run raises
    ``asyncio.CancelledError``; a function that works for long between calls asks
    ``is_cancelled``.
    """

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        self._run = run
        self._loop = loop
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._waiting: set[concurrent.futures.Future[Any]] = set()

    @property
    def run_id(self) -> str:
        """The run's id, the same over all attempts."""
        return self._run.run_id

    @property
    def user_id(self) -> str:
        """Whose run it is."""
        return self._run.user_id

    @property
    def thread_id(self) -> str:
        """The conversation that the run belongs to."""
        return self._run.thread_id

    @property
    def agent(self) -> str:
        """The agent's name."""
        return self._run.agent

    @property
    def attempt(self) -> int:
        """Number of this try, from 1."""
        return self._run.attempt

    @property
    def request(self) -> Request:
        """What the user asked for."""
        return self._run.request

    @property
    def text(self) -> str:
        """All text streamed in this attempt."""
        return self._run.text

    @property
    def is_cancelled(self) -> bool:
        """Whether the run is to stop; every further call on it raises."""
        return self._stopped.is_set()

    def tool(
        self,
        name: str,
        parameters: Any = None,
        purpose: str | None = None,
        estimated_duration_ms: int | None = None,
    ) -> SyncTool:
        """Show a tool call while the ``with`` block runs. See ``Run.tool``."""
        return SyncTool(self, self._run.tool(name, parameters, purpose, estimated_duration_ms))

    def step(self, name: str, total_steps: int | None = None) -> SyncStep:
        """See ``Run.step``; a plain ``with`` block."""
        return SyncStep(self, self._run.step(name, total_steps))

    # The calls of Run, with its signatures and docstrings.
    thinking = _waits_for(Run.thinking)
    delta = _waits_for(Run.delta)
    progress = _waits_for(Run.progress)
    custom = _waits_for(Run.custom)
    ask = _waits_for(Run.ask)
    approve = _waits_for(Run.approve)
    call_agent = _waits_for(Run.call_agent)

    def carry_out(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the worker's event loop and wait for it.

        Raises:
            asyncio.CancelledError: The run is to stop.
        """
        with self._lock:
            # Under the lock: a call is either refused here, or seen and cancelled by stop().
            if self._stopped.is_set():
                call.close()
                raise asyncio.CancelledError
            try:
                # The scheduled task copies this thread's context: its innermost tool holds.
                waiting = asyncio.run_coroutine_threadsafe(call, self._loop)
            except RuntimeError:
                # The loop is closed: the worker has gone, and this thread was left behind.
                call.close()
                raise asyncio.CancelledError from None
            self._waiting.add(waiting)
        try:
            return waiting.result()
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError from None
        finally:
            with self._lock:
                self._waiting.discard(waiting)

    def stop(self) -> None:
        """Let the current and all further calls raise in the thread. Called on the loop."""
        with self._lock:
            self._stopped.set()
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()


class SyncTool:
    """A tool call of a run: a plain context manager. See ``Tool``."""

    def __init__(self, run: SyncRun, tool: Tool) -> None:
        self._run = run
        self._tool = tool

    @property
    def result(self) -> Any:
        """What the tool found; set it within the block. Anything with a JSON form."""
        return self._tool.result

    @result.setter
    def result(self, value: Any) -> None:
        self._tool.result = value

    @property
    def tool_call_id(self) -> str:
        """Names this call among all calls of the run."""
        return self._tool.tool_call_id

    def progress(self, percentage: float | None = None, note: str | None = None) -> None:
        """See ``Tool.progress``."""
        self._run.carry_out(self._tool.progress(percentage, note))

    def __enter__(self) -> Self:
        self._run.carry_out(self._tool.begin())
        self._tool.become_innermost()
        return self

    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._tool.leave_innermost()
        # After a cancellation no call is carried out any more; what ends the run closes the tool.
        if not (self._run.is_cancelled and error is not None):
            self._run.carry_out(self._tool.end(error))


class SyncStep:
    """A named step of a run: a plain context manager. See ``Run.step``."""

    def __init__(self, run: SyncRun, step: Step) -> None:
        self._run = run
        self._step = step

    @property
    def number(self) -> int:
        """Its number in the run, from 1."""
        return self._step.number

    def __enter__(self) -> Self:
        self._run.carry_out(self._step.begin())
        return self

    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """End the block."""


async def call_in_thread(function: Callable[[SyncRun], T], run: Run) -> T:
    """Call a plain function in a thread of its own.

    Cancelling makes the function's next call on the run raise, and waits for the function to
    end. Closing this coroutine leaves the thread behind: it is a daemon thread, so it does not
    hold up the end of the process.

    Raises:
        asyncio.CancelledError: It was cancelled and the function has ended.
    """
    loop = asyncio.get_running_loop()
    sync_run = SyncRun(run, loop)
    ended: asyncio.Future[None] = loop.create_future()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(function(sync_run))
        except BaseException as error:  # noqa: BLE001  (it is raised where it is awaited)
            failure.append(error)
        try:
            loop.call_soon_threadsafe(_resolve, ended)
        except RuntimeError:
            # The loop has been closed: nobody waits for this thread any more.
            return

    context = contextvars.copy_context()
    threading.Thread(
        target=context.run, args=(body,), name=f"agent-{run.run_id}", daemon=True
    ).start()
    was_cancelled = False
    try:
        while not ended.done():
            try:
                # asyncio.wait leaves the future alone when the waiting task is cancelled.
                await asyncio.wait({ended})
            except asyncio.CancelledError:
                was_cancelled = True
                sync_run.stop()
    finally:
        sync_run.stop()
    if was_cancelled:
        raise asyncio.CancelledError
    if failure:
        raise failure[0]
    return outcome[0]


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
