"""Publishing: from an agent's calls to acknowledged events, in order, once.

Each run has one batch in flight; the batches of all runs of a process share pipelines. While
Redis is away everything waits in bounded buffers, and then the agents wait: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from relay import clock
from relay.batches import Acknowledged, Batch, OutgoingBatches
from relay.cancellation import end_tasks
from relay.codec import Task
from relay.columns import columns_of
from relay.encoding import redact
from relay.errors import (
    AgentError,
    PublishRefused,
    RedisMisconfigured,
    RedisUnavailable,
    RunEnded,
)
from relay.events import EventType, validate_data
from relay.grammar import RunGrammar
from relay.keys import Keys
from relay.run_model import Claim
from relay.scripts import RedisLink, ScriptCall, ScriptFailed
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

STREAM_BUFFER_BYTES = 1024 * 1024
"""A run with more than this unacknowledged makes its agent wait."""

MOST_FAILURES = 5
"""A run whose script fails this often in a row is given up: it would never succeed."""

LAST_DISPATCHES_S = 1.0

MAX_EVENT_BYTES = 32 * 1024 * 1024
PIPELINE_CALLS = 128
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0

log = structlog.stdlib.get_logger(__name__)


class RunStream:
    """The events of one attempt on their way to Redis. Made by ``Publisher.open``.

    Attributes:
        grammar: What may come next.
        cancel_requested: Whether an acknowledgement said that the run should stop.
        refused: Why Redis takes no more events of this attempt; None while it does.
    """

    def __init__(
        self,
        publisher: Publisher,
        claim: Claim,
        on_refused: Callable[[PublishRefused], None] | None,
    ) -> None:
        self.claim = claim
        self.grammar = RunGrammar(attempt=claim.envelope.attempt - 1)
        self.cancel_requested: bytes | None = None
        self.refused: PublishRefused | None = None
        self.failures = 0
        self.batches = OutgoingBatches(claim.envelope, claim.fence, claim.epoch)
        self._publisher = publisher
        self._on_refused = on_refused
        self._pieces: list[str] = []
        self._tools_since: dict[str, float] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._waiting_since_s: float | None = None

    @property
    def waiting_s(self) -> float:
        """How long events have waited without any acknowledgement; 0 while nothing waits."""
        if self._waiting_since_s is None:
            return 0.0
        return time.monotonic() - self._waiting_since_s

    @property
    def text(self) -> str:
        """All text of this attempt so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    async def publish(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        """Publish a lifecycle event.

        Returns as soon as the event is in the buffer, which is at once unless it is full.

        Raises:
            InvalidEvent, EncodingFailed, GrammarViolation: The event reached nobody.
            AgentError: ``payload_too_large``: the event is larger than 32 MiB.
            PublishRefused: The attempt was superseded or the run has ended.
        """
        await self._wait_for_room()
        self._add(event_type, data)

    def _add(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        given = validate_data(event_type, dict(data))
        valid = redact(given, self._publisher.secret_names)
        if event_type is EventType.INPUT_REQUESTED and "schema" in given:
            # Its keys are names of fields, not secrets; redacted, no answer could fit it.
            valid = {**valid, "schema": given["schema"]}
        now_ms = clock.now_ms()
        event = self.claim.envelope.encode(event_type, now_ms, valid)
        if len(event) > MAX_EVENT_BYTES:
            raise AgentError("payload_too_large")
        self.grammar.apply(event_type, valid)
        if event_type is EventType.TOOL_EXECUTING:
            self._tools_since[valid["tool_call_id"]] = time.monotonic()
        self.batches.add_event(columns_of(event_type, now_ms, valid, event))
        self._added()

    def _added(self) -> None:
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()
        self._publisher.wake()

    async def delta(self, text: str) -> None:
        """Publish a piece of streamed text; pieces within the merge time become one event.

        Raises:
            GrammarViolation: The attempt has not started or the run has ended.
            PublishRefused: The attempt was superseded or the run has ended.
        """
        if not isinstance(text, str):
            raise TypeError(f"a delta is text, not {type(text).__name__}")
        await self._wait_for_room()
        if not text:
            return
        text.encode()  # A lone surrogate has no UTF-8 form: raise here, not in the sender.
        self.grammar.apply(EventType.TEXT_DELTA, {})
        self._pieces.append(text)
        self.batches.add_text(text, clock.now_ms())
        self._added()

    async def progress(
        self, tool_call_id: str, percentage: float | None = None, note: str | None = None
    ) -> None:
        """Publish how far an open tool call is. Best effort: only the latest counts.

        Raises:
            InvalidEvent, GrammarViolation: The event reached nobody.
            PublishRefused: The attempt was superseded or the run has ended.
        """
        await self._wait_for_room()
        data = {"tool_call_id": tool_call_id, "progress_percentage": percentage, "note": note}
        valid = validate_data(EventType.TOOL_PROGRESS, data)
        self.grammar.apply(EventType.TOOL_PROGRESS, valid)
        event = self.claim.envelope.encode(EventType.TOOL_PROGRESS, clock.now_ms(), valid)
        self.batches.add_progress(tool_call_id, event)
        self._added()

    async def finish(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        """Publish the terminal event and wait until Redis has it.

        Tools and input requests that are still open are closed first.

        Raises:
            InvalidEvent, EncodingFailed: The terminal event reached nobody; the run goes on.
            RunEnded, StaleFence: Somebody else ended the run or took it over.
        """
        await self._conclude(event_type, data, "The run ended before the tool did.")

    async def retry(self, data: Mapping[str, Any]) -> None:
        """End this attempt with ``agent_retrying`` and wait until Redis has it.

        Tools and input requests that are still open are closed first.

        Raises:
            InvalidEvent, EncodingFailed, GrammarViolation: The event reached nobody.
            RunEnded, StaleFence: Somebody else ended the run or took it over.
        """
        reason = "The attempt ended before the tool did."
        await self._conclude(EventType.AGENT_RETRYING, data, reason)

    def input_closed(self, request_id: str) -> None:
        """Take note that an input request was resolved in Redis, by its user or by its expiry."""
        if request_id in self.grammar.open_inputs:
            self.grammar.apply(EventType.INPUT_RESOLVED, {"request_id": request_id})

    async def _conclude(
        self, event_type: EventType, data: Mapping[str, Any], tool_error: str
    ) -> None:
        if self.refused is not None:
            raise self.refused
        # Encode once before anything is closed: what cannot be encoded must change nothing.
        self.claim.envelope.encode(event_type, 0, validate_data(event_type, dict(data)))
        self._close_open(event_type, tool_error)
        self._add(event_type, data)
        await self.flush()

    def _close_open(self, event_type: EventType, tool_error: str) -> None:
        is_cancelled = event_type is EventType.AGENT_CANCELLED
        for tool_call_id, tool_name in list(self.grammar.open_tools.items()):
            since = self._tools_since.get(tool_call_id, time.monotonic())
            closing: dict[str, Any] = {
                "tool_call_id": tool_call_id,
                "tool_name": tool_name,
                "status": "cancelled" if is_cancelled else "error",
                "duration_ms": round((time.monotonic() - since) * 1000),
            }
            if not is_cancelled:
                closing["error"] = tool_error
            self._add(EventType.TOOL_COMPLETED, closing)
        for request_id in sorted(self.grammar.open_inputs):
            resolved = {"request_id": request_id, "outcome": "cancelled", "by": "system"}
            self._add(EventType.INPUT_RESOLVED, resolved)

    async def flush(self) -> None:
        """Wait until Redis has acknowledged everything.

        Raises:
            PublishRefused: The attempt was superseded or the run has ended.
        """
        while not self.batches.is_empty:
            await self._wait()
        if self.refused is not None:
            raise self.refused

    async def _wait_for_room(self) -> None:
        while self.refused is None and self.batches.size_bytes > STREAM_BUFFER_BYTES:
            await self._wait()
        if self.refused is not None:
            raise self.refused

    async def _wait(self) -> None:
        if self.refused is not None:
            raise self.refused
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def advanced(self) -> None:
        """Let everybody who waits look again: something was acknowledged, or refused."""
        self._waiting_since_s = None if self.batches.is_empty else time.monotonic()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def refuse(self, refusal: PublishRefused) -> None:
        """Note that Redis takes no more events of this attempt."""
        self.refused = refusal
        self.advanced()
        if self._on_refused is not None:
            self._on_refused(refusal)

    def close(self) -> None:
        """Stop sending. What is not acknowledged is given up; further calls raise."""
        self._publisher.forget(self)
        if self.refused is None:
            self.refused = PublishRefused(f"the stream of run {self.claim.run_id} is closed")
        self.advanced()


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
        self._merge_ms = merge_ms
        self._streams: dict[str, RunStream] = {}
        self._dispatches: list[Task] = []
        self._dispatched = asyncio.Event()
        self._dispatched.set()
        self._wake = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._outage_s = 0.0
        self._last_error: str | None = None

    @property
    def is_available(self) -> bool:
        """Whether the last pipeline got its answers."""
        return self._outage_s == 0.0

    @property
    def last_error(self) -> str | None:
        """Why the last pipeline that failed did so; None if none has."""
        return self._last_error

    @property
    def lag_s(self) -> float:
        """How long the run that waits longest has waited for an acknowledgement."""
        return max((stream.waiting_s for stream in self._streams.values()), default=0.0)

    @property
    def buffered_bytes(self) -> int:
        """What Redis has not acknowledged yet, over all runs."""
        return sum(stream.batches.size_bytes for stream in self._streams.values())

    async def __aenter__(self) -> Publisher:
        self._sender = asyncio.create_task(self._send_forever(), name="publisher")
        return self

    async def __aexit__(self, *_: object) -> None:
        # The next runs of threads whose last run has just ended must not wait for the reaper.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_DISPATCHES_S):
                await self._dispatched.wait()
        if self._sender is not None:
            await end_tasks([self._sender])
        for stream in list(self._streams.values()):
            stream.close()

    def open(
        self, claim: Claim, *, on_refused: Callable[[PublishRefused], None] | None = None
    ) -> RunStream:
        """Begin to publish an attempt.

        Args:
            claim: The right to it.
            on_refused: Called once when Redis takes no more events of this attempt.
        """
        stream = RunStream(self, claim, on_refused)
        self._streams[claim.fence] = stream
        return stream

    def forget(self, stream: RunStream) -> None:
        """Stop sending this stream's events."""
        self._streams.pop(stream.claim.fence, None)

    def wake(self) -> None:
        """Look for batches that are due."""
        self._wake.set()

    async def _send_forever(self) -> None:
        while True:
            self._wake.clear()
            due_in_s = self._due_in_s()
            if due_in_s is None or due_in_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(due_in_s):
                        await self._wake.wait()
                continue
            try:
                await self._send_due()
                self._outage_s = 0.0
            except Exception as error:
                # Without the sender all agents would wait for ever: whatever it is, go on.
                self._last_error = str(error)
                if self._outage_s == 0.0:
                    is_expected = isinstance(error, RedisUnavailable | RedisMisconfigured)
                    log.warning(
                        "publishing waits for Redis",
                        error=str(error),
                        exc_info=None if is_expected else error,
                    )
                self._outage_s = min(max(self._outage_s * 2, _RETRY_FIRST_S), _RETRY_MOST_S)
                await asyncio.sleep(self._outage_s)

    def _due_in_s(self) -> float | None:
        if self._dispatches:
            return 0
        due = [
            at_ms
            for stream in self._streams.values()
            if (at_ms := stream.batches.due_at_ms(self._merge_ms)) is not None
        ]
        return None if not due else max(0.0, (min(due) - clock.now_ms()) / 1000)

    async def _send_due(self) -> None:
        while self._dispatches:
            await dispatch(self._link, self._keys, self._dispatches[0])
            self._dispatches.pop(0)
        self._dispatched.set()
        now_ms = clock.now_ms()
        sent: list[tuple[RunStream, Batch]] = []
        calls: list[ScriptCall] = []
        for stream in self._streams.values():
            due_at_ms = stream.batches.due_at_ms(self._merge_ms)
            if due_at_ms is None or due_at_ms > now_ms or len(calls) == PIPELINE_CALLS:
                continue
            batch, arguments = stream.batches.next_batch()
            envelope = stream.claim.envelope
            user = self._keys.user(envelope.user_id)
            calls.append(self._link.call("publish", user, envelope.run_id, *arguments))
            sent.append((stream, batch))
        if not calls:
            return
        answers = await self._link.run_each(calls)
        for (stream, batch), answer in zip(sent, answers, strict=True):
            if isinstance(answer, ScriptFailed):
                self._fail(stream, answer)
            else:
                self._receive(stream, batch, answer)
        # Streams at the front must not keep those behind the pipeline's bound from their turn.
        for stream, _ in sent:
            if self._streams.pop(stream.claim.fence, None) is not None:
                self._streams[stream.claim.fence] = stream

    def _fail(self, stream: RunStream, error: ScriptFailed) -> None:
        """A script failed for one run; the others must not suffer from it."""
        stream.failures += 1
        log.error("publish failed", run_id=stream.claim.run_id, error=str(error))
        if stream.failures >= MOST_FAILURES:
            self.forget(stream)
            stream.refuse(PublishRefused(f"run {stream.claim.run_id}: {error}"))

    def _receive(self, stream: RunStream, batch: Batch, answer: list[Any]) -> None:
        try:
            outcome = stream.batches.receive_answer(batch, answer)
            stream.failures = 0
        except PublishRefused as refusal:
            if not isinstance(refusal, RunEnded):
                log.warning("publish refused", run_id=stream.claim.run_id, reason=str(refusal))
            self.forget(stream)
            stream.refuse(refusal)
            return
        if isinstance(outcome, Acknowledged):
            if outcome.cancel:
                stream.cancel_requested = outcome.cancel
            if outcome.next_run is not None:
                run_id, agent = outcome.next_run
                user_id = stream.claim.envelope.user_id
                self._dispatches.append(Task(user_id, run_id, agent))
                self._dispatched.clear()
        stream.advanced()
