"""What users may do with runs, the same over every transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from gateway.requests import AnswerFields, MessageFields, check_content
from relay.errors import RequestRefused
from relay.inputs import InputAnswer
from relay.run_model import AgentInfo, CancelOutcome, RunDetail, SubmitRequest, Submitted
from relay.runs import RunRegistry
from relay.scripts import ScriptFailed

log = structlog.stdlib.get_logger(__name__)

AGENTS_MAX_AGE_S = 1.0
"""A reconnect storm reads the list of agents once a second, not once per connection."""


class RunCommands:
    """Submits and cancels runs in a user's name.

    Attributes:
        agents_error: Why the list of agents could not be read when it was last asked for, or None.

    Args:
        registry: All runs.
        default_agent: For a message that names none; None: the only one registered.
        max_content_chars: Longest content of a message.
    """

    def __init__(
        self, registry: RunRegistry, *, default_agent: str | None, max_content_chars: int
    ) -> None:
        self.registry = registry
        self._default_agent = default_agent
        self._max_content_chars = max_content_chars
        self.agents_error: str | None = None
        self._agents: Sequence[AgentInfo] = ()
        self._agents_read_s = float("-inf")
        self._reading = asyncio.Lock()

    async def agents(self) -> Sequence[AgentInfo]:
        """List the registered agents, the default first, as they were at most a second ago.

        A list that cannot be understood refuses nobody: clients get the last good one.

        Raises:
            RedisUnavailable: Redis does not answer, so this gateway can serve nobody now.
        """
        async with self._reading:
            if time.monotonic() - self._agents_read_s > AGENTS_MAX_AGE_S:
                await self._read_agents()
                self._agents_read_s = time.monotonic()
            return self._agents

    async def _read_agents(self) -> None:
        try:
            agents = await self.registry.agents()
        except ScriptFailed as error:
            if self.agents_error is None:
                log.error("list of agents cannot be read", error=str(error))
            self.agents_error = str(error)
            return
        self.agents_error = None
        # Clients offer the list in this order, so the default comes first.
        self._agents = sorted(agents, key=lambda agent: agent.name != self._default_agent)

    async def submit(self, user_id: str, message: MessageFields, message_id: str) -> Submitted:
        """Start a run.

        Raises:
            RequestRefused: ``unknown_agent``, ``rate_limited``, ``thread_busy``,
                ``payload_too_large``.
            RedisUnavailable: Whether it was accepted is unknown; the same id may come again.
        """
        check_content(message.content, self._max_content_chars)
        return await self.registry.submit(
            SubmitRequest(
                user_id=user_id,
                thread_id=message.thread_id,
                agent=message.agent or await self._choose_agent(),
                content=message.content,
                message_id=message_id,
                metadata=message.metadata,
            )
        )

    async def _choose_agent(self) -> str:
        if self._default_agent is not None:
            return self._default_agent
        agents = await self.registry.agents()
        if len(agents) == 1:
            return agents[0].name
        names = ", ".join(agent.name for agent in agents)
        raise RequestRefused(
            "unknown_agent",
            f"Several agents are registered: {names}." if names else "No agent is registered yet.",
            suggestions=("Name one in the field agent.", "Or set RELAY_DEFAULT_AGENT.")
            if names
            else ("Start a worker: relay worker MODULE:ATTR.",),
        )

    async def cancel(self, user_id: str, run_id: str, reason: str | None) -> CancelOutcome:
        """Ask a run to stop.

        Raises:
            RequestRefused: ``unknown_run``, ``run_ended``.
            RedisUnavailable: Whether the request was noted is unknown; ask again.
        """
        return await self.registry.cancel(user_id, run_id, by="user", reason=reason)

    async def answer_input(
        self, user_id: str, run_id: str, request_id: str, answer: AnswerFields
    ) -> None:
        """Answer an agent's question; the first answer, from whichever tab, counts.

        The same answer again is taken as it was the first time.

        Raises:
            RequestRefused: ``unknown_run``, ``run_ended``, ``unknown_request``,
                ``invalid_frame``: the value does not fit the question, which stays open.
            RedisUnavailable: Whether it was answered is unknown; answering again tells.
        """
        await self.registry.answer_input(
            user_id, run_id, request_id, InputAnswer(answer.value, answer.is_denied)
        )

    async def get(self, user_id: str, run_id: str) -> RunDetail:
        """Look up a run.

        Raises:
            RequestRefused: ``unknown_run``.
            RedisUnavailable: Redis does not answer.
        """
        detail = await self.registry.get(user_id, run_id)
        if detail is None:
            raise RequestRefused("unknown_run")
        return detail
