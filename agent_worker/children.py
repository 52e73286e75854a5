"""Runs that a run asks for: started, waited for, and stopped with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from agent_worker.errands import Errands
from relay.errors import AgentError, RequestRefused
from relay.run_model import RunDetail, derive_run_id

FIRST_LOOK_S, LONGEST_LOOK_S = 0.02, 1.0
LOOK_SHARE = 0.1
"""A child is looked at again after this share of the time that it has taken so far."""

PARENT_STOPPED = "the run that asked for this one has stopped"

_ENDED = frozenset({"completed", "error", "cancelled"})


class Children:
    """The runs below one attempt.

    Args:
        user_id: Whose runs they are.
        run_id: The run above them.
        attempt: Its attempt: another one asks anew.
        errands: How they are started, looked at and stopped.
    """

    def __init__(self, user_id: str, run_id: str, attempt: int, errands: Errands) -> None:
        self._user_id = user_id
        self._prefix = f"{run_id}/{attempt}"
        self._errands = errands
        self._count = 0
        self._running: set[str] = set()
        self._waiting = 0
        self._calls: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def call(self, agent: str, content: str, metadata: Mapping[str, Any] | None) -> Any:
        """Run an agent and give its result; see ``Run.call_agent``."""
        if self._is_closed:
            raise RequestRefused("run_ended", "The run that asks for this one has stopped.")
        task = asyncio.current_task()
        if task is not None:
            self._calls.add(task)
        try:
            return await self._call(agent, content, metadata)
        finally:
            self._calls.discard(task)

    async def _call(self, agent: str, content: str, metadata: Mapping[str, Any] | None) -> Any:
        self._count += 1
        message_id = f"{self._prefix}/{self._count}"
        run_id = derive_run_id(self._user_id, message_id)
        # Before it is submitted: after a cancellation in between nobody knows whether it was.
        self._running.add(run_id)
        self._wait_begins()
        try:
            await self._errands.start_child(agent, content, dict(metadata or {}), message_id)
            detail = await self._end_of(run_id)
        except RequestRefused as refused:
            self._running.discard(run_id)
            if refused.code == "rate_limited":
                raise AgentError(
                    "rate_limited", refused.detail, retry_after_ms=refused.retry_after_ms
                ) from refused
            raise
        except asyncio.CancelledError:
            if not self._is_closed:
                await self._stop(run_id)
            raise
        finally:
            self._wait_ends()
        self._running.discard(run_id)
        return _result_of(agent, detail)

    # A run has one place to lend, for however many runs it waits (ADR 0007).

    def _wait_begins(self) -> None:
        self._waiting += 1
        if self._waiting == 1:
            self._errands.wait_begins()

    def _wait_ends(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self._errands.wait_ends()

    async def stop_all(self) -> None:
        """Stop what is still at work: nothing outlives the attempt that asked for it.

        Tasks that the agent left behind, and that wait for it, are cancelled.
        """
        self._is_closed = True
        for task in list(self._calls):
            task.cancel()
        for run_id in list(self._running):
            await self._stop(run_id)

    async def _stop(self, run_id: str) -> None:
        await self._errands.stop_child(run_id, PARENT_STOPPED)
        self._running.discard(run_id)

    async def _end_of(self, run_id: str) -> RunDetail | None:
        began_s = time.monotonic()
        while True:
            detail = await self._errands.read_child(run_id)
            if detail is None or detail.summary.status in _ENDED:
                return detail
            taken_s = time.monotonic() - began_s
            await asyncio.sleep(min(LONGEST_LOOK_S, max(FIRST_LOOK_S, taken_s * LOOK_SHARE)))


def _result_of(agent: str, detail: RunDetail | None) -> Any:
    data = None if detail is None or detail.terminal is None else detail.terminal["data"]
    if detail is None or data is None:
        raise AgentError("internal")
    match detail.summary.status:
        case "completed":
            return data["result"]
        case "cancelled":
            raise AgentError("agent_failed", f"The agent {agent} was stopped.")
        case _:
            raise AgentError(
                data["code"],
                data["error_message"],
                is_recoverable=data["is_recoverable"],
                recovery_suggestions=data["recovery_suggestions"],
                retry_after_ms=data.get("retry_after_ms"),
            )
