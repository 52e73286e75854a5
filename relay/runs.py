"""Runs: accepting requests, giving them to workers, cancelling, and looking them up."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import orjson
import structlog

from relay import clock
from relay.cancelling import Cancelling
from relay.codec import RunEnvelope, Task, text_of
from relay.deadlines import Deadlines
from relay.encoding import encode_json
from relay.errors import DecodingFailed, RequestRefused, RunEnded, StaleFence
from relay.events import EventType, validate_data
from relay.inputs import InputAnswer, answer_input
from relay.keys import Keys
from relay.lifecycle import ENDED
from relay.run_model import (
    AgentInfo,
    CancelOutcome,
    Claim,
    NotClaimed,
    ParentAttempt,
    Renewed,
    RunDetail,
    RunLimits,
    RunRequest,
    RunSummary,
    SubmitRequest,
    Submitted,
    derive_run_id,
    renewed_from,
    summary_from_row,
)
from relay.scripts import RedisLink, mapped_errors
from relay.staging import read_large_event
from relay.tasks import dispatch

log = structlog.stdlib.get_logger(__name__)


class RunRegistry:
    """All runs of all users: submit, claim, cancel, look up.

    Args:
        link: Where the runs are kept.
        keys: Their names.
        limits: Quotas that submit holds each user to.
    """

    def __init__(self, link: RedisLink, keys: Keys, limits: RunLimits | None = None) -> None:
        self._link = link
        self._keys = keys
        self._limits = limits or RunLimits()
        self._deadlines = Deadlines(link, keys)
        self._cancelling = Cancelling(link, keys, self._deadlines, self._limits.cancel_grace_ms)

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

        Calling again with the same message id gives the same run.

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
            case ["duplicate", status]:
                if status == "queued":
                    # The first submit may have died before its hint; a second one is harmless.
                    await dispatch(self._link, self._keys, task)
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
                    f"You already have {self._limits.max_queued} queued runs.",
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

    async def release(self, claim: Claim) -> bool:
        """Give back a run whose attempt has published nothing, as if it had not been claimed.

        Returns:
            False if its worker has to end it instead.

        Raises:
            RedisUnavailable: Whether it was given back is unknown.
        """
        user = self._keys.user(claim.envelope.user_id)
        call = self._link.call("release", user, claim.run_id, claim.run_id, claim.fence)
        [reply] = await self._link.run([call])
        return bool(reply[0] == b"ok")

    async def dispatch_again(self, claim: Claim, delay_ms: int) -> None:
        """Have another attempt of a run begin after a delay; 0 tells its workers at once.

        Raises:
            RedisUnavailable: Whether they know is unknown; the run's deadline finds it later.
        """
        envelope = claim.envelope
        await self._deadlines.bring_forward(
            envelope.user_id, envelope.run_id, clock.now_ms() + delay_ms
        )
        if delay_ms == 0:
            task = Task(envelope.user_id, envelope.run_id, envelope.agent)
            await dispatch(self._link, self._keys, task)

    async def _interrupt(self, user_id: str, run_id: str) -> None:
        try:
            await self.cancel(user_id, run_id, by="system", reason="interrupted by a newer request")
        except RequestRefused as refused:
            # It ended by itself in the meantime, which is what was wanted.
            if refused.code not in ("run_ended", "unknown_run"):
                raise

    async def claim(
        self,
        user_id: str,
        run_id: str,
        worker_id: str,
        lease_ms: int,
        *,
        fence: str | None = None,
        max_attempts: int = 1,
        stall_after_ms: int = 0,
    ) -> Claim | NotClaimed:
        """Take a queued run for one attempt, or learn why not.

        Args:
            user_id: Whose run it is.
            run_id: The run.
            worker_id: Who asks; cancel signals go there.
            lease_ms: How long the claim holds without being renewed.
            fence: A random one by default. With the fence of an earlier claim the answer is the
                same again, with the cancel flag as it is now: a claim whose answer was lost is
                asked for in this way.
            max_attempts: How often the run may be tried if its worker is lost.
            stall_after_ms: Silence after which it counts as stalled; 0 for never.

        Raises:
            RedisUnavailable: Whether it was claimed is unknown; its lease will tell.
            DecodingFailed: The run's request cannot be read.
        """
        fence = fence or secrets.token_hex(8)
        if 0 < stall_after_ms < lease_ms:
            # The look that the request asked for may come long after the silence has begun.
            await self._deadlines.bring_forward(user_id, run_id, clock.now_ms() + stall_after_ms)
        call = self._link.call(
            "claim",
            self._keys.user(user_id),
            run_id,
            run_id,
            fence,
            worker_id,
            lease_ms,
            max_attempts,
            stall_after_ms,
        )
        [reply] = await self._link.run([call])
        if reply[0] != b"claimed":
            return NotClaimed(text_of(reply[0]))
        _, attempt, seq, agent, thread, request, cancel, created_ms, epoch = reply
        try:
            asked = RunRequest(**orjson.loads(request))
        except (ValueError, TypeError) as error:
            raise DecodingFailed(f"the request of run {run_id} cannot be read: {error}") from error
        return Claim(
            envelope=RunEnvelope(run_id, int(attempt), text_of(thread), user_id, text_of(agent)),
            request=asked,
            fence=fence,
            seq=int(seq),
            epoch=text_of(epoch),
            created_ms=int(created_ms),
            cancel=orjson.loads(cancel) if cancel else None,
        )

    async def renew(self, link: RedisLink, claims: Sequence[Claim], lease_ms: int) -> list[Renewed]:
        """Renew the leases of a worker's runs, in one pipeline.

        Args:
            link: The connection to use: leases are renewed from a thread with its own.
            claims: The runs at work.
            lease_ms: How long the leases hold from now on.

        Returns:
            What became of each, in the order of the claims.

        Raises:
            RedisUnavailable: Which leases were renewed is unknown; try again.
        """
        calls = [
            link.call(
                "renew",
                self._keys.user(claim.envelope.user_id),
                claim.run_id,
                claim.run_id,
                claim.fence,
                lease_ms,
            )
            for claim in claims
        ]
        renewed = [renewed_from(reply) for reply in await link.run(calls)] if calls else []
        # The index may have been lost; what is there already is not touched.
        held = [
            (claim.envelope.user_id, claim.run_id)
            for claim, outcome in zip(claims, renewed, strict=True)
            if outcome.is_held
        ]
        await Deadlines(link, self._keys).restore(held, clock.now_ms() + lease_ms)
        return renewed

    async def answer_input(
        self, user_id: str, run_id: str, request_id: str, answer: InputAnswer, *, by: str = "user"
    ) -> None:
        """Answer an open input request; see ``relay.inputs.answer_input``."""
        await answer_input(self._link, self._keys, user_id, run_id, request_id, answer, by=by)

    async def look_no_later(self, user_id: str, run_id: str, at_ms: int) -> None:
        """Have the reaper look at a run no later than this, for a deadline of its own."""
        await self._deadlines.bring_forward(user_id, run_id, at_ms)

    async def cancel(
        self, user_id: str, run_id: str, *, by: str = "user", reason: str | None = None
    ) -> CancelOutcome:
        """Ask a run to stop: at once if no worker has it, otherwise through its worker.

        Asking again is harmless; the worker is signalled again. The runs that this run has asked
        for are asked to stop as well.

        Raises:
            RequestRefused: ``unknown_run`` or ``run_ended``.
            RedisUnavailable: Whether the request was noted is unknown; ask again.
        """
        return await self._cancelling.cancel(user_id, run_id, by=by, reason=reason)

    async def cancel_children(self, user_id: str, run_id: str) -> None:
        """Ask the runs that a run has asked for to stop.

        Raises:
            RedisUnavailable: Which of them were told is unknown; ask again.
        """
        await self._cancelling.cancel_children(user_id, run_id)

    async def list_runs(self, user_id: str) -> list[RunSummary]:
        """List a user's active and just-ended runs, oldest first.

        Raises:
            RedisUnavailable: Redis did not answer.
        """
        call = self._link.call("read", self._keys.user(user_id), None, 2**53, 1, "runs", "")
        [reply] = await self._link.run([call])
        return [summary_from_row(row) for row in reply[7]]

    async def get(self, user_id: str, run_id: str) -> RunDetail | None:
        """Look up a user's run; None where the user has no such run (any more).

        Raises:
            RedisUnavailable: Redis did not answer.
            DecodingFailed: The stored run cannot be read.
        """
        user = self._keys.user(user_id)
        names = ["agent", "thread", "status", "attempt", "seq", "first_offset", "open_tools"]
        names += ["open_inputs", "cancel", "created_ms", "ended_ms", "result_offset", "parent"]
        names += ["terminal"]
        with mapped_errors(self._link.url):
            stored = await self._link.client.hmget(user.run(run_id), names)
            if stored[0] is None:
                return None
            terminal = stored[13]
            if terminal is None and stored[11]:
                terminal = await read_large_event(self._link, user.body(int(stored[11])))
        summary = summary_from_row([run_id.encode(), *(_bytes(part) for part in stored[:13])])
        event = None if terminal is None else orjson.loads(terminal)
        if event is not None and event.get("run_id") != run_id:
            # The channel has expired before the run, and another large event has the offset now.
            event = None
        return RunDetail(summary, event)


def _accepted(request: SubmitRequest) -> tuple[str, bytes, bytes]:
    """Give a request's run id, its bytes for the worker, and those of ``agent_queued``."""
    run_id = derive_run_id(request.user_id, request.message_id)
    metadata = dict(request.metadata)
    if request.parent is not None:
        metadata["parent_run_id"] = request.parent.run_id
    asked = {"message_id": request.message_id, "content": request.content, "metadata": metadata}
    envelope = RunEnvelope(run_id, 0, request.thread_id, request.user_id, request.agent)
    data = validate_data(EventType.AGENT_QUEUED, asked)
    return run_id, encode_json(asked), envelope.encode(EventType.AGENT_QUEUED, clock.now_ms(), data)


def _agent_from(name: bytes | str, stored: bytes | str) -> AgentInfo:
    try:
        fields = orjson.loads(stored)
        return AgentInfo(
            text_of(name), fields.get("description", ""), fields.get("policy", "enqueue")
        )
    except (ValueError, AttributeError) as error:
        raise DecodingFailed(f"not an agent: {type(error).__name__}") from error


def _bytes(value: bytes | str | None) -> bytes:
    return value.encode() if isinstance(value, str) else (value or b"")
