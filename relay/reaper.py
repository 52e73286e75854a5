"""The reaper: ends, retries or dispatches runs whose deadline has passed.

It runs in every gateway and every worker. The run's hash is the truth; the deadline index says
where to look. Each step is a compare-and-set, so one of many reapers wins, and one that dies
between two steps leaves nothing that the next look does not repair.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Mapping
from typing import Any

import structlog

from relay.codec import RunEnvelope, Task, encode_task
from relay.columns import Columns, OpenTool, lifecycle_columns
from relay.deadlines import SHARDS, Deadlines, parse_member
from relay.errors import (
    AGENT_ERRORS,
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
    truth_from,
)
from relay.orphans import sweep_orphans
from relay.scripts import RedisLink, ScriptFailed, mapped_errors
from relay.tasks import bury, dispatch, has_waiting_tasks

POLL_S = 0.25
TAKE_COUNT = 32
SWEEP_S = 5.0

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
        self._contact_since_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Reaper:
        self._task = asyncio.create_task(self.run(), name="reaper")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def may_act(self) -> bool:
        """Whether contact with Redis was unbroken for a full lease.

        After an outage every lease may have expired although the workers live; they get the
        time of one lease to renew.
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
                if self.may_act:
                    for shard in range(SHARDS):
                        await self._reap(shard)
                    if started_s >= sweep_at_s:
                        sweep_at_s = started_s + SWEEP_S
                        await sweep_orphans(self._link, self._keys, self._lease_ms)
            except (RedisUnavailable, RedisMisconfigured) as error:
                self._contact_since_s = None
                log.debug("reaper waits for Redis", error=str(error))
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
            await self.look_at(user_id, run_id)

    async def look_at(self, user_id: str, run_id: str) -> Decision:
        """Read the truth about a run and do what has to be done.

        Raises:
            RedisUnavailable: Whether it was done is unknown; the run comes up again.
        """
        user = self._keys.user(user_id)
        [reply] = await self._link.run([self._link.call("look", user, run_id, run_id)])
        run = truth_from(reply)
        decision = decide(run, lease_ms=self._lease_ms, cancel_grace_ms=self._cancel_grace_ms)
        if run is None or isinstance(decision, Forget):
            await self._deadlines.drop(user_id, run_id)
        elif isinstance(decision, LookAgain):
            await self._deadlines.set(user_id, run_id, decision.at_ms)
        elif isinstance(decision, Dispatch):
            await self._dispatch(user_id, run_id, run)
        else:
            await self._act(user_id, run_id, run, decision)
        return decision

    async def _dispatch(self, user_id: str, run_id: str, run: RunTruth) -> None:
        # A task that waits in the stream will be taken in its turn. Only where the workers have
        # taken everything and the run still waits, its task may be gone.
        if not await has_waiting_tasks(self._link, self._keys, run.agent):
            await dispatch(self._link, self._keys, Task(user_id, run_id, run.agent))
            log.info("run dispatched again", run_id=run_id, agent=run.agent)
        await self._deadlines.set(user_id, run_id, run.now_ms + self._lease_ms)

    async def _act(self, user_id: str, run_id: str, run: RunTruth, decision: Decision) -> None:
        envelope = RunEnvelope(run_id, run.attempt, run.thread, user_id, run.agent)
        next_look_ms = run.now_ms + 50
        match decision:
            case ExpireInput(request_id):
                await self._expire_input(envelope, run, request_id)
            case ReportStall(idle_ms):
                stalled = {"idle_ms": idle_ms, "last_event": run.last_event}
                event = lifecycle_columns(envelope, EventType.AGENT_STALLED, run.now_ms, stalled)
                await self._amend(envelope, run, "stall", "", [event])
            case FinishCancel():
                by = (run.cancel or {}).get("by", "user")
                ended = {
                    "by": by,
                    "reason": (run.cancel or {}).get("reason"),
                    "duration_ms": max(0, run.now_ms - run.claimed_ms),
                }
                events = [
                    *self._closings(envelope, run, "cancelled"),
                    lifecycle_columns(envelope, EventType.AGENT_CANCELLED, run.now_ms, ended),
                ]
                await self._amend(envelope, run, "", "supersede", events)
            case RetryAttempt(delay_ms):
                retrying = {
                    "attempt": run.attempt + 1,
                    "reason": "worker_lost",
                    "delay_ms": delay_ms,
                }
                events = [
                    *self._closings(envelope, run, "error"),
                    lifecycle_columns(envelope, EventType.AGENT_RETRYING, run.now_ms, retrying),
                ]
                await self._amend(envelope, run, "lease", "supersede", events)
                next_look_ms = run.now_ms + delay_ms
            case LoseRun():
                await self._lose(envelope, run)
        await self._deadlines.set(user_id, run_id, next_look_ms)

    async def _lose(self, envelope: RunEnvelope, run: RunTruth) -> None:
        support_id = f"sup_{secrets.token_hex(6)}"
        guidance = AGENT_ERRORS["worker_lost"]
        data: Mapping[str, Any] = {
            "code": "worker_lost",
            "error_message": guidance.message,
            "is_recoverable": True,
            "recovery_suggestions": list(guidance.recovery_suggestions),
            "support_id": support_id,
        }
        events = [
            *self._closings(envelope, run, "error"),
            lifecycle_columns(envelope, EventType.AGENT_ERROR, run.now_ms, data),
        ]
        if await self._amend(envelope, run, "lease", "supersede", events):
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

    def _closings(self, envelope: RunEnvelope, run: RunTruth, status: str) -> list[Columns]:
        events = []
        for tool_call_id, kept in run.open_tools.items():
            tool = OpenTool.decode(kept)
            closed: dict[str, Any] = {
                "tool_call_id": tool_call_id,
                "tool_name": tool.name,
                "status": status,
                "duration_ms": max(0, run.now_ms - tool.since_ms),
            }
            if status == "error":
                closed["error"] = "The worker was lost before the tool completed."
            events.append(lifecycle_columns(envelope, EventType.TOOL_COMPLETED, run.now_ms, closed))
        for request_id in run.open_inputs:
            resolved = {"request_id": request_id, "outcome": "cancelled", "by": "system"}
            events.append(
                lifecycle_columns(envelope, EventType.INPUT_RESOLVED, run.now_ms, resolved)
            )
        return events

    async def _amend(
        self,
        envelope: RunEnvelope,
        run: RunTruth,
        condition: str,
        supersede: str,
        events: list[Columns],
    ) -> bool:
        """Append events if the run is still as it was seen; tells whether it was."""
        user = self._keys.user(envelope.user_id)
        columns: list[int | str | bytes] = []
        for event in events:
            columns += event
        call = self._link.call(
            "amend",
            user,
            envelope.run_id,
            envelope.run_id,
            run.fence,
            run.seq,
            run.status,
            condition,
            run.updated_ms,
            supersede,
            *columns,
        )
        [reply] = await self._link.run([call])
        if reply[0] != b"ok":
            return False
        if reply[1]:
            next_task = Task(envelope.user_id, reply[1].decode(), reply[2].decode())
            await dispatch(self._link, self._keys, next_task)
        return True
