"""A stack for tests without an event loop: the same calls, each returning when it is done."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from relay.testing.relay_stack import RelayStack

Result = TypeVar("Result")

START_DEADLINE_S = 10.0


class LoopThread:
    """An event loop in a thread of its own, for as long as the block runs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay-testing")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Carry out a coroutine there; give what it returns, raise what it raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Blocking:
    """Any object of this package without ``await``: methods that are coroutines block.

    Args:
        thing: A stack, a client, a process.
        thread: Where its event loop runs.
    """

    def __init__(self, thing: Any, thread: LoopThread) -> None:
        self._thing = thing
        self._thread = thread

    def __getattr__(self, name: str) -> Any:
        # Read in the loop's thread, which is the only one that changes what is read.
        value = self._thread.run(_read(self._thing, name))
        return self._blocking(value) if inspect.ismethod(value) else self._wrapped(value)

    def _blocking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            given = [_unwrapped(argument) for argument in arguments]
            return self._wrapped(self._thread.run(_call(method, given, options)))

        return call

    def _wrapped(self, value: Any) -> Any:
        from relay.testing.processes import ManagedProcess
        from relay.testing.recording import RecordingClient

        if isinstance(value, RecordingClient | ManagedProcess):
            return Blocking(value, self._thread)
        if isinstance(value, list):
            return [self._wrapped(item) for item in value]
        return value


class BlockingStack(Blocking):
    """A ``RelayStack`` without ``await``; a context manager.

    Workers given as objects run in the thread of the stack, beside the test.

    Args:
        make: Makes the stack that is started with the block.
    """

    def __init__(self, make: Callable[[], RelayStack]) -> None:
        super().__init__(None, LoopThread())
        self._make = make

    def __enter__(self) -> Self:
        self._thread.__enter__()
        try:
            self._thing = self._thread.run(_enter(self._make))
        except BaseException:
            self._thread.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._thread.run(self._thing.__aexit__(kind, error, traceback))
        finally:
            self._thread.__exit__(kind, error, traceback)


def _unwrapped(value: Any) -> Any:
    return value._thing if isinstance(value, Blocking) else value  # noqa: SLF001 (one of us)


async def _read(thing: Any, name: str) -> Any:
    return getattr(thing, name)


async def _enter(make: Callable[[], RelayStack]) -> RelayStack:
    # Made in the loop's thread too: clients and events belong to one loop from the beginning.
    return await make().__aenter__()


async def _call(method: Callable[..., Any], given: list[Any], options: dict[str, Any]) -> Any:
    answer = method(*given, **options)
    return await answer if inspect.isawaitable(answer) else answer
