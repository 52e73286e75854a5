"""What one attempt publishes: checked, encoded, and handed to the publisher in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from relay import clock
from relay.batches import OutgoingBatches
from relay.columns import columns_of
from relay.encoding import redact
from relay.errors import AgentError, PublishRefused
from relay.events import EventType, validate_data
from relay.grammar import RunGrammar
from relay.run_model import Claim

if TYPE_CHECKING:
    from relay.publisher import Publisher

STREAM_BUFFER_BYTES = 1024 * 1024
"""A run with more than this unacknowledged makes its agent wait."""

MAX_EVENT_BYTES = 32 * 1024 * 1024


class RunStream:
    """The events of one attempt on their way to Redis. Made by ``Publisher.open``.

    Attributes:
        grammar: What may come next.
        cancel_requested: Whether an acknowledgement said that the run should stop.
        refused: Why Redis takes no more events of this attempt; None while it does.
        batches: What Redis has not acknowledged.
        text_waits: Whether the publisher knows that text of it waits for more.
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
        self.batches = OutgoingBatches(claim.envelope, claim.fence, claim.epoch)
        self.text_waits = False
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
        if self.refused is not None or self.batches.size_bytes > STREAM_BUFFER_BYTES:
            await self._wait_for_room()
        self._add(event_type, data)

    def _add(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        given = validate_data(event_type, dict(data))
        valid = redact(given, self._publisher.secret_names)
        if event_type is EventType.INPUT_REQUESTED and "schema" in given:
            # Its keys are names of fields, not secrets; redacted, no answer could fit it.
            valid = {**valid, "schema": given["schema"]}
        now_ms = clock.now_ms()
        event = self.batches.encoder.encode(event_type, now_ms, valid)
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
        self._publisher.send_soon(self)

    async def delta(self, text: str) -> None:
        """Publish a piece of streamed text; pieces within the merge time become one event.

        Raises:
            GrammarViolation: The attempt has not started or the run has ended.
            PublishRefused: The attempt was superseded or the run has ended.
        """
        if not isinstance(text, str):
            raise TypeError(f"a delta is text, not {type(text).__name__}")
        if self.refused is not None or self.batches.size_bytes > STREAM_BUFFER_BYTES:
            await self._wait_for_room()
        if not text:
            return
        # Text that waits may go on: had anything come since that ends it, it would not be open any
        # more. Whatever makes it leave is on its way already.
        if self.batches.extend_text(text):
            self._pieces.append(text)
            return
        self.grammar.apply_text()
        # A lone surrogate has no UTF-8 form: that raises here, not when it is sent.
        self.batches.add_text(text, clock.now_ms())
        self._pieces.append(text)
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()
        if not self.text_waits:
            self._publisher.merge(self)

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
        event = self.batches.encoder.encode(EventType.TOOL_PROGRESS, clock.now_ms(), valid)
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
        waiter = self._publisher.create_future()
        self._waiters.append(waiter)
        await waiter

    def advanced(self) -> None:
        """Let everybody who waits look again: something was acknowledged, or refused."""
        self._waiting_since_s = None if self.batches.is_empty else time.monotonic()
        if self._waiters:
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
