"""Publishing for workers that exist already: Celery, arq, Temporal, a web server, a script.

The bridge opens runs, publishes what is said of them, keeps their leases and tells of
cancellations, as a worker does, without tasks of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Any, Self

import structlog

from agent_worker.attempts import lease_of
from agent_worker.bridged_run import BridgedRun
from agent_worker.definition import DEFAULT_STALL_AFTER_S, require_name
from agent_worker.endings import REFUSED
from agent_worker.errands import RegistryErrands
from agent_worker.leases import Lease, LeaseKeeper
from agent_worker.metrics import WorkerMetrics
from agent_worker.patience import until_redis_answers
from agent_worker.signals import SignalListener
from agent_worker.stops import CancelAsked, WorkerStops
from relay.config import Settings
from relay.encoding import SECRET_NAMES, redact
from relay.errors import PublishRefused, RelayError
from relay.keys import Keys
from relay.notices import Notice
from relay.publisher import Publisher
from relay.run_model import RunLimits, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import LogLimits, RedisLink
from relay.workers import WorkerCard

LAST_EVENTS_TIMEOUT_S = 5.0
"""How long closing waits for Redis to take the last events; then the reaper ends the runs."""

_log = structlog.get_logger(__name__)


class BridgeState(StrEnum):
    """How a bridge is."""

    STARTING = "starting"
    """Not entered yet."""
    ACTIVE = "active"
    """Redis answers: events are delivered, leases renewed, cancellations heard."""
    DEGRADED = "degraded"
    """Redis does not answer as it should: events wait in bounded buffers, none is lost."""
    FAILED = "failed"
    """Redis refuses us, or has been away for longer than a lease: runs may be taken away."""
    CLOSED = "closed"
    """Over, for good."""


@dataclass(frozen=True, slots=True)
class BridgeHealth:
    """How a bridge is, measured, not remembered.

    Attributes:
        state: In one word.
        last_error: Why Redis last did not do what it should; also after it is well again.
        lag_ms: How long the run that waits longest has waited for an acknowledgement.
        silence_ms: How long Redis has not answered; 0 while it does.
        buffered_bytes: What waits to be sent.
        active_runs: Runs that are open.
    """

    state: BridgeState
    last_error: str | None
    lag_ms: int
    silence_ms: int
    buffered_bytes: int
    active_runs: int

    @property
    def is_healthy(self) -> bool:
        """Whether what is published now is delivered now."""
        return self.state is BridgeState.ACTIVE


class BridgeClosed(RelayError):
    """The bridge has been closed, or was never entered."""


@dataclass(frozen=True, slots=True)
class _OpenRun:
    run: BridgedRun
    lease: Lease


class AgentWebSocketBridge:
    """Publishes runs that somebody else's worker carries out.

    Example:
        ```python
        async with AgentWebSocketBridge(load_settings()) as bridge:
            async with bridge.run(user_id="alice", thread_id="t1", agent="researcher") as run:
                await run.thinking("Looking for sources")
                run.result = await research()
        ```

    Args:
        settings: Which Redis, and the limits.
        name: Names the process in logs and presence.
    """

    def __init__(self, settings: Settings, *, name: str = "bridge") -> None:
        require_name("A bridge's name", name)
        self.bridge_id = f"{name}-{secrets.token_hex(6)}"
        self.metrics = WorkerMetrics()
        self._settings = settings
        self._keys = Keys(settings.key_prefix)
        limits = LogLimits.of(settings)
        self._link = RedisLink(settings.redis_url, limits=limits)
        self._registry = RunRegistry(
            self._link,
            self._keys,
            RunLimits.of(settings),
        )
        self._publisher = Publisher(self._link, self._keys, merge_ms=settings.delta_merge_ms)
        self._leases = LeaseKeeper(
            settings.redis_url,
            self._keys,
            self.bridge_id,
            WorkerCard(
                name=name,
                agents=(),
                host=socket.gethostname(),
                pid=os.getpid(),
                started_ms=time.time_ns() // 1_000_000,
            ),
            lease_ms=settings.lease_ms,
            limits=limits,
            metrics=self.metrics,
            # Its leases are in the runs' hashes; there is nothing else to restore.
            on_absent=lambda: None,
        )
        self._signals = SignalListener(
            self._link, self._keys.worker(self.bridge_id), self._cancel, self._answer
        )
        self._stack = AsyncExitStack()
        self._open: dict[str, _OpenRun] = {}
        self._changed = asyncio.Event()
        self._start_error: str | None = None
        self._is_started = False
        self._is_closed = False

    # --- its own life ---

    async def __aenter__(self) -> Self:
        if self._is_closed or self._is_started or self._start_error is not None:
            raise BridgeClosed("a bridge is entered once; make another one")
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._link.aclose)
                await self._link.check()
                await stack.enter_async_context(self._publisher)
                stack.push_async_callback(self._signals.aclose)
                await self._signals.start()
                self._leases.start()
                stack.push_async_callback(asyncio.to_thread, self._leases.stop)
                stack.push_async_callback(self._end_runs)
                self._stack = stack.pop_all()
        except RelayError as error:
            self._start_error = str(error)
            raise
        self._is_started = True
        _log.info("bridge_started", bridge_id=self.bridge_id)
        return self

    async def __aexit__(
        self,
        _exc_type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what is open with ``worker_lost`` and let go of Redis. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._stack.aclose()
        _log.info("bridge_closed", bridge_id=self.bridge_id)

    async def _end_runs(self) -> None:
        runs = [kept.run for kept in self._open.values()]
        for run in runs:
            run.request_stop(WorkerStops())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_EVENTS_TIMEOUT_S):
                while self._open:
                    self._changed.clear()
                    await self._changed.wait()
        for kept in list(self._open.values()):
            _log.error("run_left_unfinished", run_id=kept.run.run_id)
            self._let_go(kept.run)
        for run in runs:
            await run.settle()

    @property
    def state(self) -> BridgeState:
        """How the bridge is at this moment."""
        if self._is_closed:
            return BridgeState.CLOSED
        if self._start_error is not None:
            return BridgeState.FAILED
        if not self._is_started:
            return BridgeState.STARTING
        silence_s = self._leases.silence_s
        if self._leases.is_refused or silence_s * 1000 > self._settings.lease_ms:
            return BridgeState.FAILED
        if silence_s or not (self._publisher.is_available and self._signals.is_connected):
            return BridgeState.DEGRADED
        return BridgeState.ACTIVE

    def health(self) -> BridgeHealth:
        """Measure how the bridge is, from what its connections experience. Asks nobody."""
        return BridgeHealth(
            state=self.state,
            last_error=(
                self._start_error
                or self._publisher.last_error
                or self._leases.last_error
                or self._signals.last_error
            ),
            lag_ms=round(self._publisher.lag_s * 1000),
            silence_ms=round(self._leases.silence_s * 1000) if self._is_started else 0,
            buffered_bytes=self._publisher.buffered_bytes,
            active_runs=len(self._open),
        )

    # --- runs ---

    @asynccontextmanager
    async def run(
        self,
        *,
        user_id: str,
        thread_id: str,
        agent: str,
        content: str = "",
        metadata: Mapping[str, Any] | None = None,
        message_id: str | None = None,
        model: str | None = None,
        context: Mapping[str, Any] | None = None,
        stall_after_s: float = DEFAULT_STALL_AFTER_S,
    ) -> AsyncIterator[BridgedRun]:
        """Open a run for the block, and end it with the block.

        Reaching its end gives ``agent_completed`` with ``run.result`` or the streamed text. An
        exception gives ``agent_error``, and goes on. A cancellation by the user arrives in the
        block as ``asyncio.CancelledError``; it leaves the block as ``RunCancelled``.

        Args:
            user_id: Whose run it is.
            thread_id: The conversation that it belongs to. It waits for no other run there.
            agent: The agent's name, for people; it need not be registered.
            content: What the user asked for.
            metadata: What belongs to the request.
            message_id: Your own id of it: the same one opens no second run. Random by default.
            model: For ``agent_started``.
            context: For ``agent_started``.
            stall_after_s: Silence after which the user is told that the run has stalled.

        Raises:
            RequestRefused: ``rate_limited``: the user has too many active runs.
            RunEnded, StaleFence: There is a run of this message already.
            RunCancelled: Somebody stopped the run.
            PublishRefused: The run was ended or taken over elsewhere.
        """
        opened = await self.open(
            user_id=user_id,
            thread_id=thread_id,
            agent=agent,
            content=content,
            metadata=metadata,
            message_id=message_id,
            model=model,
            context=context,
            stall_after_s=stall_after_s,
        )
        async with opened:
            yield opened

    async def open(
        self,
        *,
        user_id: str,
        thread_id: str,
        agent: str,
        content: str = "",
        metadata: Mapping[str, Any] | None = None,
        message_id: str | None = None,
        model: str | None = None,
        context: Mapping[str, Any] | None = None,
        stall_after_s: float = DEFAULT_STALL_AFTER_S,
    ) -> BridgedRun:
        """Open a run that you end yourself, with ``complete`` or ``fail``; see ``run``.

        Waits while Redis is away.

        Raises:
            RequestRefused, RunEnded, StaleFence: As for ``run``.
        """
        self._require_open()
        request = SubmitRequest(
            user_id=user_id,
            thread_id=thread_id,
            agent=agent,
            content=content,
            message_id=message_id or uuid.uuid4().hex,
            metadata=dict(metadata or {}),
        )
        fence = secrets.token_hex(8)
        claim = await until_redis_answers(
            lambda: self._registry.open_run(
                request,
                self.bridge_id,
                self._settings.lease_ms,
                fence=fence,
                stall_after_ms=round(stall_after_s * 1000),
            ),
            "open",
            self.metrics,
        )
        stream = self._publisher.open(claim, on_refused=partial(self._refuse, claim.run_id))
        errands = RegistryErrands(self._registry, claim, self.metrics)
        run = BridgedRun(claim, stream, errands, self._stop_renewing, self._let_go)
        lease = lease_of(claim, self._keys, run)
        self._open[claim.run_id] = _OpenRun(run, lease)
        self._leases.hold(lease)
        self.metrics.runs_active.labels(agent).inc()
        try:
            await run.begin(model, context)
        except BaseException:
            await run.abandon()
            raise
        if self._is_closed:
            # Closed while Redis was being waited for.
            await run.end_for(WorkerStops())
            raise BridgeClosed("the bridge was closed")
        return run

    def _stop_renewing(self, run: BridgedRun) -> None:
        kept = self._open.get(run.run_id)
        if kept is not None:
            self._leases.release(kept.lease)

    def _let_go(self, run: BridgedRun) -> None:
        kept = self._open.pop(run.run_id, None)
        if kept is not None:
            self._leases.release(kept.lease)
            self.metrics.runs_active.labels(run.agent).dec()
            self.metrics.runs_ended.labels(run.agent, run.status).inc()
            if run.status != REFUSED:
                self.metrics.run_seconds.labels(run.agent).observe(run.lasted_s)
            self._changed.set()

    def _require_open(self) -> None:
        if self._is_closed or not self._is_started:
            raise BridgeClosed("use the bridge within `async with AgentWebSocketBridge(…)`")

    def _cancel(self, run_id: str, cause: CancelAsked) -> None:
        if run_id in self._open:
            self._open[run_id].run.request_stop(cause)

    def _refuse(self, run_id: str, refusal: PublishRefused) -> None:
        if run_id in self._open:
            self._open[run_id].run.refuse(refusal)

    def _answer(self, run_id: str, request_id: str, answer: Mapping[str, Any]) -> None:
        if run_id in self._open:
            self._open[run_id].run.answer(request_id, answer)

    # --- beside runs ---

    def emitter(self, user_id: str) -> UserEmitter:
        """Give what publishes for one user, and can publish for no other."""
        return UserEmitter(self, user_id)

    async def notify(
        self, user_id: str, severity: str, title: str, body: str, **payload: Any
    ) -> None:
        """Tell a user something that belongs to no run, on all devices. Waits while Redis is away.

        Args:
            user_id: Who is told.
            severity: ``info``, ``success``, ``warning`` or ``error``.
            title: In a few words.
            body: In full.
            payload: Whatever the application's client understands.

        Raises:
            InvalidEvent, EncodingFailed: A part does not fit; it reached nobody.
        """
        await self.send_notice(
            user_id, {**payload, "severity": severity, "title": title, "body": body}
        )

    async def send_notice(self, user_id: str, data: Mapping[str, Any]) -> None:
        """Send a notice whose data are given as a whole; see ``notify``."""
        self._require_open()
        notice = Notice(self._keys, user_id, redact(dict(data), SECRET_NAMES))
        await until_redis_answers(lambda: notice.send(self._link), "notice", self.metrics)


class UserEmitter:
    """Publishes for one user. There is no way from here to another one.

    Args:
        bridge: Where it publishes.
        user_id: The user.
    """

    __slots__ = ("_bridge", "_user_id")

    def __init__(self, bridge: AgentWebSocketBridge, user_id: str) -> None:
        Keys().user(user_id).base  # noqa: B018 (raises for an id that no user can have)
        self._bridge = bridge
        self._user_id = user_id

    @property
    def user_id(self) -> str:
        """The user."""
        return self._user_id

    @asynccontextmanager
    async def run(self, *, thread_id: str, agent: str, **options: Any) -> AsyncIterator[BridgedRun]:
        """Open a run of this user for the block; see ``AgentWebSocketBridge.run``."""
        options.pop("user_id", None)
        async with self._bridge.run(
            user_id=self._user_id, thread_id=thread_id, agent=agent, **options
        ) as opened:
            yield opened

    async def notify(self, severity: str, title: str, body: str, **payload: Any) -> None:
        """Tell this user something; see ``AgentWebSocketBridge.notify``."""
        data = {**payload, "severity": severity, "title": title, "body": body}
        await self._bridge.send_notice(self._user_id, data)
