"""One attempt at a run, from ``agent_started`` to its terminal event, or to the next attempt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import structlog

from agent_worker import endings
from agent_worker.agent_call import AgentCall
from agent_worker.conclusion import publish_ending, publish_retry
from agent_worker.definition import AgentDefinition
from agent_worker.endings import REFUSED, Ending, Retry
from agent_worker.errands import Errands
from agent_worker.metrics import WorkerMetrics
from agent_worker.outlet import Outlet
from agent_worker.run import Run, RunInfo
from agent_worker.stops import CancelAsked, StopCause, TimedOut, WorkerStops, read_cancel_flag
from agent_worker.sync_run import call_in_thread
from agent_worker.tool import foreseen_in
from relay.amending import new_support_id
from relay.errors import (
    AgentError,
    EncodingFailed,
    InputNotAnswered,
    InvalidEvent,
    PublishRefused,
    RunEnded,
)
from relay.events import EventType
from relay.retry import retry_delay_ms

if TYPE_CHECKING:
    from relay.run_stream import RunStream

RELEASED = "released"
RETRYING = "retrying"

CANCEL_CHECK_S = 0.25
"""How often an attempt looks whether an acknowledgement said that it should stop."""

_log = structlog.get_logger(__name__)


class RunExecution:
    """Runs an agent for one claimed run and publishes how it ended.

    ``request_stop``, ``refuse``, ``answer`` and ``hurry`` may be called at any time, also before
    ``carry_out``; they never wait. The first cause of a stop wins.
    """

    def __init__(
        self,
        definition: AgentDefinition,
        *,
        cancel_grace_s: float,
        metrics: WorkerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._definition = definition
        self._cancel_grace_s = cancel_grace_s
        self._metrics = metrics
        self._clock = clock
        self._run: Run | None = None
        self.retry: Retry | None = None
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

    def answer(self, request_id: str, answer: Mapping[str, Any]) -> None:
        """Pass on what became of one of the agent's questions."""
        if self._run is not None:
            self._run.receive_answer(request_id, answer)

    def hurry(self) -> None:
        """Cut short what is left of the grace time for a stopping agent."""
        self._hurry.set()

    async def carry_out(self, info: RunInfo, stream: RunStream, errands: Errands) -> str:
        """Run the agent and publish the end.

        Returns:
            ``completed``, ``error``, ``cancelled``; ``retrying`` where another attempt is to follow
            as ``retry`` says; ``released`` where the agent never began and the run was given back;
            ``refused`` where the run was ended or taken over elsewhere.
        """
        log = _log.bind(
            run_id=info.run_id, agent=info.agent, user_id=info.user_id, attempt=info.attempt
        )
        self._began_s = self._clock()
        outlet = Outlet(stream, clock=self._clock)
        run = self._run = Run(info, outlet, errands)
        try:
            if isinstance(self._cause, WorkerStops) and await errands.release():
                log.info("run_released")
                return RELEASED
            ending = await self._reach_ending(run, outlet, stream, log)
            if ending is None:
                return self._report_refused(log)
            return await self._conclude(ending, stream, log)
        except PublishRefused as refusal:
            self.refuse(refusal)
            return self._report_refused(log)
        finally:
            outlet.close("the run has ended")
            stream.close()
            await run.end_waits()

    async def _reach_ending(
        self,
        run: Run,
        outlet: Outlet,
        stream: RunStream,
        log: structlog.typing.FilteringBoundLogger,
    ) -> Ending | Retry | None:
        if self._stop.is_set():
            # Cancelled between the request and this worker's claim: the agent never begins.
            return self._stopped_ending(run.attempt, has_begun=False)
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
            return self._stopped_ending(run.attempt, has_begun=True)
        return self._ending_of(call.task, run.attempt, stream, log)

    def _stopped_ending(self, attempt: int, *, has_begun: bool) -> Ending | Retry | None:
        if self._refusal is not None or self._cause is None:
            return None
        if isinstance(self._cause, WorkerStops) and has_begun and self._may_retry(attempt):
            return Retry("worker_stopping", 0)
        return self._ending_for(self._cause)

    def _may_retry(self, attempt: int) -> bool:
        return attempt < self._definition.max_attempts

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
        log.info("run_stopping", cause=str(self._refusal or self._cause))
        if self._refusal is not None:
            outlet.close(f"the run was taken from this attempt: {self._refusal}")
        if not await call.stop(self._cancel_grace_s, self._hurry):
            outlet.close("the run has ended: the agent did not stop in time after a cancellation")
            call.abandon()
            self._metrics.agents_abandoned.labels(self._definition.name).inc()
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
        attempt: int,
        stream: RunStream,
        log: structlog.typing.FilteringBoundLogger,
    ) -> Ending | Retry:
        error: BaseException | None
        if task.cancelled():
            error = UnaskedCancellation("the agent raised CancelledError, but nobody had asked")
        else:
            error = task.exception()
        if error is None:
            return endings.completed(task.result(), stream.text, self._duration_ms())
        support_id = new_support_id()
        foreseen = foreseen_in(error)
        # The traceback of what nobody foresaw, also where a task group joined it with what was.
        exc_info = None if error is foreseen else error
        if self._may_retry(attempt) and _is_worth_retrying(foreseen):
            if stream.cancel_requested is not None:
                flag = read_cancel_flag(stream.cancel_requested)
                return endings.cancelled(flag.by, flag.reason, self._duration_ms())
            retry = _retry_after(foreseen, attempt)
            log.warning(
                "attempt_failed",
                support_id=support_id,
                delay_ms=retry.delay_ms,
                reason=None if foreseen is None else str(foreseen),
                exc_info=exc_info,
            )
            return retry
        if foreseen is not None:
            log.info("agent_error", code=foreseen.code, support_id=support_id, exc_info=exc_info)
            return endings.failed(foreseen, support_id)
        log.error("agent_failed", support_id=support_id, exc_info=error)
        return endings.failed_unexpectedly(support_id)

    async def _conclude(
        self,
        ending: Ending | Retry,
        stream: RunStream,
        log: structlog.typing.FilteringBoundLogger,
    ) -> str:
        if isinstance(ending, Retry):
            try:
                await publish_retry(stream, ending)
            except (EncodingFailed, InvalidEvent) as error:
                # What the agent said about its failure cannot be published.
                support_id = new_support_id()
                log.error("retry_not_publishable", support_id=support_id, reason=str(error))
                ending = endings.failed_unexpectedly(support_id)
            else:
                self.retry = ending
                log.info("run_retrying", reason=ending.reason, delay_ms=ending.delay_ms)
                return RETRYING
        ending = await publish_ending(stream, ending, log)
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


class UnaskedCancellation(Exception):
    """The agent raised ``CancelledError`` although nobody had cancelled its run."""


def _is_worth_retrying(error: AgentError | None) -> bool:
    """Whether another attempt may go better: not where the agent, or the user, said no."""
    if isinstance(error, InputNotAnswered):
        return False
    return error is None or error.is_recoverable


def _retry_after(error: AgentError | None, attempt: int) -> Retry:
    delay_ms = retry_delay_ms(attempt)
    if error is None:
        return Retry("agent_failed", delay_ms)
    asked_ms = error.retry_after_ms
    if isinstance(asked_ms, int):
        delay_ms = max(delay_ms, asked_ms)
    return Retry(error.code, delay_ms, error.error_message)
