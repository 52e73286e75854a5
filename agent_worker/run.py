"""What an agent's author sees of a run: publish thoughts, tools, text; read the request.

Every method raises in the agent when its arguments are wrong or the call is not legal at this
point; nothing of such a call reaches the user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent_worker.outlet import Outlet
from agent_worker.tool import Tool, innermost_tool
from relay.errors import GrammarViolation
from relay.events import EventType


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

    def __init__(self, info: RunInfo, outlet: Outlet) -> None:
        self._info = info
        self._outlet = outlet

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
        return self._outlet.text

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
        await self._outlet.publish(
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
        return Tool(self._outlet, name, given, purpose, estimated_duration_ms)

    async def delta(self, text: str) -> None:
        """Stream a piece of the answer. Pieces are joined in order; an empty one does nothing.

        Raises:
            InvalidEvent: ``text`` is not text.
            EncodingFailed: It has no UTF-8 form.
        """
        await self._outlet.delta(text)

    async def progress(self, percentage: float | None = None, note: str | None = None) -> None:
        """Say how far the innermost open tool of the current task is.

        Only the latest progress is delivered, at best effort: it is no place for results.

        Raises:
            GrammarViolation: No tool of this run is open here.
            InvalidEvent: ``percentage`` is not within 0 to 100.
        """
        tool = innermost_tool(self._outlet)
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
        await self._outlet.publish(EventType.CUSTOM, {"name": name, "value": value})
