"""One attempt at a run, from ``agent_started`` to its terminal event."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from agent_worker import endings, metrics
from agent_worker.agent_call import AgentCall
from agent_worker.definition import AgentDefinition
from agent_worker.endings import Ending
from agent_worker.outlet import Outlet
from agent_worker.run import Run, RunInfo
from agent_worker.sync_run import call_in_thread
from relay.errors import AgentError, EncodingFailed, InvalidEvent, PublishRefused, RunEnded
from relay.events import EventType

if TYPE_CHECKING:
    from relay.publisher import RunStream

REFUSED = "refused"
UNFINISHED = "unfinished"

CANCEL_CHECK_S = 0.25
"""How often an attempt looks whether an acknowledgement said that it should stop."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody asked for the run to stop."""

    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The attempt took longer than its agent allows."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class WorkerStops:
    """The worker goes away and the run did not end in the time that was left."""


StopCause = CancelAsked | TimedOut | WorkerStops


def read_cancel_flag(flag: bytes) -> CancelAsked:
    """Read who asked for a run to stop, and why, from the flag that Redis keeps of it."""
    try:
        return cancel_asked(orjson.loads(flag))
    except (orjson.JSONDecodeError, AttributeError):
        # That somebody asked is certain, whatever became of the details.
        return CancelAsked("user")


def cancel_asked(fields: Mapping[str, Any]) -> CancelAsked:
    """Read who asked for a run to stop, and why, from a signal or a flag."""
    by, reason = fields.get("by"), fields.get("reason")
    return CancelAsked(
        by if isinstance(by, str) and by else "user", reason if isinstance(reason, str) else None
    )


