"""What an agent's author sees of a run: publish thoughts, tools, text; read the request.

Every method raises in the agent when its arguments are wrong or the call is not legal at this
point; nothing of such a call reaches the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent_worker.children import Children
from agent_worker.errands import Errands
from agent_worker.outlet import Outlet
from agent_worker.questions import DEFAULT_TIMEOUT_S, Questions, choice_schema
from agent_worker.step import Step
from agent_worker.tool import Tool, innermost_tool
from relay.errors import GrammarViolation, InputNotAnswered, InvalidEvent
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

    def __init__(self, info: RunInfo, outlet: Outlet, errands: Errands) -> None:
        self._info = info
        self._outlet = outlet
        self._questions = Questions(outlet, errands)
        self._children = Children(info.user_id, info.run_id, info.attempt, errands)
        self._steps = 0

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

    def step(self, name: str, total_steps: int | None = None) -> Step:
        """Name what the ``async with`` block does, as one of several steps.

        Entering the block publishes a thought with the step's number; the steps of a run count
        from 1. What is published within belongs to it.

        Args:
            name: What the step is called, for people.
            total_steps: How many there will be, where that is known.
        """
        self._steps += 1
        return Step(self, name, self._steps, total_steps)

    async def ask(
        self,
        prompt: str,
        kind: Literal["text", "choice"] = "text",
        *,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[Any] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Any:
        """Ask the user, and wait for the answer: the first one, from whichever device.

        Args:
            prompt: The question.
            kind: ``text``, or ``choice`` among ``choices``.
            schema: JSON schema that the answer must fit; it is checked before it reaches you.
            choices: The values to choose from; gives the schema for ``choice``.
            timeout_s: How long the question stays open, at most a week.

        Returns:
            The answer's value: a text, one of the choices, or what the schema allows.

        Raises:
            InputDenied: The user refused to answer.
            InputExpired: No answer came in time.
            InvalidEvent: A part of the question is not allowed; it reached nobody.
        """
        if kind not in ("text", "choice"):
            raise InvalidEvent(f"input_requested: kind={kind!r}: ask for text or choice")
        if (choices is not None) and (kind != "choice" or schema is not None):
            raise InvalidEvent("input_requested: choices belong to kind=choice, without a schema")
        if kind == "choice" and schema is None:
            schema = choice_schema(choices or ())
        return await self._questions.ask(kind, prompt, schema, timeout_s)

    async def approve(self, prompt: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
        """Ask the user for permission, and wait for it.

        Returns:
            True only if the user approved: False for a no, a refusal to answer, and no answer
            in time. The user sees which of them it was.

        Raises:
            InvalidEvent: ``timeout_s`` is not allowed.
        """
        try:
            return await self._questions.ask("approval", prompt, None, timeout_s) is True
        except InputNotAnswered:
            return False

    async def call_agent(
        self, agent: str, content: str, metadata: Mapping[str, Any] | None = None
    ) -> Any:
        """Have another agent do a part of the work, as a run below this one; give its result.

        The user sees it as a run of its own. Whatever stops this run stops it as well. It counts
        towards the user's active runs.

        Args:
            agent: The other agent's name, on whichever worker.
            content: What to ask of it.
            metadata: What to send along.

        Raises:
            AgentError: It ended with this error, or was stopped; ``rate_limited`` if the user has
                too many active runs.
            RequestRefused: ``unknown_agent``.
        """
        return await self._children.call(agent, content, metadata)

    async def custom(self, name: str, value: Any) -> None:
        """Publish an event whose meaning you agreed on with the client's author.

        Raises:
            EncodingFailed: ``value`` has no JSON form; the error names the place.
        """
        await self._outlet.publish(EventType.CUSTOM, {"name": name, "value": value})

    def receive_answer(self, request_id: str, answer: Mapping[str, Any]) -> None:
        """Take what became of a question. The worker calls this."""
        self._questions.receive(request_id, answer)

    async def end_waits(self) -> None:
        """End what still waits when the attempt is over. The worker calls this.

        Questions are given up, and runs below this one that are still at work are stopped.
        """
        self._questions.close()
        await self._children.stop_all()
