"""A run that somebody else's worker carries out, published and ended like any other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog

from agent_worker import endings
from agent_worker.attempts import info_of
from agent_worker.conclusion import publish_ending
from agent_worker.endings import REFUSED, UNFINISHED, Ending
from agent_worker.outlet import Outlet
from agent_worker.run import Run
from agent_worker.stops import CancelAsked, StopCause, WorkerStops
from agent_worker.tool import foreseen_in, is_cancellation
from relay.amending import new_support_id
from relay.errors import AgentError, PublishRefused, RelayError
from relay.events import EventType

if TYPE_CHECKING:
    from agent_worker.errands import Errands
    from relay.run_model import Claim
    from relay.run_stream import RunStream

_log = structlog.get_logger(__name__)


class RunCancelled(RelayError):
    """The user, or somebody else, stopped the run. It has ended ``agent_cancelled``.

    Attributes:
        by: Who asked for it.
        reason: Why, where that was said.
    """

    def __init__(self, by: str, reason: str | None) -> None:
        self.by = by
        self.reason = reason
        super().__init__(by, reason)

    def __str__(self) -> str:
        return f"cancelled by {self.by}" + (f": {self.reason}" if self.reason else "")


class BridgedRun(Run):
    """A run opened by a bridge: all that agents have, and its end.

    Attributes:
        result: What ``agent_completed`` tells; the streamed text where it stays None.
        summary: A short form of it.
        usage: What it has cost, in whatever terms.
    """

    def __init__(
        self,
        claim: Claim,
        stream: RunStream,
        errands: Errands,
        on_left: Callable[[BridgedRun], None],
        on_end: Callable[[BridgedRun], None],
    ) -> None:
        self._clock = time.monotonic
        outlet = Outlet(stream, clock=self._clock)
        super().__init__(info_of(claim), outlet, errands)
        self.result: Any = None
        self.summary: str | None = None
        self.usage: dict[str, Any] | None = None
        self._stream = stream
        self._on_left = on_left
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._began_s = self._clock()
        self._task: asyncio.Task[Any] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._cause: StopCause | None = None
        self._refusal: PublishRefused | None = None
        self._is_ending = False
        self._is_ended = False
        self._status = UNFINISHED
        self._log = _log.bind(run_id=self.run_id, agent=self.agent, user_id=self.user_id)

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for the run to stop."""
        return isinstance(self._cause, CancelAsked)

    @property
    def is_ended(self) -> bool:
        """Whether nothing more can be published."""
        return self._is_ended

    @property
    def status(self) -> str:
        """How it ended, in one word, as ``relay_worker_runs_ended_total`` counts it."""
        return self._status

    @property
    def lasted_s(self) -> float:
        """How long ago it began."""
        return self._clock() - self._began_s

    # --- the end ---

    async def complete(self, result: Any = None) -> None:
        """End the run well; without a result, with ``self.result`` or the streamed text.

        Raises:
            PublishRefused: The run was ended or taken over elsewhere.
        """
        given = self.result if result is None else result
        ending = endings.completed(given, self.text, self._duration_ms())
        ending.data.update(summary=self.summary, usage=self.usage)
        await self._end(ending)

    async def fail(self, error: BaseException) -> None:
        """End the run with an error.

        The user sees the text of an ``AgentError``, also of one in an exception group; of any other
        exception a general sentence, and its text goes to the log under the support id.

        Raises:
            PublishRefused: The run was ended or taken over elsewhere.
        """
        support_id = new_support_id()
        foreseen = foreseen_in(error)
        if foreseen is not None:
            self._log.info(
                "agent_error",
                code=foreseen.code,
                support_id=support_id,
                # A task group's other errors are nowhere else.
                exc_info=None if error is foreseen else error,
            )
            await self._end(endings.failed(foreseen, support_id))
        else:
            self._log.error("agent_failed", support_id=support_id, exc_info=error)
            await self._end(endings.failed_unexpectedly(support_id))

    async def end_for(self, cause: StopCause) -> None:
        """End the run because it was stopped from outside.

        Raises:
            PublishRefused: The run was ended or taken over elsewhere.
        """
        if isinstance(cause, CancelAsked):
            await self._end(endings.cancelled(cause.by, cause.reason, self._duration_ms()))
        else:
            error = AgentError(
                "worker_lost", "The worker was stopped before the agent could finish."
            )
            await self._end(endings.failed(error, new_support_id()))

    async def _end(self, ending: Ending) -> None:
        if self._ending is not None and asyncio.current_task() is not self._ending:
            await self.settle()
        if self._is_ended:
            raise self._refusal or PublishRefused(f"run {self.run_id} has ended already")
        self._is_ending = True
        try:
            ending = await publish_ending(self._stream, ending, self._log)
            self._status = ending.status
            self._log.info("run_ended", status=ending.status, duration_ms=self._duration_ms())
        except PublishRefused:
            self._status = REFUSED
            raise
        finally:
            await self.abandon()

    async def abandon(self) -> None:
        """Publish nothing more. A run without an end is ended by the reaper after its lease."""
        if not self._is_ended:
            self._let_go()
            await self.end_waits()

    def _let_go(self) -> None:
        if self._is_ended:
            return
        self._is_ending = self._is_ended = True
        self._outlet.close("the run has ended")
        self._stream.close()
        self._on_end(self)

    def _duration_ms(self) -> int:
        return max(0, round(self.lasted_s * 1000))

    # --- what is told from outside ---

    def request_stop(self, cause: StopCause) -> None:
        """Stop the block that carries out the run; without one, end the run. The first counts."""
        if self._cause is not None or self._is_ending:
            return
        self._cause = cause
        if self._task is not None:
            self._task.cancel()
        else:
            self._outlet.close(f"the run has ended: {cause}")
            self._ending = asyncio.create_task(self._end_alone(cause), name=f"end-{self.run_id}")

    def refuse(self, refusal: PublishRefused) -> None:
        """Stop without publishing anything: the run was ended or taken over elsewhere."""
        if self._refusal is not None or self._is_ending:
            return
        self._refusal = refusal
        self._status = REFUSED
        self._log.warning("run_refused", reason=str(refusal))
        self._outlet.close(f"the run was taken from this attempt: {refusal}")
        if self._task is not None:
            self._task.cancel()
        else:
            self._ending = asyncio.create_task(self.abandon(), name=f"end-{self.run_id}")

    def answer(self, request_id: str, answer: Mapping[str, Any]) -> None:
        """Take what became of an input request."""
        self.receive_answer(request_id, answer)

    async def _end_alone(self, cause: StopCause) -> None:
        try:
            await self.end_for(cause)
        except PublishRefused as refusal:
            self._log.info("run_ended_elsewhere", reason=str(refusal))

    async def settle(self) -> None:
        """Wait for an end that was begun from outside."""
        if self._ending is not None:
            await asyncio.wait({self._ending})

    # --- the block ---

    async def begin(self, model: str | None, context: Mapping[str, Any] | None) -> None:
        """Publish ``agent_started``."""
        started = {"model": model, "context": None if context is None else dict(context)}
        await self._outlet.publish(EventType.AGENT_STARTED, started)
        self._log.info("run_started")

    async def __aenter__(self) -> Self:
        # Stopped between the opening and the block: the block must not begin.
        await self.settle()
        if self._refusal is not None:
            raise self._refusal
        if self._cause is not None:
            raise self._stopped(self._cause)
        self._task = asyncio.current_task()
        return self

    async def __aexit__(
        self,
        _exc_type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        self._is_ending = True
        is_stopped = self._cause is not None or self._refusal is not None
        is_ours = task is not None and is_stopped and task.uncancel() == 0
        if isinstance(error, GeneratorExit | KeyboardInterrupt):
            self._leave_early()
            return
        if is_ours and (error is None or not is_cancellation(error)):
            # The block ended first; its cancellation may still wait for the next await.
            await _take_cancellation()
        await self._leave(error, is_ours=is_ours)

    def _leave_early(self) -> None:
        """End the run from a task of its own: here nothing may be awaited, or must not."""
        if self._is_ended:
            return
        self._outlet.close("the block was left early")
        # Should nothing be published any more, the reaper ends the run after its lease.
        self._on_left(self)
        try:
            # A generator that nobody keeps may be collected in any thread.
            self._loop.call_soon_threadsafe(self._end_early)
        except RuntimeError:
            # The loop is closed.
            self._let_go()

    def _end_early(self) -> None:
        if self._refusal is not None:
            ending = self.abandon()
        else:
            ending = self._end_alone(self._cause or WorkerStops())
        self._ending = asyncio.create_task(ending, name=f"end-{self.run_id}")
        # Cancelled before it began, it lets go of nothing itself.
        self._ending.add_done_callback(lambda _: self._let_go())

    async def _leave(self, error: BaseException | None, *, is_ours: bool) -> None:
        if self._is_ended:
            return
        if self._refusal is not None:
            await self.abandon()
            if error is None or (is_ours and is_cancellation(error)):
                raise self._refusal from error
        elif error is None:
            await self.complete()
        elif self._cause is not None:
            await self.end_for(self._cause)
            if is_ours and is_cancellation(error):
                raise self._stopped(self._cause) from error
        elif is_cancellation(error):
            # The application cancels its own work, most likely because it stops.
            await self._tell(self.end_for(WorkerStops()))
        else:
            await self._tell(self.fail(error))

    def _stopped(self, cause: StopCause) -> RelayError:
        if isinstance(cause, CancelAsked):
            return RunCancelled(cause.by, cause.reason)
        return PublishRefused(f"run {self.run_id}: the bridge was closed")

    async def _tell(self, ending: Coroutine[Any, Any, None]) -> None:
        """Publish an end beside an exception that matters more."""
        try:
            await ending
        except PublishRefused as refusal:
            self._log.info("run_ended_elsewhere", reason=str(refusal))


async def _take_cancellation() -> None:
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        # It was ours, and has been taken back.
        return
