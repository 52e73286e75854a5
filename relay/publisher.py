"""Publishing: from an agent's calls to acknowledged events, in order, once.

Each run has one batch in flight. What is due when the event loop comes round leaves in one write
on one connection, whatever the number of runs; no task wakes up for it. While Redis is away
everything waits in bounded buffers, and then the agents wait: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog

from relay.batches import Acknowledged, Batch
from relay.cancellation import end_tasks
from relay.codec import Task
from relay.errors import PublishRefused, RedisMisconfigured, RedisUnavailable, RunEnded
from relay.keys import Keys
from relay.pipeline import Pipeline, pack
from relay.publish_lane import PublishLane
from relay.run_model import Claim
from relay.run_stream import RunStream
from relay.scripts import RedisLink, ScriptFailed
from relay.staging import stage_bodies
from relay.tasks import dispatch

SECRET_NAMES = frozenset(
    {
        "access_token",
        "api_key",
        "apikey",
        "authorization",
        "client_secret",
        "cookie",
        "id_token",
        "passwd",
        "password",
        "private_key",
        "refresh_token",
        "secret",
        "token",
    }
)
"""Keys whose values never leave the worker."""

MOST_FAILURES = 5
"""A run whose script fails this often in a row is given up: it would never succeed."""

LAST_DISPATCHES_S = 1.0

WRITE_BYTES = 256 * 1024
"""After this much the connection is asked whether it takes more."""

_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0

log = structlog.stdlib.get_logger(__name__)


class Publisher:
    """Sends the batches of all runs of one process.

    Args:
        link: Where to.
        keys: Key names.
        merge_ms: How long a piece of text may wait for the next one.
        secret_names: Lower-case key names whose values are redacted, by exact match.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        *,
        merge_ms: int = 20,
        secret_names: frozenset[str] = SECRET_NAMES,
    ) -> None:
        self.secret_names = secret_names
        self._link = link
        self._keys = keys
        self._merge_s = merge_ms / 1000
        self._script = link.scripts["publish"]
        self._lanes: dict[RunStream, PublishLane] = {}
        self._merging: list[RunStream] = []
        self._merge_timer: asyncio.Handle | None = None
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
        self._dispatches: deque[Task] = deque()
        self._dispatched = asyncio.Event()
        self._dispatched.set()
        self._is_closed = False
        self._outage_s = 0.0
        self._last_error: str | None = None

    @property
    def is_available(self) -> bool:
        """Whether Redis answered last."""
        return self._outage_s == 0.0

    @property
    def last_error(self) -> str | None:
        """What went wrong last; None if nothing has."""
        return self._last_error

    @property
    def lag_s(self) -> float:
        """How long the run that waits longest has waited for an acknowledgement."""
        return max((stream.waiting_s for stream in self._lanes), default=0.0)

    @property
    def buffered_bytes(self) -> int:
        """What Redis has not acknowledged yet, over all runs."""
        return sum(stream.batches.size_bytes for stream in self._lanes)

    async def __aenter__(self) -> Publisher:
        self._loop = asyncio.get_running_loop()
        self._start(self._keep_connected(), "publisher")
        return self

    async def __aexit__(self, *_: object) -> None:
        # The next runs of threads whose last run has just ended must not wait for the reaper.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_DISPATCHES_S):
                await self._dispatched.wait()
        self._is_closed = True
        for timer in (self._merge_timer, self._flush_handle, self._watch_timer):
            if timer is not None:
                timer.cancel()
        if self._tasks:
            await end_tasks(list(self._tasks))
        for stream in list(self._lanes):
            stream.close()

    def _start(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def open(
        self, claim: Claim, *, on_refused: Callable[[PublishRefused], None] | None = None
    ) -> RunStream:
        """Begin to publish an attempt.

        Args:
            claim: The right to it.
            on_refused: Called once when Redis takes no more events of this attempt.
        """
        stream = RunStream(self, claim, on_refused)
        user = self._keys.user(claim.envelope.user_id)
        self._lanes[stream] = PublishLane(stream, user, self._link)
        return stream

    def forget(self, stream: RunStream) -> None:
        """Stop sending this stream's events."""
        lane = self._lanes.pop(stream, None)
        if lane is not None:
            lane.is_open = False
            if lane.staging is not None:
                lane.staging.cancel()

    def send_soon(self, stream: RunStream) -> None:
        """Send what the stream holds when the event loop comes round."""
        lane = self._lanes.get(stream)
        if lane is not None and not lane.is_busy and not lane.is_queued:
            lane.is_queued = True
            self._due.append(lane)
            self._flush_soon()

    def merge(self, stream: RunStream) -> None:
        """Send the stream's text when it has waited for more; one timer serves all runs."""
        stream.text_waits = True
        self._merging.append(stream)
        if self._merge_timer is None and not self._is_closed:
            if self._merge_s:
                self._merge_timer = self._loop.call_later(self._merge_s, self._merged)
            else:
                self._merge_timer = self._loop.call_soon(self._merged)

    def _merged(self) -> None:
        self._merge_timer = None
        merged, self._merging = self._merging, []
        for stream in merged:
            stream.text_waits = False
            stream.batches.release_text()
            self.send_soon(stream)

    # --- sending ---

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
            batch, arguments = lane.stream.batches.next_batch()
            lane.is_busy = True
            if batch.bodies and not batch.is_staged:
                lane.staging = self._start(self._stage(lane, batch), "publisher-staging")
                continue
            command = lane.pack(self._pipeline.instance, arguments)
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
        except Exception as error:  # noqa: BLE001 -- the agent would wait for ever
            self._note_failure(error)
            await asyncio.sleep(self._outage_s)
        else:
            batch.is_staged = True
        lane.staging = None
        self._try_again(lane)

    def _try_again(self, lane: PublishLane) -> None:
        lane.is_busy = False
        if lane.is_open and lane.stream.batches.is_due:
            self.send_soon(lane.stream)

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
        stream = lane.stream
        if lane.is_open:
            try:
                outcome = stream.batches.receive_answer(batch, reply)
            except PublishRefused as refusal:
                if not isinstance(refusal, RunEnded):
                    log.warning("publish refused", run_id=stream.claim.run_id, reason=str(refusal))
                self._refuse(stream, refusal)
                return
            if outcome is None:
                # Nothing was applied: what has to come before it is sent first.
                lane.count_failure_of_staging(batch)
            else:
                lane.acknowledged(reply[1])
                self._note_outcome(stream, outcome)
            if lane.failures >= MOST_FAILURES:
                reason = f"run {stream.claim.run_id}: Redis does not keep its large events"
                self._refuse(stream, PublishRefused(reason))
                return
            stream.advanced()
        self._try_again(lane)

    def _note_outcome(self, stream: RunStream, outcome: Acknowledged) -> None:
        if outcome.cancel:
            stream.cancel_requested = outcome.cancel
        if outcome.next_run is not None:
            run_id, agent = outcome.next_run
            self._dispatches.append(Task(stream.claim.envelope.user_id, run_id, agent))
            if self._dispatched.is_set() and not self._is_closed:
                self._dispatched.clear()
                self._start(self._dispatch(), "publisher-dispatches")

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
                lane.failures += 1
                run_id = lane.stream.claim.run_id
                log.error("publish failed", run_id=run_id, error=str(error))
                if lane.failures >= MOST_FAILURES:
                    self._refuse(lane.stream, PublishRefused(f"run {run_id}: {error}"))
                    return
        if lane is not None:
            self._try_again(lane)

    def _refuse(self, stream: RunStream, refusal: PublishRefused) -> None:
        self.forget(stream)
        stream.refuse(refusal)

    async def _dispatch(self) -> None:
        delay_s = _RETRY_FIRST_S
        while self._dispatches:
            try:
                await dispatch(self._link, self._keys, self._dispatches[0])
                self._dispatches.popleft()
            except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
                self._last_error = str(error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _RETRY_MOST_S)
        self._dispatched.set()

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
        self._last_error = str(error)
        if self._outage_s == 0.0:
            is_expected = isinstance(error, RedisUnavailable | RedisMisconfigured)
            log.warning(
                "publishing waits for Redis",
                error=str(error),
                exc_info=None if is_expected else error,
            )
        self._outage_s = min(max(self._outage_s * 2, _RETRY_FIRST_S), _RETRY_MOST_S)
