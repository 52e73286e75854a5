"""The reaper: ends, retries or dispatches runs whose deadline has passed.

It runs in every gateway and every worker. The run's hash is the truth; the deadline index says
where to look. Each step is a compare-and-set, so one of many reapers wins, and one that dies
between two steps leaves nothing that the next look does not repair.
"""

from __future__ import annotations

import asyncio
import random
import time

import structlog

from relay.amending import (
    amend_run,
    closing_events,
    end_broken_run,
    error_event,
    look_at_run,
    new_support_id,
)
from relay.cancellation import end_tasks
from relay.cancelling import Cancelling
from relay.codec import RunEnvelope, Task, encode_task
from relay.columns import Columns, lifecycle_columns
from relay.deadlines import SHARDS, Deadlines, member_of, parse_member
from relay.errors import (
    DecodingFailed,
    RedisMisconfigured,
    RedisUnavailable,
    RequestRefused,
)
from relay.events import EventType
from relay.inputs import resolve_input
from relay.keys import Keys
from relay.lifecycle import (
    Decision,
    Dispatch,
    ExpireInput,
    FinishCancel,
    Forget,
    LookAgain,
    LoseRun,
    ReportStall,
    RetryAttempt,
    RunTruth,
    decide,
)
from relay.orphans import sweep_orphans
from relay.scripts import RedisLink, ScriptFailed, mapped_errors
from relay.tasks import bury, dispatch, has_waiting_tasks

POLL_S = 0.25
TAKE_COUNT = 32
SWEEP_S = 5.0
MOST_FAILED_LOOKS = 5
"""A run that cannot be understood this often in a row is given up: it would never be."""

TOOL_LOST = "The worker was lost before the tool completed."

log = structlog.stdlib.get_logger(__name__)