class RunExecution:
    """Runs an agent for one claimed run and publishes how it ended.

    ``request_stop``, ``refuse`` and ``hurry`` may be called at any time, also before
    ``carry_out``; they never wait. The first cause of a stop wins.
    """

    def __init__(
        self,
        definition: AgentDefinition,
        *,
        cancel_grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._definition = definition
        self._cancel_grace_s = cancel_grace_s
        self._clock = clock
        self._began_s = clock()
        self._cause: StopCause | None = None
        self._refusal: PublishRefused | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    def request_stop(self, cause: StopCause) -> None:
        """Stop the agent and end the run for this cause, unless it is ending already."""
        if self._cause is None:
            self._cause = cause
            self._stop.set()

    def refuse(self, refusal: PublishRefused) -> None:
        """Stop the agent without publishing anything: the run is no longer this attempt's."""
        if self._refusal is None:
            self._refusal = refusal
            self._stop.set()

    def hurry(self) -> None:
        """Cut short what is left of the grace time for a stopping agent."""
        self._hurry.set()

    async def carry_out(self, info: RunInfo, stream: RunStream) -> str:
        """Run the agent and publish the end.

        Returns:
            ``completed``, ``error``, ``cancelled``, or ``refused`` where the run was ended or
            taken over elsewhere.
        """
        log = _log.bind(
            run_id=info.run_id, agent=info.agent, user_id=info.user_id, attempt=info.attempt
        )
        self._began_s = self._clock()
        outlet = Outlet(stream, clock=self._clock)
        run = Run(info, outlet)
        try:
            ending = await self._reach_ending(run, outlet, stream, log)
            if ending is None:
                return self._report_refused(log)
            return await self._publish_ending(ending, stream, log)
        except PublishRefused as refusal:
            self.refuse(refusal)
            return self._report_refused(log)
        finally:
            outlet.close("the run has ended")
            stream.close()

    async def _reach_ending(
        self,
        run: Run,
        outlet: Outlet,
        stream: RunStream,
        log: structlog.typing.FilteringBoundLogger,
    ) -> Ending | None:
        if self._stop.is_set():
            # Cancelled between the request and this worker's claim: the agent never begins.
            return self._stopped_ending()
        await stream.publish(EventType.AGENT_STARTED, {})
        log.info("run_started")
        call = AgentCall(self._begin(run), name=f"agent-{run.run_id}")
        try:
            if not await self._wait_for(call, stream):
                await self._halt(call, outlet, log)
        except asyncio.CancelledError:
            # The worker itself is being cancelled; the agent must not outlive it.
            call.task.cancel()
            raise
        if self._refusal is not None or self._cause is not None:
            return self._stopped_ending()
        return self._ending_of(call.task, stream, log)

    def _stopped_ending(self) -> Ending | None:
        if self._refusal is not None or self._cause is None:
            return None
        return self._ending_for(self._cause)

    async def _wait_for(self, call: AgentCall, stream: RunStream) -> bool:
        """Wait for the agent's end, a stop, or the time limit; say whether the agent ended."""
        timeout_s = self._definition.timeout_s
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while not (call.is_done or self._stop.is_set()):
                left_s = None
                if timeout_s is not None:
                    left_s = timeout_s - (self._clock() - self._began_s)
                    if left_s <= 0:
                        self.request_stop(TimedOut(timeout_s))
                        break
                await asyncio.wait(
                    {call.task, stopped},
                    timeout=CANCEL_CHECK_S if left_s is None else min(left_s, CANCEL_CHECK_S),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                self._check_cancel_flag(stream)
        finally:
            stopped.cancel()
        if call.is_done:
            # Done first is done: a cancellation that came too late does not undo a result.
            self._cause = None
        return call.is_done

    def _check_cancel_flag(self, stream: RunStream) -> None:
        """Find a cancellation whose signal was lost: acknowledgements carry its flag as well."""
        if stream.cancel_requested is not None:
            self.request_stop(read_cancel_flag(stream.cancel_requested))

    async def _halt(
        self, call: AgentCall, outlet: Outlet, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        log.info("run_stopping", cause=_describe(self._refusal or self._cause))
        if self._refusal is not None:
            outlet.close(f"the run was taken from this attempt: {self._refusal}")
        if not await call.stop(self._cancel_grace_s, self._hurry):
            outlet.close("the run has ended: the agent did not stop in time after a cancellation")
            call.abandon()
            metrics.AGENTS_ABANDONED.labels(self._definition.name).inc()
            log.warning(
                "agent_abandoned",
                grace_ms=round(self._cancel_grace_s * 1000),
                hint="The agent caught CancelledError and went on, or blocks in a thread.",
            )

    def _begin(self, run: Run) -> Any:
        function = self._definition.function
        return call_in_thread(function, run) if self._definition.is_sync else function(run)

    def _ending_for(self, cause: StopCause) -> Ending:
        match cause:
            case CancelAsked(by, reason):
                return endings.cancelled(by, reason, self._duration_ms())
            case TimedOut():
                return endings.failed(AgentError("timeout"), new_support_id())
            case WorkerStops():
                error = AgentError(
                    "worker_lost", "The worker was stopped before the agent could finish."
                )
                return endings.failed(error, new_support_id())

    def _ending_of(
        self,
        task: asyncio.Task[Any],
        stream: RunStream,
        log: structlog.typing.FilteringBoundLogger,
    ) -> Ending:
        if task.cancelled():
            support_id = new_support_id()
            log.error(
                "agent_failed",
                support_id=support_id,
                reason="The agent raised CancelledError, but nobody had cancelled its run.",
            )
            return endings.failed_unexpectedly(support_id)
        error = task.exception()
        if error is None:
            return endings.completed(task.result(), stream.text, self._duration_ms())
        support_id = new_support_id()
        if isinstance(error, AgentError):
            log.info("agent_error", code=error.code, support_id=support_id)
            return endings.failed(error, support_id)
        log.error("agent_failed", support_id=support_id, exc_info=error)
        return endings.failed_unexpectedly(support_id)

    async def _publish_ending(
        self, ending: Ending, stream: RunStream, log: structlog.typing.FilteringBoundLogger
    ) -> str:
        try:
            await stream.finish(ending.event_type, ending.data)
        except (EncodingFailed, InvalidEvent, AgentError) as error:
            support_id = new_support_id()
            log.error("agent_result_not_publishable", support_id=support_id, reason=str(error))
            # An AgentError is the publisher's own: the result is too large.
            if isinstance(error, AgentError):
                ending = endings.failed(error, support_id)
            else:
                ending = endings.failed_unexpectedly(support_id)
            await stream.finish(ending.event_type, ending.data)
        log.info("run_ended", status=ending.status, duration_ms=self._duration_ms())
        return ending.status

    def _report_refused(self, log: structlog.typing.FilteringBoundLogger) -> str:
        if isinstance(self._refusal, RunEnded):
            log.info("run_ended_elsewhere", status=self._refusal.status)
        else:
            log.warning("run_refused", reason=str(self._refusal))
        return REFUSED

    def _duration_ms(self) -> int:
        return max(0, round((self._clock() - self._began_s) * 1000))


def new_support_id() -> str:
    """Give an id that ties what the user sees to one log line."""
    return f"sup_{secrets.token_hex(6)}"


def _describe(cause: StopCause | PublishRefused | None) -> str:
    match cause:
        case CancelAsked(by, _):
            return f"cancelled by {by}"
        case TimedOut(timeout_s):
            return f"longer than {timeout_s:g} s"
        case WorkerStops():
            return "the worker stops"
        case _:
            return str(cause)
