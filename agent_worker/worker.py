"""The worker process: where its parts are put together.

``Worker`` is what an agent's author declares agents on; ``serve`` makes a process of it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Self, TypeVar

import structlog

from agent_worker.definition import (
    DEFAULT_STALL_AFTER_S,
    AgentDefinition,
    define_agent,
    require_name,
)
from agent_worker.dispatcher import Dispatcher, DispatcherLimits
from agent_worker.leases import LeaseKeeper
from agent_worker.metrics import WorkerMetrics
from agent_worker.metrics_port import metrics_port
from agent_worker.patience import REDIS_AWAY, until_redis_answers
from agent_worker.signals import SignalListener
from agent_worker.task_streams import BLOCK_MS, TaskStreams
from relay.cancellation import end_tasks
from relay.config import Settings
from relay.errors import ConfigurationError
from relay.keys import Keys
from relay.publisher import Publisher
from relay.reaper import Reaper
from relay.run_model import RunLimits, ThreadPolicy
from relay.runs import RunRegistry
from relay.scripts import LogLimits, RedisLink, ScriptFailed
from relay.workers import WorkerCard

AgentFunction = TypeVar("AgentFunction", bound=Callable[..., object])

LAST_EVENTS_TIMEOUT_S = 5.0
"""How long the end waits for Redis to take the last events; after that the reaper ends the runs."""

WORKERS_SHARE_OF_GRACE = 0.8
"""A cancelled run is ended by its worker before the reaper would do it: the worker knows more."""

STOP_READING_TIMEOUT_S = BLOCK_MS / 1000 + 0.5

_log = structlog.get_logger(__name__)


class Worker:
    """Agents, and the process that runs them.

    Example:
        ```python
        worker = Worker(name="research")

        @worker.agent("researcher", description="Answers with sources.")
        async def research(run: Run) -> str:
            await run.thinking("Looking for sources")
            ...
        ```

    Args:
        name: Names the worker in logs; the process adds a random part.
    """

    def __init__(self, name: str = "worker") -> None:
        require_name("A worker's name", name)
        self._name = name
        self._definitions: dict[str, AgentDefinition] = {}

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._name

    @property
    def agents(self) -> Mapping[str, AgentDefinition]:
        """The declared agents by name."""
        return dict(self._definitions)

    def agent(
        self,
        name: str,
        *,
        description: str = "",
        max_attempts: int = 1,
        stall_after_s: float = DEFAULT_STALL_AFTER_S,
        timeout_s: float | None = None,
        policy: ThreadPolicy = "enqueue",
    ) -> Callable[[AgentFunction], AgentFunction]:
        """Declare an agent. The function is returned unchanged.

        A coroutine function takes a ``Run``. A plain function takes a ``SyncRun`` and runs in a
        thread of its own.

        Args:
            name: 1 to 64 of the characters a-z 0-9 _ -; unique in this worker. All workers
                with an agent of this name share its runs.
            description: One sentence for the people who choose between agents.
            max_attempts: How often a run may be tried: when its worker is lost or stops, and when
                the agent fails with an exception or a recoverable error. An agent that spends
                money should leave it at 1.
            stall_after_s: Silence after which the user is told that the run has stalled.
            timeout_s: Longest time of one attempt; then it ends with ``timeout``.
            policy: What happens to a request in a thread that has an active run: ``enqueue``
                it behind that run, ``reject`` it, ``interrupt`` that run, or carry out both
                in ``parallel``.

        Raises:
            ConfigurationError: A part is not allowed, or the name is taken.
        """

        def declare(function: AgentFunction) -> AgentFunction:
            definition = define_agent(
                name,
                function,
                description=description,
                max_attempts=max_attempts,
                stall_after_s=stall_after_s,
                timeout_s=timeout_s,
                policy=policy,
            )
            if name in self._definitions:
                raise ConfigurationError(f"Agent {name!r} is declared twice on this worker.")
            self._definitions[name] = definition
            return function

        return declare

    async def serve(self, settings: Settings) -> None:
        """Run until SIGTERM or SIGINT; then finish what is at work, and return.

        After the first signal no task is taken, and runs have ``settings.worker_grace_s`` to
        finish; what remains is handed to other workers where it may be tried again, and ends with
        ``worker_lost`` otherwise. A second signal ends it at once.
        Call it in the main thread: it installs the signal handlers.

        Raises:
            ConfigurationError: No agent is declared, or the port for metrics is in use.
            RedisUnavailable: Redis does not answer at the start. Once the worker runs, it
                waits for Redis instead.
            RedisMisconfigured: Redis refuses us at the start, or is too old.
        """
        first, second = asyncio.Event(), asyncio.Event()
        with _signals(first, second):
            async with self._running(settings, hurry=second) as running, _metrics_of(running):
                await running.wait_until(first)
                _log.info(
                    "worker_stopping", active=running.active_count, grace_s=settings.worker_grace_s
                )
                if not await running.drain(settings.worker_grace_s, second):
                    _log.warning("worker_ends_runs", active=running.active_count)

    @asynccontextmanager
    async def running(self, settings: Settings) -> AsyncIterator[RunningWorker]:
        """Run within this process, for tests and embedding; installs no signal handlers.

        The body begins when the worker takes tasks. Leaving it ends the worker at once: what
        is still at work is cancelled and handed back, or ends with ``worker_lost``. Call ``drain``
        before to let it finish.

        Raises:
            ConfigurationError: No agent is declared.
            RedisUnavailable: Redis does not answer at the start.
            RedisMisconfigured: Redis refuses us at the start, or is too old.
        """
        async with self._running(settings, hurry=asyncio.Event()) as running:
            yield running

    def _running(self, settings: Settings, hurry: asyncio.Event) -> RunningWorker:
        if not self._definitions:
            raise ConfigurationError(
                f"Worker {self._name!r} has no agent. Declare one with @worker.agent(name)."
            )
        return RunningWorker(self._name, self._definitions, settings, hurry)


class RunningWorker:
    """A worker at work; made by ``Worker.running``.

    Attributes:
        worker_id: Names this process among all workers.
        metrics: What it counts.
        settings: What it was started with.
    """

    def __init__(
        self,
        name: str,
        definitions: Mapping[str, AgentDefinition],
        settings: Settings,
        hurry: asyncio.Event,
    ) -> None:
        self.worker_id = f"{name}-{secrets.token_hex(6)}"
        self.metrics = WorkerMetrics()
        self.settings = settings
        self._hurry = hurry
        self._stack = AsyncExitStack()
        keys = Keys(settings.key_prefix)
        limits = LogLimits.of(settings)
        run_limits = RunLimits.of(settings)
        self._link = RedisLink(settings.redis_url, limits=limits)
        self._publisher = Publisher(self._link, keys, merge_ms=settings.delta_merge_ms)
        self._streams = TaskStreams(self._link, keys, list(definitions), self.worker_id)
        self._leases = LeaseKeeper(
            settings.redis_url,
            keys,
            self.worker_id,
            WorkerCard(
                name=name,
                agents=tuple(sorted(definitions)),
                host=socket.gethostname(),
                pid=os.getpid(),
                started_ms=time.time_ns() // 1_000_000,
            ),
            lease_ms=settings.lease_ms,
            limits=limits,
            metrics=self.metrics,
            on_absent=self._key_was_absent,
        )
        self._dispatcher = Dispatcher(
            self.worker_id,
            self._link,
            keys,
            dict(definitions),
            self._streams,
            RunRegistry(self._link, keys, run_limits),
            self._publisher,
            self._leases,
            DispatcherLimits(
                settings.worker_concurrency,
                settings.lease_ms,
                settings.cancel_grace_ms / 1000 * WORKERS_SHARE_OF_GRACE,
            ),
            self.metrics,
        )
        self._reaper = Reaper(
            self._link,
            keys,
            lease_ms=settings.lease_ms,
            cancel_grace_ms=settings.cancel_grace_ms,
        )
        self._signals = SignalListener(
            self._link,
            keys.worker(self.worker_id),
            self._dispatcher.cancel,
            self._dispatcher.answer,
        )
        self._loop = asyncio.get_running_loop()
        self._taking: asyncio.Task[None] | None = None
        self._restoring: set[asyncio.Task[None]] = set()

    @property
    def active_count(self) -> int:
        """How many tasks are in hand."""
        return self._dispatcher.active_count

    async def wait_until(self, stop: asyncio.Event) -> None:
        """Wait for ``stop``; raises early if taking tasks fails, which is a defect."""
        waiting = asyncio.create_task(stop.wait())
        watched = {waiting} if self._taking is None else {waiting, self._taking}
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._taking is not None and self._taking.done():
            self._taking.result()

    async def drain(self, timeout_s: float, cut: asyncio.Event | None = None) -> bool:
        """Take no more tasks, and let what is at work finish.

        Args:
            timeout_s: How long to wait.
            cut: Ends the wait early when it is set.

        Returns:
            Whether everything has finished.
        """
        await self._stop_taking()
        return await self._dispatcher.drain(timeout_s, cut or asyncio.Event())

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._link.aclose)
            stack.push_async_callback(self._streams.aclose)
            await self._link.check()
            await stack.enter_async_context(self._publisher)
            await stack.enter_async_context(self._reaper)
            stack.push_async_callback(self._signals.aclose)
            await self._signals.start()
            await self._dispatcher.register()
            self._leases.start()
            stack.push_async_callback(asyncio.to_thread, self._leases.stop)
            stack.push_async_callback(self._end_runs)
            self._taking = asyncio.create_task(self._dispatcher.take_tasks(), name="take-tasks")
            self._stack = stack.pop_all()
        _log.info("worker_started", worker_id=self.worker_id, agents=self._dispatcher.agent_names)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(exc_type, error, traceback)
        _log.info("worker_stopped", worker_id=self.worker_id)

    async def _stop_taking(self) -> None:
        self._dispatcher.stop_taking()
        if self._taking is None or self._taking.done():
            return
        try:
            await self._streams.wake()
        except (*REDIS_AWAY, ScriptFailed) as error:
            _log.info("worker_reads_on", reason=str(error), for_s=STOP_READING_TIMEOUT_S)
        await asyncio.wait({self._taking}, timeout=STOP_READING_TIMEOUT_S)
        await end_tasks([self._taking])

    async def _end_runs(self) -> None:
        await self._stop_taking()
        await end_tasks(self._restoring)
        self._dispatcher.end_runs()
        hurrying = asyncio.create_task(self._hurry_when_asked())
        try:
            grace_s = self.settings.cancel_grace_ms / 1000
            await self._dispatcher.close(grace_s + LAST_EVENTS_TIMEOUT_S)
        finally:
            hurrying.cancel()
        try:
            await self._streams.leave()
        except (*REDIS_AWAY, ScriptFailed) as error:
            _log.debug("worker_not_removed_from_groups", reason=str(error))
        if self._taking is not None and not self._taking.cancelled():
            self._taking.result()

    async def _hurry_when_asked(self) -> None:
        await self._hurry.wait()
        self._dispatcher.hurry()

    def _key_was_absent(self) -> None:
        """Called in the leases' thread: Redis may have lost everything that it knew of us."""
        try:
            self._loop.call_soon_threadsafe(self._restore, self._dispatcher.register)
        except RuntimeError:
            # The loop has been closed; the thread is about to end as well.
            return

    def _restore(self, operation: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(
            until_redis_answers(operation, "restore", self.metrics), name="restore"
        )
        self._restoring.add(task)
        task.add_done_callback(self._restored)

    def _restored(self, task: asyncio.Task[None]) -> None:
        self._restoring.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("worker_state_not_restored", exc_info=error)


@asynccontextmanager
async def _metrics_of(running: RunningWorker) -> AsyncIterator[None]:
    with metrics_port(running.settings, running.metrics.registry) as port:
        if port is not None:
            _log.info("worker_metrics", port=port)
        yield


@contextmanager
def _signals(first: asyncio.Event, second: asyncio.Event) -> Iterator[None]:
    """Turn the first SIGTERM or SIGINT into one event and the next into the other."""
    loop = asyncio.get_running_loop()

    def receive() -> None:
        (second if first.is_set() else first).set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, receive)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