class Reaper:
    """Looks at what is due, and does what ``relay.lifecycle`` decides.

    Args:
        link: Redis.
        keys: Key names.
        lease_ms: How long a worker's claim lasts without renewal.
        cancel_grace_ms: How long a worker may take to stop a cancelled run.
    """

    def __init__(self, link: RedisLink, keys: Keys, *, lease_ms: int, cancel_grace_ms: int) -> None:
        self._link = link
        self._keys = keys
        self._lease_ms = lease_ms
        self._cancel_grace_ms = cancel_grace_ms
        self._deadlines = Deadlines(link, keys)
        self._cancelling = Cancelling(link, keys, self._deadlines, cancel_grace_ms)
        self._failed_looks: dict[bytes, int] = {}
        self._contact_since_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Reaper:
        self._task = asyncio.create_task(self.run(), name="reaper")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await end_tasks([self._task])

    @property
    def may_act(self) -> bool:
        """Whether contact with Redis was unbroken for a full lease, so that workers may be judged.

        After an outage every lease may have expired although the workers live; they get the
        time of one lease to renew. What needs no judgement is done at once (ADR 0020).
        """
        since_s = self._contact_since_s
        return since_s is not None and time.monotonic() - since_s >= self._lease_ms / 1000

    async def run(self) -> None:
        """Reap until cancelled."""
        sweep_at_s = time.monotonic() + SWEEP_S
        while True:
            await asyncio.sleep(POLL_S * random.uniform(0.8, 1.2))  # noqa: S311
            started_s = time.monotonic()
            try:
                await self._keep_contact()
                for shard in range(SHARDS):
                    await self._reap(shard)
                if self.may_act and started_s >= sweep_at_s:
                    sweep_at_s = started_s + SWEEP_S
                    await sweep_orphans(self._link, self._keys, self._lease_ms)
            except RedisUnavailable as error:
                self._contact_since_s = None
                log.debug("reaper waits for Redis", error=str(error))
            except RedisMisconfigured as error:
                # This does not pass by itself, and meanwhile nobody looks after lost runs here.
                self._contact_since_s = None
                log.error("reaper refused by Redis", error=str(error))
            except (ScriptFailed, DecodingFailed) as error:
                log.error("reaper failed", error=str(error))

    async def _keep_contact(self) -> None:
        started_s = time.monotonic()
        with mapped_errors(self._link.url):
            await self._link.client.ping()
        now_s = time.monotonic()
        # An answer that took this long means that Redis, or we, stood still meanwhile.
        if now_s - started_s > self._lease_ms / 2000:
            self._contact_since_s = None
        elif self._contact_since_s is None:
            self._contact_since_s = now_s

    async def _reap(self, shard: int) -> None:
        for member in await self._deadlines.take(shard, TAKE_COUNT):
            try:
                user_id, run_id = parse_member(member)
            except DecodingFailed as error:
                log.warning("deadline not understood", error=str(error))
                await self._deadlines.discard(shard, member)
                continue
            try:
                await self.look_at(user_id, run_id, may_judge=self.may_act)
            except (ScriptFailed, DecodingFailed) as error:
                # What one run holds must not keep the others from being looked at.
                await self._look_failed(user_id, run_id, error)
            else:
                self._failed_looks.pop(member, None)

    async def _look_failed(self, user_id: str, run_id: str, error: Exception) -> None:
        """Try a few times to understand a run; then end it, and look at it no more."""
        member = member_of(user_id, run_id).encode()
        looks = self._failed_looks.get(member, 0) + 1
        support_id = new_support_id()
        log.error("run not understood", run_id=run_id, error=str(error), support_id=support_id)
        if looks < MOST_FAILED_LOOKS:
            self._failed_looks[member] = looks
            return
        self._failed_looks.pop(member, None)
        try:
            await end_broken_run(self._link, self._keys, user_id, run_id, support_id)
        except (ScriptFailed, DecodingFailed):
            log.exception("run given up", run_id=run_id, support_id=support_id)
        task = encode_task(Task(user_id, run_id, "unknown"))
        reason = f"what Redis holds of its run cannot be used: {error}"
        await bury(self._link, self._keys, "unknown", task, reason)
        await self._deadlines.drop(user_id, run_id)

    async def look_at(self, user_id: str, run_id: str, *, may_judge: bool = True) -> Decision:
        """Read the truth about a run and do what has to be done.

        Args:
            user_id: Whose run.
            run_id: The run.
            may_judge: Whether silence of its worker means anything; if not, what follows from
                that waits for the next look.

        Raises:
            RedisUnavailable: Whether it was done is unknown; the run comes up again.
        """
        found = await look_at_run(self._link, self._keys, user_id, run_id)
        envelope, run = (None, None) if found is None else found
        decision = decide(run, lease_ms=self._lease_ms, cancel_grace_ms=self._cancel_grace_ms)
        if run is None or envelope is None or isinstance(decision, Forget):
            await self._deadlines.drop(user_id, run_id)
        elif isinstance(decision, LookAgain):
            await self._deadlines.set(user_id, run_id, decision.at_ms)
        elif isinstance(decision, Dispatch):
            await self._dispatch(user_id, run_id, run)
        elif may_judge or isinstance(decision, ExpireInput):
            await self._act(envelope, run, decision)
        return decision

    async def _dispatch(self, user_id: str, run_id: str, run: RunTruth) -> None:
        # A task that waits in the stream will be taken in its turn. Only where the workers have
        # taken everything and the run still waits, its task may be gone.
        if await self._is_first_dispatch(user_id, run_id, run) or not await has_waiting_tasks(
            self._link, self._keys, run.agent
        ):
            await dispatch(self._link, self._keys, Task(user_id, run_id, run.agent))
            log.info("run dispatched again", run_id=run_id, agent=run.agent)
        await self._deadlines.set(user_id, run_id, run.now_ms + self._lease_ms)

    async def _is_first_dispatch(self, user_id: str, run_id: str, run: RunTruth) -> bool:
        """Whether this is the first look at a delayed attempt whose time has come.

        Its task was settled with the attempt before, so it has none in the stream, whatever else
        waits there: under steady load the stream may never be empty.
        """
        if run.status != "retrying":
            return False
        key = self._keys.user(user_id).run(run_id)
        with mapped_errors(self._link.url):
            return bool(await self._link.client.hsetnx(key, f"dispatched:{run.attempt}", 1))

    async def _act(self, envelope: RunEnvelope, run: RunTruth, decision: Decision) -> None:
        next_look_ms = run.now_ms + 50
        match decision:
            case ExpireInput(request_id):
                await self._expire_input(envelope, run, request_id)
            case ReportStall(idle_ms):
                stalled = {"idle_ms": idle_ms, "last_event": run.last_event}
                event = lifecycle_columns(envelope, EventType.AGENT_STALLED, run.now_ms, stalled)
                await self._amend(envelope, run, [event], condition="stall", supersede=False)
            case FinishCancel():
                by = (run.cancel or {}).get("by", "user")
                ended = {
                    "by": by,
                    "reason": (run.cancel or {}).get("reason"),
                    "duration_ms": max(0, run.now_ms - run.claimed_ms),
                }
                events = [
                    *closing_events(envelope, run, "cancelled"),
                    lifecycle_columns(envelope, EventType.AGENT_CANCELLED, run.now_ms, ended),
                ]
                await self._amend(envelope, run, events)
            case RetryAttempt(delay_ms):
                retrying = {
                    "attempt": run.attempt + 1,
                    "reason": "worker_lost",
                    "delay_ms": delay_ms,
                }
                events = [
                    *_late_start(envelope, run),
                    *closing_events(envelope, run, "error", TOOL_LOST),
                    lifecycle_columns(envelope, EventType.AGENT_RETRYING, run.now_ms, retrying),
                ]
                await self._amend(envelope, run, events, condition="lease")
                next_look_ms = run.now_ms + delay_ms
            case LoseRun():
                await self._lose(envelope, run)
        await self._deadlines.set(envelope.user_id, envelope.run_id, next_look_ms)

    async def _lose(self, envelope: RunEnvelope, run: RunTruth) -> None:
        support_id = new_support_id()
        events = [
            *closing_events(envelope, run, "error", TOOL_LOST),
            error_event(envelope, run, "worker_lost", support_id),
        ]
        if await self._amend(envelope, run, events, condition="lease"):
            reason = f"its worker {run.worker} was lost in attempt {run.attempt}, the last one"
            task = Task(envelope.user_id, envelope.run_id, envelope.agent)
            await bury(self._link, self._keys, envelope.agent, encode_task(task), reason)
            log.warning(
                "run lost its worker",
                run_id=envelope.run_id,
                worker_id=run.worker,
                attempt=run.attempt,
                support_id=support_id,
            )

    async def _expire_input(self, envelope: RunEnvelope, run: RunTruth, request_id: str) -> None:
        resolved = {"request_id": request_id, "outcome": "expired", "by": "system"}
        event = lifecycle_columns(envelope, EventType.INPUT_RESOLVED, run.now_ms, resolved)
        try:
            await resolve_input(self._link, self._keys, envelope, request_id, resolved, event)
        except RequestRefused as refused:
            # Answered, or ended, since we looked: there is nothing left to expire.
            log.debug("input not expired", run_id=envelope.run_id, reason=str(refused))

    async def _amend(
        self,
        envelope: RunEnvelope,
        run: RunTruth,
        events: list[Columns],
        *,
        condition: str = "",
        supersede: bool = True,
    ) -> bool:
        is_done = await amend_run(
            self._link,
            self._keys,
            envelope,
            run,
            events,
            condition=condition,
            supersede=supersede,
        )
        if is_done and supersede:
            # What the attempt asked for is of use to nobody any more.
            await self._cancelling.cancel_children(envelope.user_id, envelope.run_id)
        return is_done


def _late_start(envelope: RunEnvelope, run: RunTruth) -> list[Columns]:
    """Start an attempt whose worker died right after claiming it: it counts, and can be retried."""
    if run.has_begun:
        return []
    return [lifecycle_columns(envelope, EventType.AGENT_STARTED, run.now_ms, {})]
