"""The calls of the deprecated ``WebSocketNotifier``, on top of the bridge.

Deprecated: use ``AgentWebSocketBridge``. Each call site is told so once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from agent_worker.bridge import AgentWebSocketBridge
from agent_worker.bridged_run import BridgedRun
from agent_worker.tool import Tool
from relay.encoding import SECRET_NAMES, redact
from relay.errors import AGENT_ERRORS, AgentError, GrammarViolation, StaleFence
from relay.events import EventType

_log = structlog.get_logger(__name__)

_RunKey = tuple[str, str]


class NotifierContext(Protocol):
    """What the old calls were given first: any object with these attributes."""

    @property
    def user_id(self) -> str:
        """Whose run it is."""

    @property
    def thread_id(self) -> str:
        """The conversation that it belongs to."""

    @property
    def run_id(self) -> str:
        """The caller's own id of the run; the relay derives its id from it."""

    @property
    def agent_name(self) -> str:
        """The agent."""


@dataclass(slots=True)
class _Notified:
    """A run that was announced and has not ended."""

    run: BridgedRun
    tools: dict[str, list[Tool]] = field(default_factory=dict)


class WebSocketNotifier:
    """Deprecated: the old calls, publishing the same events as the bridge.

    Everything of a run begins with ``send_agent_started`` and ends with ``send_agent_completed`` or
    ``send_agent_error``. A call for a run that has not begun, or has ended (a user may have stopped
    it), raises ``GrammarViolation``.

    Args:
        bridge: What publishes; the notifier neither starts nor closes it.
    """

    def __init__(self, bridge: AgentWebSocketBridge) -> None:
        self._bridge = bridge
        self._runs: dict[_RunKey, _Notified] = {}
        self._warned: set[tuple[str, int]] = set()

    # Not coroutine functions: the call itself must find its call site, wherever it is awaited.

    def send_agent_started(
        self, context: NotifierContext, content: str = ""
    ) -> Coroutine[Any, Any, None]:
        """Begin a run: ``agent_queued`` and ``agent_started``."""
        self._warn("send_agent_started", "bridge.run(…)")
        return self._start(context, content)

    def send_agent_thinking(
        self,
        context: NotifierContext,
        thought: str,
        step_number: int | None = None,
        progress_percentage: float | None = None,
        estimated_remaining_ms: int | None = None,
    ) -> Coroutine[Any, Any, None]:
        """Publish ``agent_thinking``."""
        self._warn("send_agent_thinking", "run.thinking(…)")
        return self._think(
            context, thought, step_number, progress_percentage, estimated_remaining_ms
        )

    def send_tool_executing(
        self,
        context: NotifierContext,
        tool_name: str,
        tool_purpose: str | None = None,
        estimated_duration_ms: int | None = None,
        parameters: Any = None,
    ) -> Coroutine[Any, Any, None]:
        """Publish ``tool_executing``; the call stays open until ``send_tool_completed``."""
        self._warn("send_tool_executing", "run.tool(…)")
        return self._begin_tool(context, tool_name, tool_purpose, estimated_duration_ms, parameters)

    def send_tool_completed(
        self, context: NotifierContext, tool_name: str, result: Any = None
    ) -> Coroutine[Any, Any, None]:
        """Publish ``tool_completed`` for the longest open call of this tool."""
        self._warn("send_tool_completed", "run.tool(…)")
        return self._end_tool(context, tool_name, result)

    def send_stream_chunk(
        self, context: NotifierContext, chunk_id: str, content: str, is_final: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Publish a ``text_delta``. The relay numbers the pieces: id and mark are not used."""
        self._warn("send_stream_chunk", "run.delta(…)")
        return self._stream(context, content)

    def send_agent_completed(
        self, context: NotifierContext, result: Any = None, duration_ms: float = 0
    ) -> Coroutine[Any, Any, None]:
        """End the run with ``agent_completed``. The relay measures how long it took."""
        self._warn("send_agent_completed", "bridge.run(…)")
        return self._complete(context, result)

    def send_agent_error(
        self,
        context: NotifierContext,
        error_message: str,
        error_type: str | None = None,
        error_details: Any = None,
        recovery_suggestions: Sequence[str] | None = None,
        is_recoverable: bool = True,
        estimated_retry_delay_ms: int | None = None,
    ) -> Coroutine[Any, Any, None]:
        """End the run with ``agent_error``.

        Args:
            context: The run.
            error_message: A sentence for the user, shown as it is: never an exception's text.
            error_type: One of the relay's codes; any other counts as ``agent_failed``.
            error_details: For the log, in any form; nothing of it reaches the user.
            recovery_suggestions: What the user can do.
            is_recoverable: Whether trying again may help.
            estimated_retry_delay_ms: When.
        """
        self._warn("send_agent_error", "bridge.run(…)")
        code = error_type if error_type in AGENT_ERRORS else "agent_failed"
        error = AgentError(
            str(code),
            error_message,
            is_recoverable=is_recoverable,
            recovery_suggestions=(
                None if recovery_suggestions is None else list(recovery_suggestions)
            ),
            retry_after_ms=estimated_retry_delay_ms,
        )
        return self._fail(context, error, error_type, error_details)

    def _warn(self, call: str, instead: str) -> None:
        frame = sys._getframe(2)  # noqa: SLF001 (the caller of the public call)
        site = (frame.f_code.co_filename, frame.f_lineno)
        if site in self._warned:
            return
        self._warned.add(site)
        warnings.warn(
            f"WebSocketNotifier.{call} is deprecated; use {instead} of AgentWebSocketBridge.",
            DeprecationWarning,
            stacklevel=3,
        )

    # --- the calls ---

    async def _start(self, context: NotifierContext, content: str) -> None:
        key = (context.user_id, context.run_id)
        if key in self._runs and not self._runs[key].run.is_ended:
            raise StaleFence(f"run {context.run_id} has begun already")
        run = await self._bridge.open(
            user_id=context.user_id,
            thread_id=context.thread_id,
            agent=context.agent_name,
            content=content,
            message_id=context.run_id,
        )
        # Runs that were stopped by their users are never heard of again.
        self._runs = {key: kept for key, kept in self._runs.items() if not kept.run.is_ended}
        self._runs[key] = _Notified(run)

    async def _think(
        self,
        context: NotifierContext,
        thought: str,
        step: int | None,
        percentage: float | None,
        remaining_ms: int | None,
    ) -> None:
        run = self._of(context, EventType.AGENT_THINKING).run
        await run.thinking(
            thought,
            step=step,
            progress_percentage=percentage,
            estimated_remaining_ms=remaining_ms,
        )

    async def _begin_tool(
        self,
        context: NotifierContext,
        name: str,
        purpose: str | None,
        estimated_duration_ms: int | None,
        parameters: Any,
    ) -> None:
        notified = self._of(context, EventType.TOOL_EXECUTING)
        tool = notified.run.tool(name, parameters, purpose, estimated_duration_ms)
        await tool.begin()
        notified.tools.setdefault(name, []).append(tool)

    async def _end_tool(self, context: NotifierContext, name: str, result: Any) -> None:
        notified = self._of(context, EventType.TOOL_COMPLETED)
        calls = notified.tools.get(name)
        if not calls:
            raise GrammarViolation(EventType.TOOL_COMPLETED, f"no call of {name} is open")
        tool = calls.pop(0)
        tool.result = result
        await tool.end(None)

    async def _stream(self, context: NotifierContext, content: str) -> None:
        await self._of(context, EventType.TEXT_DELTA).run.delta(content)

    async def _complete(self, context: NotifierContext, result: Any) -> None:
        await self._ended(context, EventType.AGENT_COMPLETED).complete(result)

    async def _fail(
        self,
        context: NotifierContext,
        error: AgentError,
        error_type: str | None,
        details: Any,
    ) -> None:
        run = self._ended(context, EventType.AGENT_ERROR)
        if details is not None or error_type not in (None, error.code):
            _log.info(
                "agent_error_details",
                run_id=run.run_id,
                error_type=error_type,
                details=_shown(details),
            )
        await run.fail(error)

    def _of(self, context: NotifierContext, event_type: EventType) -> _Notified:
        notified = self._runs.get((context.user_id, context.run_id))
        if notified is None:
            raise GrammarViolation(
                event_type, f"run {context.run_id} has not begun (send_agent_started), or has ended"
            )
        return notified

    def _ended(self, context: NotifierContext, event_type: EventType) -> BridgedRun:
        notified = self._of(context, event_type)
        del self._runs[context.user_id, context.run_id]
        return notified.run


def _shown(details: Any) -> Any:
    """Give what the log may hold of an error's details: never a secret, and never an exception."""
    try:
        shown = redact(details, SECRET_NAMES)
        # Whoever renders the log calls it.
        repr(shown)
    except Exception:  # noqa: BLE001
        # Whatever the caller's objects do, the run must end.
        return f"not shown: {type(details).__name__}"
    return shown
