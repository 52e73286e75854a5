"""Takes tasks while there is room, claims their runs and carries them out.

The dispatcher never has more tasks in hand than the worker's concurrency. A task stays in its
stream until its run has ended here, so that it is found again if this process dies.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from agent_worker.attempts import info_of, lease_of
from agent_worker.definition import AgentDefinition
from agent_worker.endings import REFUSED, UNFINISHED
from agent_worker.errands import RegistryErrands
from agent_worker.execution import RELEASED, RETRYING, RunExecution
from agent_worker.leases import LeaseKeeper
from agent_worker.metrics import WorkerMetrics
from agent_worker.patience import REDIS_AWAY, delays, until_redis_answers
from agent_worker.stops import CancelAsked, WorkerStops, cancel_asked
from agent_worker.task_streams import EntryKey, GroupMissing, TaskEntry, TaskStreams
from relay.amending import end_broken_run, new_support_id
from relay.cancellation import end_tasks
from relay.codec import Task, decode_task
from relay.errors import DecodingFailed, NewerVersion
from relay.keys import Keys
from relay.publisher import Publisher
from relay.run_model import AgentInfo, Claim, NotClaimed
from relay.runs import RunRegistry
from relay.scripts import RedisLink, ScriptFailed
from relay.tasks import age_ms, bury, pass_on

NEWER_PATIENCE_MS = 15 * 60_000
"""A task of a newer version goes to the dead letters when nobody has understood it for so long."""

NEWER_FIRST_WAIT_S, NEWER_MOST_WAIT_S = 0.25, 5.0
"""How long such a task is held before it goes back; the longer, the longer it has been about."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DispatcherLimits:
    """Bounds of one worker process."""

    concurrency: int
    lease_ms: int
    cancel_grace_s: float


@dataclass(frozen=True, slots=True)
class _RunAtWork:
    """A run that is claimed here, or is about to be.

    Attributes:
        fence: One for all tries to claim it: a claim whose answer was lost is answered again.
    """

    task: Task
    execution: RunExecution
    fence: str


