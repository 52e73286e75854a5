"""A tool call within a run: announced, watched, and always brought to an end."""

from __future__ import annotations

import asyncio
import secrets
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog

from relay.errors import AgentError, EncodingFailed, InvalidEvent, RelayError
from relay.events import EventType

if TYPE_CHECKING:
    from agent_worker.outlet import Outlet

TOOL_FAILED = "The tool ran into a problem."
"""Shown for an exception inside a tool that is not an ``AgentError``."""

_innermost: ContextVar[Tool | None] = ContextVar("innermost_tool", default=None)

_log = structlog.get_logger(__name__)


class Tool:
    """A tool call of a run: an asynchronous context manager.

    Attributes:
        result: What the tool found; set it within the block. Anything with a JSON form.
        tool_call_id: Names this call among all calls of the run.
        outer: The tool that was innermost when this one began.
    """

    def __init__(
        self,
        outlet: Outlet,
        name: str,
        parameters: Any,
        purpose: str | None,
        estimated_duration_ms: int | None,
    ) -> None:
        self.result: Any = None
        self.tool_call_id = f"call_{secrets.token_hex(8)}"
        self.outer: Tool | None = None
        self._outlet = outlet
        self._name = name
        self._announcement = {
            "tool_call_id": self.tool_call_id,
            "tool_name": name,
            "purpose": purpose,
            "parameters": parameters,
            "estimated_duration_ms": estimated_duration_ms,
        }
        self._began_s = 0.0
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether the block has been entered and not left."""
        return self._is_open

    def publishes_to(self, outlet: Outlet) -> bool:
        """Whether this is a tool of the run with ``outlet``."""
        return self._outlet is outlet

    async def progress(self, percentage: float | None = None, note: str | None = None) -> None:
        """Say how far the tool is; only the latest progress is delivered, at best effort.

        Raises:
            GrammarViolation: The block has been left.
            InvalidEvent: ``percentage`` is not within 0 to 100.
        """
        await self._outlet.progress(self.tool_call_id, percentage, note)

    async def __aenter__(self) -> Self:
        await self.begin()
        self.become_innermost()
        return self

    async def __aexit__(
        self,
        _exc_type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.leave_innermost()
        await self.end(error)

    async def begin(self) -> None:
        """Announce the call."""
        self._began_s = self._outlet.now_s()
        await self._outlet.publish(EventType.TOOL_EXECUTING, self._announcement)
        self._is_open = True

    def become_innermost(self) -> None:
        """Make this the tool that ``run.progress`` of the current context speaks for."""
        self.outer = _innermost.get()
        _innermost.set(self)

    def leave_innermost(self) -> None:
        """Undo ``become_innermost``."""
        # Not by token: a generator may leave the block in another context than it entered.
        if _innermost.get() is self:
            _innermost.set(self.outer)

    async def end(self, error: BaseException | None) -> None:
        """Publish how the call ended. ``error`` is what ended it early; it stays in flight.

        Raises:
            EncodingFailed: ``result`` has no JSON form; the user sees the tool fail.
        """
        self._is_open = False
        if error is None:
            await self._end_well()
        elif not isinstance(error, GeneratorExit | KeyboardInterrupt):
            # Those two leave no time to await anything; whoever ends the run closes the tool.
            await self._end_early(error)

    async def _end_well(self) -> None:
        try:
            await self._complete("ok", result=self.result)
        except (EncodingFailed, InvalidEvent):
            await self._complete("error", error=TOOL_FAILED)
            raise
        except AgentError as error:
            # The publisher's own: the result is too large.
            await self._complete("error", error=error.error_message)
            raise

    async def _end_early(self, error: BaseException) -> None:
        try:
            if is_cancellation(error):
                await self._complete("cancelled")
            else:
                foreseen = foreseen_in(error)
                text = TOOL_FAILED if foreseen is None else foreseen.error_message
                await self._complete("error", error=text)
        except RelayError as refusal:
            # What ended the block must reach the author, not that it could not be told.
            _log.debug(
                "tool_end_not_published", tool_call_id=self.tool_call_id, reason=str(refusal)
            )

    async def _complete(self, status: str, *, result: Any = None, error: str | None = None) -> None:
        await self._outlet.publish(
            EventType.TOOL_COMPLETED,
            {
                "tool_call_id": self.tool_call_id,
                "tool_name": self._name,
                "status": status,
                "result": result,
                "error": error,
                "duration_ms": self._outlet.elapsed_ms(self._began_s),
            },
        )


def innermost_tool(outlet: Outlet) -> Tool | None:
    """Give the innermost tool of a run that is open in the current context, if any."""
    tool = _innermost.get()
    # A task that outlives the block in which it was started has inherited a closed tool.
    while tool is not None and not (tool.is_open and tool.publishes_to(outlet)):
        tool = tool.outer
    return tool


def is_cancellation(error: BaseException) -> bool:
    """Whether an exception means that the work was cancelled, also where several were joined."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_cancellation(part) for part in error.exceptions)
    return isinstance(error, asyncio.CancelledError)


def foreseen_in(error: BaseException) -> AgentError | None:
    """Give the error that its author foresaw: this one, or the first in an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(foreseen_in, error.exceptions)), None)
    return error if isinstance(error, AgentError) else None
