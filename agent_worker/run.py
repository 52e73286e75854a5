"""What an agent's author sees of a run: publish thoughts, tools, text; read the request.

Every method raises in the agent when its arguments are wrong or the call is not legal at this
point; nothing of such a call reaches the user.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_worker.tool import Tool, innermost_tool
from relay.errors import EncodingFailed, GrammarViolation, InvalidEvent
from relay.events import EventType

if TYPE_CHECKING:
    from relay.publisher import RunStream


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for.

    Attributes:
        content: The user's text.
        metadata: What the application sent along.
        message_id: The id that the client gave to the message.
    """

    content: str
    metadata: dict[str, Any]
    message_id: str


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Which run this is: identity that never changes during an attempt."""

    run_id: str
    user_id: str
    thread_id: str
    agent: str
    attempt: int
    request: Request


class Run:
    """One attempt at a run, as the agent sees it.

    Methods return as soon as the event is accepted for publishing. They wait only while the
    buffer towards Redis is full, so an agent cannot outrun what the store takes. Cancellation
    arrives as ``asyncio.CancelledError`` at any await.
    """

    def __init__(
        self,
        info: RunInfo,
        stream: RunStream,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._info = info
        self._stream = stream
        self._clock = clock
        self._closed_because: str | None = None

    @property
    def run_id(self) -> str:
        """The run's id, the same over all attempts."""
        return self._info.run_id

    @property
    def user_id(self) -> str:
        """Whose run it is; every event goes to this user and to nobody else."""
        return self._info.user_id

    @property
    def thread_id(self) -> str:
        """The conversation that the run belongs to."""
        return self._info.thread_id

    @property
    def agent(self) -> str:
        """The agent's name."""
        return self._info.agent

    @property
    def attempt(self) -> int:
        """Number of this try, from 1."""
        return self._info.attempt

    @property
    def request(self) -> Request:
        """What the user asked for."""
        return self._info.request

    @property
    def text(self) -> str:
        """All text streamed in this attempt, over all messages."""
        return self._stream.text

    async def thinking(
        self,
        thought: str,
        step: int | None = None,
        total_steps: int | None = None,
        progress_percentage: float | None = None,
        estimated_remaining_ms: int | None = None,
    ) -> None:
        """Tell the user what the agent is about to do.

        Raises:
            InvalidEvent: A value has the wrong type or range.
        """
        await self.publish(
            EventType.AGENT_THINKING,
            {
                "thought": thought,
                "step": step,
                "total_steps": total_steps,
                "progress_percentage": progress_percentage,
                "estimated_remaining_ms": estimated_remaining_ms,
            },
        )

    def tool(
        self,
        name: str,
        parameters: Any = None,
        purpose: str | None = None,
        estimated_duration_ms: int | None = None,
    ) -> Tool:
        """Show a tool call while the ``async with`` block runs.

        Leaving the block publishes ``tool_completed``: ``ok`` with ``tool.result``, ``error``
        where an exception passes (it goes on to the caller), ``cancelled`` on cancellation.
        Tools may be nested and may run side by side.

        Args:
            name: What the tool is called, for people.
            parameters: Its input; anything with a JSON form.
            purpose: Why it is called, in a few words.
            estimated_duration_ms: How long it usually takes.
        """
        given = {} if parameters is None else parameters
        return Tool(self, name, given, purpose, estimated_duration_ms)

    async def delta(self, text: str) -> None:
        """Stream a piece of the answer. Pieces are joined in order; an empty one does nothing.

        Raises:
            InvalidEvent: ``text`` is not text.
            EncodingFailed: It has no UTF-8 form.
        """
        self._require_open(EventType.TEXT_DELTA)
        if not isinstance(text, str):
            raise InvalidEvent(f"text_delta: text must be str, not {type(text).__name__}")
        try:
            await self._stream.delta(text)
        except UnicodeEncodeError as error:
            raise EncodingFailed("data.text", "a lone surrogate has no UTF-8 form") from error

    async def progress(self, percentage: float | None = None, note: str | None = None) -> None:
        """Say how far the innermost open tool of the current task is.

        Only the latest progress is delivered, at best effort: it is no place for results.

        Raises:
            GrammarViolation: No tool of this run is open here.
            InvalidEvent: ``percentage`` is not within 0 to 100.
        """
        tool = innermost_tool(self)
        if tool is None:
            raise GrammarViolation(
                EventType.TOOL_PROGRESS, "no tool is open; call it within `async with run.tool(…)`"
            )
        await tool.progress(percentage, note)

    async def custom(self, name: str, value: Any) -> None:
        """Publish an event whose meaning you agreed on with the client's author.

        Raises:
            EncodingFailed: ``value`` has no JSON form; the error names the place.
        """
        await self.publish(EventType.CUSTOM, {"name": name, "value": value})

    async def publish(self, event_type: EventType, data: dict[str, Any]) -> None:
        """Publish a lifecycle event; the methods above are the ways to do it by name.

        Raises:
            InvalidEvent: The data does not match the type's fields.
            EncodingFailed: A value has no JSON form.
            GrammarViolation: The event is not legal at this point of the run.
            PublishRefused: The run was ended or taken over elsewhere.
        """
        self._require_open(event_type)
        await self._stream.publish(event_type, data)

    async def publish_progress(
        self, tool_call_id: str, percentage: float | None, note: str | None
    ) -> None:
        """Publish a tool's progress; ``Tool.progress`` is the way to do it."""
        self._require_open(EventType.TOOL_PROGRESS)
        await self._stream.progress(tool_call_id, percentage, note)

    def close(self, reason: str) -> None:
        """Let everything that is published from now on raise in the agent."""
        self._closed_because = self._closed_because or reason

    def elapsed_ms(self, since_s: float) -> int:
        """Give the whole milliseconds since a reading of the monotonic clock."""
        return max(0, round((self._clock() - since_s) * 1000))

    def now_s(self) -> float:
        """Read the monotonic clock."""
        return self._clock()

    def _require_open(self, event_type: EventType) -> None:
        if self._closed_because is not None:
            raise GrammarViolation(event_type, self._closed_because)