class Dispatcher:
    """One worker's tasks and runs.

    Args:
        worker_id: The name under which runs are claimed and tasks are read.
        definitions: The agents by name.
    """

    def __init__(
        self,
        worker_id: str,
        link: RedisLink,
        keys: Keys,
        definitions: Mapping[str, AgentDefinition],
        streams: TaskStreams,
        registry: RunRegistry,
        publisher: Publisher,
        leases: LeaseKeeper,
        limits: DispatcherLimits,
        metrics: WorkerMetrics,
    ) -> None:
        self._worker_id = worker_id
        self._link = link
        self._keys = keys
        self._definitions = definitions
        self._streams = streams
        self._registry = registry
        self._publisher = publisher
        self._leases = leases
        self._limits = limits
        self._metrics = metrics
        self._lent = 0
        self._in_hand: dict[EntryKey, asyncio.Task[None]] = {}
        self._at_work: dict[str, _RunAtWork] = {}
        self._room = asyncio.Event()
        self._room.set()
        self._is_taking = True
        self._is_closing = False

    @property
    def active_count(self) -> int:
        """How many tasks are in hand."""
        return len(self._in_hand)

    @property
    def agent_names(self) -> list[str]:
        """The names of this worker's agents."""
        return sorted(self._definitions)

    # --- taking tasks ---

    async def take_tasks(self) -> None:
        """Take tasks and start their runs until ``stop_taking``. Outlives any loss of Redis."""
        is_prepared = False
        waits = delays()
        while self._is_taking:
            try:
                if not is_prepared:
                    await self.register()
                    for entry in await self._streams.prepare(self._in_hand.keys()):
                        self._start(entry)
                    is_prepared = True
                await self._room.wait()
                room = max(1, self._free_places)
                for entry in await self._streams.take(room) if self._is_taking else ():
                    self._start(entry)
                waits = delays()
            except GroupMissing:
                _log.warning("task_streams_missing", hint="Redis was emptied; making them anew.")
                is_prepared = False
            except (*REDIS_AWAY, ScriptFailed) as error:
                is_prepared = False
                self._metrics.redis_failures.labels("tasks").inc()
                _log.warning("tasks_not_readable", reason=str(error))
                await asyncio.sleep(next(waits))

    async def register(self) -> None:
        """Make this worker's agents known to the gateways."""
        await self._registry.register_agents(
            [
                AgentInfo(agent.name, agent.description, agent.policy)
                for agent in self._definitions.values()
            ]
        )

    def stop_taking(self) -> None:
        """Take no more tasks; what is in hand goes on."""
        self._is_taking = False
        self._room.set()

    def _start(self, entry: TaskEntry) -> None:
        task = asyncio.create_task(self._carry_out(entry), name=f"task-{entry.entry_id.decode()}")
        self._in_hand[entry.key] = task
        task.add_done_callback(lambda _: self._let_go(entry))
        self._count_room()

    @property
    def _free_places(self) -> int:
        # A run that waits for a run below it lends its place: otherwise parents that wait could
        # take all places, and no child would ever begin (ADR 0007).
        return self._limits.concurrency - len(self._in_hand) + self._lent

    def _count_room(self) -> None:
        if self._free_places > 0 or not self._is_taking:
            self._room.set()
        else:
            self._room.clear()

    def _lend(self, change: int) -> None:
        self._lent += change
        self._count_room()

    def _let_go(self, entry: TaskEntry) -> None:
        task = self._in_hand.pop(entry.key)
        self._count_room()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # The entry stays in its stream; whoever claims idle entries tries it again.
            _log.error("task_failed", agent=entry.agent, exc_info=error)

    # --- one task ---

    async def _carry_out(self, entry: TaskEntry) -> None:
        if entry.fields is None:
            await self._settle(entry)
            return
        try:
            task = self._decode(entry)
        except NewerVersion as error:
            await self._leave_to_newer(entry, entry.fields, error)
            return
        except DecodingFailed as error:
            await self._bury(entry, str(error))
            return
        try:
            await self._carry_out_run(task)
        except (DecodingFailed, ScriptFailed) as error:
            await self._bury(entry, str(error))
            await self._end_broken(task)
        else:
            # Also after a refusal: whoever superseded the attempt was told by a task of its own.
            await self._settle(entry)

    async def _leave_to_newer(
        self, entry: TaskEntry, fields: Mapping[bytes, bytes], error: NewerVersion
    ) -> None:
        """Give the task back after a while: in a rolling upgrade newer workers are near."""
        left_ms = age_ms(entry.entry_id, fields)
        if left_ms >= NEWER_PATIENCE_MS:
            reason = f"{error}; no newer worker took it for {left_ms // 60_000} minutes"
            await self._bury(entry, reason)
            return
        if left_ms == 0:
            _log.warning("task_left_to_newer_workers", agent=entry.agent, reason=str(error))
        self._metrics.tasks_skipped.labels("newer_version").inc()
        self._lend(1)
        try:
            await asyncio.sleep(min(max(left_ms / 4_000, NEWER_FIRST_WAIT_S), NEWER_MOST_WAIT_S))
        finally:
            self._lend(-1)

        async def pass_task_on() -> None:
            # Redis serves who has waited longest. Waiting anew, this worker comes after the others.
            await self._streams.wake()
            await pass_on(self._link, self._keys, entry.agent, entry.entry_id, fields)

        await until_redis_answers(pass_task_on, "pass_on", self._metrics)

    async def _end_broken(self, task: Task) -> None:
        """End a run whose task was buried: left queued, it would be dispatched again for ever."""
        support_id = new_support_id()
        _log.error("run_not_usable", run_id=task.run_id, support_id=support_id)
        try:
            await until_redis_answers(
                lambda: end_broken_run(
                    self._link, self._keys, task.user_id, task.run_id, support_id
                ),
                "end",
                self._metrics,
            )
        except (DecodingFailed, ScriptFailed, ValueError) as error:
            # The reaper gives it up after a few looks.
            _log.error("run_not_ended", run_id=task.run_id, reason=str(error))

    def _decode(self, entry: TaskEntry) -> Task:
        if entry.payload is None:
            raise DecodingFailed("not a task: the entry has no such field")
        task = decode_task(entry.payload)
        if task.agent != entry.agent:
            raise DecodingFailed(
                f"agent {task.agent!r} is unknown here: the task came from the stream of agent "
                f"{entry.agent!r}"
            )
        return task

    async def _carry_out_run(self, task: Task) -> None:
        if task.run_id in self._at_work:
            self._metrics.tasks_skipped.labels("in_hand").inc()
            return
        execution = RunExecution(
            self._definitions[task.agent],
            cancel_grace_s=self._limits.cancel_grace_s,
            metrics=self._metrics,
        )
        at_work = _RunAtWork(task, execution, secrets.token_hex(8))
        # Known before the claim: a cancel signal may overtake the claim's answer.
        self._at_work[task.run_id] = at_work
        try:
            claim = await until_redis_answers(lambda: self._claim(at_work), "claim", self._metrics)
            if isinstance(claim, NotClaimed):
                self._metrics.tasks_skipped.labels(claim.reason).inc()
                _log.info("task_skipped", run_id=task.run_id, reason=claim.reason)
                return
            if self._is_closing:
                execution.request_stop(WorkerStops())
            await self._execute(claim, execution)
        finally:
            del self._at_work[task.run_id]

    async def _claim(self, at_work: _RunAtWork) -> Claim | NotClaimed:
        task = at_work.task
        definition = self._definitions[task.agent]
        try:
            return await self._registry.claim(
                task.user_id,
                task.run_id,
                self._worker_id,
                self._limits.lease_ms,
                fence=at_work.fence,
                max_attempts=definition.max_attempts,
                stall_after_ms=round(definition.stall_after_s * 1000),
            )
        except ValueError as error:
            raise DecodingFailed(f"not a task: {error}") from error

    async def _execute(self, claim: Claim, execution: RunExecution) -> None:
        agent = claim.envelope.agent
        if claim.cancel is not None:
            execution.request_stop(cancel_asked(claim.cancel))
        stream = self._publisher.open(claim, on_refused=execution.refuse)
        errands = RegistryErrands(self._registry, claim, self._metrics, self._lend)
        lease = lease_of(claim, self._keys, execution)
        self._leases.hold(lease)
        began_s = time.monotonic()
        status = UNFINISHED
        self._metrics.runs_active.labels(agent).inc()
        try:
            status = await execution.carry_out(info_of(claim), stream, errands)
        finally:
            self._leases.release(lease)
            self._metrics.runs_active.labels(agent).dec()
            self._metrics.runs_ended.labels(agent, status).inc()
            if status not in (REFUSED, RELEASED):
                self._metrics.run_seconds.labels(agent).observe(time.monotonic() - began_s)
        if status in (RETRYING, RELEASED):
            delay_ms = 0 if execution.retry is None else execution.retry.delay_ms
            await until_redis_answers(
                lambda: self._registry.dispatch_again(claim, delay_ms), "retry", self._metrics
            )

    async def _settle(self, entry: TaskEntry) -> None:
        await until_redis_answers(lambda: self._streams.settle(entry), "settle", self._metrics)

    async def _bury(self, entry: TaskEntry, reason: str) -> None:
        self._metrics.tasks_dead_lettered.inc()
        _log.error(
            "task_dead_lettered",
            agent=entry.agent,
            entry_id=entry.entry_id.decode(),
            reason=reason,
        )
        await until_redis_answers(
            lambda: bury(
                self._link,
                self._keys,
                entry.agent,
                entry.raw,
                reason,
                entry_id=entry.entry_id,
            ),
            "dead_letter",
            self._metrics,
        )
        await self._settle(entry)

    # --- stopping ---

    def cancel(self, run_id: str, cause: CancelAsked) -> None:
        """Pass on that somebody asked for a run to stop; ignored where the run is not here."""
        at_work = self._at_work.get(run_id)
        if at_work is not None:
            at_work.execution.request_stop(cause)

    def answer(self, run_id: str, request_id: str, answer: Mapping[str, Any]) -> None:
        """Pass on what became of an input request; ignored where the run is not here."""
        at_work = self._at_work.get(run_id)
        if at_work is not None:
            at_work.execution.answer(request_id, answer)

    async def drain(self, timeout_s: float, cut: asyncio.Event) -> bool:
        """Let what is in hand finish; say whether it did before the time, or ``cut``, was up."""
        deadline_s = time.monotonic() + timeout_s
        cutting = asyncio.create_task(cut.wait())
        try:
            while self._in_hand and not cut.is_set():
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    break
                await asyncio.wait(
                    {*self._in_hand.values(), cutting},
                    timeout=left_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            cutting.cancel()
        return not self._in_hand

    def end_runs(self) -> None:
        """End every run that is at work, or is claimed from now on, because the worker stops."""
        self._is_closing = True
        for at_work in self._at_work.values():
            at_work.execution.request_stop(WorkerStops())

    def hurry(self) -> None:
        """Cut short the time that stopping agents have left."""
        for at_work in self._at_work.values():
            at_work.execution.hurry()

    async def close(self, timeout_s: float) -> None:
        """Wait for everything in hand, and give up on it when the time is up."""
        if not self._in_hand:
            return
        tasks = list(self._in_hand.values())
        _, pending = await asyncio.wait(tasks, timeout=timeout_s)
        for task in pending:
            _log.error("run_left_unfinished", task=task.get_name(), hint="Redis did not answer.")
        await end_tasks(pending)
