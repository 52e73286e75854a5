"""Accepting runs: which agents there are, what users ask of them, within their quotas."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import orjson
import structlog

from relay import clock
from relay.cancelling import Cancelling
from relay.codec import RunEnvelope, Task, text_of
from relay.deadlines import Deadlines
from relay.encoding import SECRET_NAMES, encode_json, redact
from relay.errors import DecodingFailed, RequestRefused, RunEnded, StaleFence
from relay.events import EventType, validate_data
from relay.keys import Keys
from relay.lifecycle import ENDED
from relay.run_model import (
    AgentInfo,
    Claim,
    ParentAttempt,
    RunLimits,
    RunRequest,
    SubmitRequest,
    Submitted,
    derive_run_id,
)
from relay.scripts import RedisLink, mapped_errors
from relay.tasks import dispatch

log = structlog.stdlib.get_logger(__name__)


class Accepting:
    """Accepts requests as runs.

    Args:
        link: Redis.
        keys: Key names.
        limits: Quotas that each user is held to.
        deadlines: Where the reaper is told to look.
        cancelling: Stops the run that a newer request interrupts.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        limits: RunLimits,
        deadlines: Deadlines,
        cancelling: Cancelling,
    ) -> None:
        self._link = link
        self._keys = keys
        self._limits = limits
        self._deadlines = deadlines
        self._cancelling = cancelling

    async def register_agents(self, agents: Sequence[AgentInfo]) -> None:
        """Make agents known to all gateways."""
        with mapped_errors(self._link.url):
            await self._link.client.hset(
                self._keys.agents,
                mapping={
                    agent.name: orjson.dumps(
                        {"description": agent.description, "policy": agent.policy}
                    )
                    for agent in agents
                },
            )

    async def agents(self) -> list[AgentInfo]:
        """List the agents that workers have registered, by name."""
        with mapped_errors(self._link.url):
            stored = await self._link.client.hgetall(self._keys.agents)
        agents = []
        for name, fields in stored.items():
            try:
                agents.append(_agent_from(name, fields))
            except DecodingFailed as error:
                # Every connection asks for the list: one bad entry must not refuse them all.
                log.error("agent not understood", agent=repr(name)[:200], error=str(error))
        return sorted(agents, key=lambda agent: agent.name)

    async def submit(self, request: SubmitRequest) -> Submitted:
        """Accept a request, or refuse it without any effect.

        Calling again with the same message id gives the same run, and interrupts what the first
        call was to interrupt.

        Raises:
            RequestRefused: ``unknown_agent``, ``rate_limited``, ``thread_busy``; ``run_ended``:
                the run that asks for this one may ask for nothing any more.
            RedisUnavailable: Whether it was accepted is unknown; submit it again.
        """
        with mapped_errors(self._link.url):
            stored = await self._link.client.hget(self._keys.agents, request.agent)
        if stored is None:
            known = ", ".join(agent.name for agent in await self.agents())
            raise RequestRefused(
                "unknown_agent",
                f"No worker has registered an agent named {request.agent!r}."
                + (f" Known agents: {known}." if known else " No agent is registered yet."),
            )
        policy = request.policy or _agent_from(request.agent, stored).policy
        run_id, asked, event = _accepted(request)
        parent = request.parent or ParentAttempt("", "")
        call = self._link.call(
            "submit",
            self._keys.user(request.user_id),
            run_id,
            run_id,
            request.agent,
            request.thread_id,
            policy,
            asked,
            event,
            hashlib.sha256(event).hexdigest(),
            self._limits.max_active,
            self._limits.max_queued,
            parent.run_id,
            parent.fence,
        )
        # Intent first: should this process die after the script, the reaper finds the run.
        await self._deadlines.bring_forward(
            request.user_id, run_id, clock.now_ms() + self._limits.dispatch_check_ms
        )
        [reply] = await self._link.run([call])
        return await self._submitted(request, run_id, [text_of(part) for part in reply])

    async def _submitted(
        self, request: SubmitRequest, run_id: str, reply: Sequence[str]
    ) -> Submitted:
        task = Task(request.user_id, run_id, request.agent)
        match reply:
            case ["ok", how, _, _, *interrupted]:
                if how == "dispatch":
                    await dispatch(self._link, self._keys, task)
                for other in interrupted:
                    await self._interrupt(request.user_id, other)
                return Submitted(run_id, duplicate=False, status="queued")
            case ["duplicate", status, *interrupted]:
                # The first submit may have died before its hints; a second one is harmless.
                if status == "queued":
                    await dispatch(self._link, self._keys, task)
                for other in interrupted:
                    await self._interrupt(request.user_id, other)
                return Submitted(run_id, duplicate=True, status=status)
            case ["thread_busy", active]:
                raise RequestRefused("thread_busy", f"The thread's run {active} is still active.")
            case ["parent_gone"]:
                raise RequestRefused("run_ended", "The run that asks for this one has stopped.")
            case ["rate_limited", "active"]:
                raise self._too_many_active()
            case ["rate_limited", _]:
                raise RequestRefused(
                    "rate_limited",
                    f"No more than {self._limits.max_queued} of your runs may wait for others.",
                    retry_after_ms=1_000,
                )
        raise DecodingFailed(f"submit answered {reply!r}")

    def _too_many_active(self) -> RequestRefused:
        return RequestRefused(
            "rate_limited",
            f"You already have {self._limits.max_active} active runs.",
            retry_after_ms=1_000,
        )

    async def open_run(
        self,
        request: SubmitRequest,
        worker_id: str,
        lease_ms: int,
        *,
        fence: str,
        stall_after_ms: int = 0,
    ) -> Claim:
        """Accept a run that is at work already, and claim it, in one step.

        It waits for no turn in its thread, is given to no other worker and has one attempt.

        Args:
            request: What it is about; its agent need not be registered, its policy is not used.
            worker_id: Who carries it out; signals go there.
            lease_ms: How long the claim holds without being renewed.
            fence: A random one; the same one again gives the same claim again.
            stall_after_ms: Silence after which it counts as stalled; 0 for never.

        Raises:
            RequestRefused: ``rate_limited``.
            RunEnded: There was a run of this message; it has ended.
            StaleFence: There is a run of this message; it is at work elsewhere.
            RedisUnavailable: Whether it was opened is unknown; open it again.
        """
        run_id, asked, event = _accepted(request)
        call = self._link.call(
            "open",
            self._keys.user(request.user_id),
            run_id,
            run_id,
            request.agent,
            request.thread_id,
            asked,
            event,
            hashlib.sha256(event).hexdigest(),
            self._limits.max_active,
            fence,
            worker_id,
            lease_ms,
            stall_after_ms,
        )
        look_in_ms = min(lease_ms, stall_after_ms or lease_ms)
        await self._deadlines.bring_forward(request.user_id, run_id, clock.now_ms() + look_in_ms)
        [reply] = await self._link.run([call])
        match [text_of(part) for part in reply]:
            case ["opened", seq, created_ms, epoch]:
                return Claim(
                    envelope=RunEnvelope(
                        run_id, 1, request.thread_id, request.user_id, request.agent
                    ),
                    request=RunRequest(**orjson.loads(asked)),
                    fence=fence,
                    seq=int(seq),
                    epoch=epoch,
                    created_ms=int(created_ms),
                )
            case ["duplicate", status] if status in ENDED:
                raise RunEnded(run_id, status)
            case ["duplicate", _]:
                raise StaleFence(f"run {run_id} is at work elsewhere")
            case ["rate_limited", _]:
                raise self._too_many_active()
            case other:
                raise DecodingFailed(f"open answered {other!r}")

    async def _interrupt(self, user_id: str, run_id: str) -> None:
        try:
            await self._cancelling.cancel(
                user_id, run_id, by="system", reason="interrupted by a newer request"
            )
        except RequestRefused as refused:
            # It ended by itself in the meantime, which is what was wanted.
            if refused.code not in ("run_ended", "unknown_run"):
                raise


def _accepted(request: SubmitRequest) -> tuple[str, bytes, bytes]:
    """Give a request's run id, its bytes for the worker, and those of ``agent_queued``."""
    run_id = derive_run_id(request.user_id, request.message_id)
    metadata = dict(request.metadata)
    if request.parent is not None:
        metadata["parent_run_id"] = request.parent.run_id
    asked = {"message_id": request.message_id, "content": request.content, "metadata": metadata}
    envelope = RunEnvelope(run_id, 0, request.thread_id, request.user_id, request.agent)
    given = encode_json(asked)
    # The agent gets everything that it was given; devices, and the log, get no secrets.
    data = redact(validate_data(EventType.AGENT_QUEUED, asked), SECRET_NAMES)
    return run_id, given, envelope.encode(EventType.AGENT_QUEUED, clock.now_ms(), data)


def _agent_from(name: bytes | str, stored: bytes | str) -> AgentInfo:
    try:
        fields = orjson.loads(stored)
        return AgentInfo(
            text_of(name), fields.get("description", ""), fields.get("policy", "enqueue")
        )
    except (ValueError, AttributeError) as error:
        raise DecodingFailed(f"not an agent: {type(error).__name__}") from error
