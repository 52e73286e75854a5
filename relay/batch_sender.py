"""Sending batches: what is due in one write, answers by their order, again where none came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from relay.batches import NOTHING_NEW, Acknowledged, Batch
from relay.cancellation import end_tasks
from relay.errors import PublishRefused, RedisMisconfigured, RedisUnavailable, RunEnded
from relay.key_probes import is_wrong_type
from relay.pipeline import Pipeline
from relay.publish_lane import PublishLane
from relay.resp import pack
from relay.scripts import RedisLink, ScriptFailed
from relay.staging import stage_bodies

MOST_FAILURES = 5
"""A run whose script fails this often in a row is given up: it would never succeed."""

WRITE_BYTES = 256 * 1024
"""After this much the connection is asked whether it takes more."""

_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0

log = structlog.stdlib.get_logger(__name__)


class BatchSender:
    """Brings the batches of all lanes to Redis, one of each at a time.

    Args:
        link: Where to.
        on_acknowledged: Called when Redis has a batch and told something with it, before its stream
            goes on.
        on_refused: Called when Redis takes no more events of a lane.

    Attributes:
        last_error: What went wrong last; None if nothing has.
    """

    def __init__(
        self,
        link: RedisLink,
        *,
        on_acknowledged: Callable[[PublishLane, Acknowledged], None],
        on_refused: Callable[[PublishLane, PublishRefused], None],
    ) -> None:
        self.last_error: str | None = None
        self._link = link
        self._on_acknowledged = on_acknowledged
        self._on_refused = on_refused
        self._script = link.scripts["publish"]
        self._due: deque[PublishLane] = deque()
        self._flush_handle: asyncio.Handle | None = None
        # None stands for the answer to SCRIPT LOAD.
        self._in_flight: deque[tuple[PublishLane, Batch] | None] = deque()
        self._answered = 0
        self._watch_timer: asyncio.TimerHandle | None = None
        self._pipeline: Pipeline | None = None
        self._must_load = False
        self._wanted = asyncio.Event()
        self._lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._outage_s = 0.0

    @property
    def is_available(self) -> bool:
        """Whether Redis answered last."""
        return self._outage_s == 0.0

    def start(self) -> None:
        """Begin to send."""
        self._loop = asyncio.get_running_loop()
        self._start(self._keep_connected(), "publisher")

    async def aclose(self) -> None:
        """Stop sending."""
        self._is_closed = True
        for timer in (self._flush_handle, self._watch_timer):
            if timer is not None:
                timer.cancel()
        if self._tasks:
            await end_tasks(list(self._tasks))

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def send_soon(self, lane: PublishLane) -> None:
        """Send what the lane's stream holds when the event loop comes round."""
        if not lane.is_busy and not lane.is_queued:
            lane.is_queued = True
            self._due.append(lane)
            self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flush_handle is None and not self._is_closed:
            self._flush_handle = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_handle = None
        if self._pipeline is None:
            self._wanted.set()
            return
        chunks: list[bytes] = []
        size = 0
        if self._must_load and self._due:
            self._must_load = False
            chunks.append(pack("SCRIPT", "LOAD", self._script.source))
            self._in_flight.append(None)
        while self._due and self._pipeline.is_writable:
            lane = self._due.popleft()
            lane.is_queued = False
            if not (lane.is_open and lane.stream.batches.is_due):
                continue
            try:
                batch, arguments = lane.stream.batches.next_batch()
                command = lane.pack(self._pipeline.instance, arguments)
            except Exception as error:
                # It would fail again, and the other runs must not suffer from it.
                log.exception("batch not sent", run_id=lane.stream.claim.run_id)
                self._refuse(lane, f"its events cannot be sent: {error}")
                continue
            lane.is_busy = True
            if batch.bodies and not batch.is_staged:
                lane.staging = self._start(self._stage(lane, batch), "publisher-staging")
                continue
            chunks.append(command)
            self._in_flight.append((lane, batch))
            size += len(command)
            if size > WRITE_BYTES:
                self._pipeline.write(b"".join(chunks))
                chunks, size = [], 0
        if chunks:
            self._pipeline.write(b"".join(chunks))
        if self._in_flight and self._watch_timer is None:
            self._watch(self._answered)

    def _watch(self, answered_before: int) -> None:
        self._watch_timer = self._loop.call_later(
            self._link.timeout_s, self._look_for_answers, answered_before
        )

    def _look_for_answers(self, answered_before: int) -> None:
        """Give a connection up that has answered nothing since the last look."""
        self._watch_timer = None
        if not self._in_flight:
            return
        if self._answered == answered_before:
            self._give_up(RedisUnavailable(f"Redis has not answered for {self._link.timeout_s} s"))
        else:
            self._watch(self._answered)

    async def _stage(self, lane: PublishLane, batch: Batch) -> None:
        try:
            await stage_bodies(self._link, lane.user, lane.stream.claim.fence, batch)
        except (RedisUnavailable, RedisMisconfigured) as passing:
            self._note_failure(passing)
            await asyncio.sleep(self._outage_s)
        except Exception as error:
            # As with a script that fails: this run's trouble, not Redis'.
            lane.failures += 1
            log.exception("large events not written", run_id=lane.stream.claim.run_id)
            if lane.failures >= MOST_FAILURES:
                # Whoever refuses the lane ends its staging, which is this task.
                lane.staging = None
                self._refuse(lane, f"its large events cannot be written: {error}")
                return
            await asyncio.sleep(_RETRY_FIRST_S)
        else:
            batch.is_staged = True
        lane.staging = None
        self._try_again(lane)

    def _try_again(self, lane: PublishLane) -> None:
        lane.is_busy = False
        if lane.is_open and lane.stream.batches.is_due:
            self.send_soon(lane)

    # --- answers ---

    def _receive(self, reply: Any) -> None:
        self._answered += 1
        entry = self._in_flight.popleft()
        if isinstance(reply, Exception):
            self._receive_error(entry, reply)
            return
        self._outage_s = 0.0
        if entry is None:
            return
        lane, batch = entry
        if lane.is_open:
            try:
                self._take_answer(lane, batch, reply)
            except Exception as error:
                log.exception("answer not understood", run_id=lane.stream.claim.run_id)
                self._refuse(lane, f"Redis answered {reply!r:.100}: {error}")
        self._try_again(lane)

    def _take_answer(self, lane: PublishLane, batch: Batch, reply: Any) -> None:
        stream = lane.stream
        try:
            outcome = stream.batches.receive_answer(batch, reply)
        except PublishRefused as refusal:
            if not isinstance(refusal, RunEnded):
                log.warning("publish refused", run_id=stream.claim.run_id, reason=str(refusal))
            self._on_refused(lane, refusal)
            return
        if outcome is None:
            # Nothing was applied: what has to come before it is sent first.
            lane.count_failure_of_staging(batch)
            if lane.failures >= MOST_FAILURES:
                self._refuse(lane, "Redis does not keep its large events")
                return
        else:
            lane.acknowledged(reply[1])
            if outcome is not NOTHING_NEW:
                self._on_acknowledged(lane, outcome)
        stream.advanced()

    def _refuse(self, lane: PublishLane, reason: str) -> None:
        self._on_refused(lane, PublishRefused(f"run {lane.stream.claim.run_id}: {reason}"))

    def _receive_error(self, entry: tuple[PublishLane, Batch] | None, reply: Exception) -> None:
        lane = None if entry is None else entry[0]
        if lane is not None:
            lane.renew_epoch()
        try:
            error: Exception = self._link.understood(self._script, reply)
        except (RedisUnavailable, RedisMisconfigured) as passing:
            self._give_up(passing)
        else:
            if str(error).startswith("NOSCRIPT"):
                self._must_load = True
            elif lane is None:
                self._give_up(error)
            elif lane.is_open:
                # A script failed for one run; the others must not suffer from it.
                if isinstance(error, ScriptFailed) and is_wrong_type(str(error)):
                    lane.staging = self._start(self._refuse_for_key(lane, error), "publisher-key")
                    return
                lane.failures += 1
                run_id = lane.stream.claim.run_id
                log.error("publish failed", run_id=run_id, error=str(error))
                if lane.failures >= MOST_FAILURES:
                    self._refuse(lane, str(error))
                    return
        if lane is not None:
            self._try_again(lane)

    async def _refuse_for_key(self, lane: PublishLane, error: ScriptFailed) -> None:
        """Give up a run that somebody's key stands in the way of: trying again does not help."""
        claim = lane.stream.claim
        keys = self._link.call("publish", lane.user, claim.run_id).keys
        located = await self._link.locate(keys, error)
        self.last_error = str(located)
        log.error("publish failed", run_id=claim.run_id, error=str(located))
        # Whoever refuses the lane ends its staging, which is this task.
        lane.staging = None
        self._refuse(lane, str(located))

    # --- the connection ---

    async def _keep_connected(self) -> None:
        while True:
            await self._wanted.wait()
            await asyncio.sleep(self._outage_s)
            self._lost.clear()
            pipeline = Pipeline(
                self._link,
                on_reply=self._receive,
                on_lost=self._connection_lost,
                on_writable=self._flush_soon,
            )
            try:
                await pipeline.connect()
                self._wanted.clear()
                self._must_load = True
                self._pipeline = pipeline
                self._flush()
                await self._lost.wait()
            except Exception as error:  # noqa: BLE001
                # Without a connection all agents would wait for ever: whatever it is, go on.
                self._pipeline = None
                self._note_failure(error)
                # What was noted as sent must not be paired with the next connection's answers.
                self._connection_lost(error)
                self._wanted.set()
            finally:
                await pipeline.aclose()

    def _give_up(self, error: Exception) -> None:
        """Cut a connection that cannot be used; what is in flight is sent again on another."""
        if self._pipeline is not None:
            self._note_failure(error)
            self._pipeline.abort()
            self._pipeline = None

    def _connection_lost(self, error: Exception | None) -> None:
        in_flight, self._in_flight = self._in_flight, deque()
        if self._watch_timer is not None:
            # The next connection gets its own time.
            self._watch_timer.cancel()
            self._watch_timer = None
        if self._pipeline is not None:
            self._pipeline = None
            if in_flight:
                reason = str(error or "it closed the connection")
                self._note_failure(RedisUnavailable(f"Redis does not answer: {reason}"))
        self._lost.set()
        for entry in in_flight:
            if entry is not None:
                entry[0].renew_epoch()
                self._try_again(entry[0])
        if self._due:
            self._flush_soon()

    def _note_failure(self, error: Exception) -> None:
        self.last_error = str(error)
        if self._outage_s == 0.0:
            is_expected = isinstance(error, RedisUnavailable | RedisMisconfigured)
            log.warning(
                "publishing waits for Redis",
                error=str(error),
                exc_info=None if is_expected else error,
            )
        self._outage_s = min(max(self._outage_s * 2, _RETRY_FIRST_S), _RETRY_MOST_S)
