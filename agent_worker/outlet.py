"""The one way out of an attempt: what an agent publishes passes here, until the run is closed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relay.errors import EncodingFailed, GrammarViolation, InvalidEvent
from relay.events import EventType

if TYPE_CHECKING:
    from relay.run_stream import RunStream


class Outlet:
    """Publishes for the agent of one attempt.

    Args:
        stream: Where to.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: RunStream, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._closed_because: str | None = None

    @property
    def text(self) -> str:
        """All text streamed in this attempt."""
        return self._stream.text

    async def publish(self, event_type: EventType, data: dict[str, Any]) -> None:
        """Publish a lifecycle event.

        Raises:
            InvalidEvent: The data does not match the type's fields.
            EncodingFailed: A value has no JSON form.
            GrammarViolation: The event is not legal at this point, or the run was closed.
            PublishRefused: The run was ended or taken over elsewhere.
        """
        self._require_open(event_type)
        await self._stream.publish(event_type, data)

    async def delta(self, text: str) -> None:
        """Publish a piece of text.

        Raises:
            InvalidEvent: It is not text.
            EncodingFailed: It has no UTF-8 form.
            GrammarViolation: The run was closed.
            PublishRefused: The run was ended or taken over elsewhere.
        """
        self._require_open(EventType.TEXT_DELTA)
        if not isinstance(text, str):
            raise InvalidEvent(f"text_delta: text must be str, not {type(text).__name__}")
        try:
            await self._stream.delta(text)
        except UnicodeEncodeError as error:
            raise EncodingFailed("data.text", "a lone surrogate has no UTF-8 form") from error

    async def progress(self, tool_call_id: str, percentage: float | None, note: str | None) -> None:
        """Publish how far a tool is.

        Raises:
            InvalidEvent: ``percentage`` is not within 0 to 100.
            GrammarViolation: The tool is not open, or the run was closed.
            PublishRefused: The run was ended or taken over elsewhere.
        """
        self._require_open(EventType.TOOL_PROGRESS)
        await self._stream.progress(tool_call_id, percentage, note)

    async def flush(self) -> None:
        """Wait until Redis has acknowledged everything.

        Raises:
            PublishRefused: The run was ended or taken over elsewhere.
        """
        await self._stream.flush()

    def input_closed(self, request_id: str) -> None:
        """Take note that an input request was resolved in Redis."""
        self._stream.input_closed(request_id)

    async def withdraw_input(self, request_id: str) -> None:
        """Close an input request that is still open: nobody waits for its answer any more.

        Raises:
            GrammarViolation: The run was closed.
            PublishRefused: The run was ended or taken over elsewhere.
        """
        if request_id in self._stream.grammar.open_inputs:
            withdrawn = {"request_id": request_id, "outcome": "cancelled", "by": "system"}
            await self.publish(EventType.INPUT_RESOLVED, withdrawn)

    def close(self, reason: str) -> None:
        """Let everything that is published from now on raise in the agent; the first reason counts.

        An agent may go on after its run has ended: in a task or thread that it left behind, or
        because it ignores its cancellation.
        """
        self._closed_because = self._closed_because or reason

    def now_s(self) -> float:
        """Read the monotonic clock."""
        return self._clock()

    def elapsed_ms(self, since_s: float) -> int:
        """Give the whole milliseconds since a reading of the clock."""
        return max(0, round((self._clock() - since_s) * 1000))

    def _require_open(self, event_type: EventType) -> None:
        if self._closed_because is not None:
            raise GrammarViolation(event_type, self._closed_because)
