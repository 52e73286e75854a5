"""Runs: accepting requests, giving them to workers, cancelling, and looking them up."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import orjson
import structlog

from relay import clock
from relay.accepting import Accepting
from relay.cancelling import Cancelling
from relay.codec import RunEnvelope, Task, text_of
from relay.deadlines import Deadlines
from relay.errors import DecodingFailed
from relay.inputs import InputAnswer, answer_input
from relay.keys import Keys
from relay.run_model import (
    AgentInfo,
    CancelOutcome,
    Claim,
    NotClaimed,
    Renewed,
    RunDetail,
    RunLimits,
    RunRequest,
    RunSummary,
    SubmitRequest,
    Submitted,
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
        self._accepting = Accepting(link, keys, self._limits, self._deadlines, self._cancelling)

    async def register_agents(self, agents: Sequence[AgentInfo]) -> None:
        """Make agents known to all gateways."""
        await self._accepting.register_agents(agents)

    async def agents(self) -> list[AgentInfo]:
        """List the agents that workers have registered, by name."""
        return await self._accepting.agents()

    async def submit(self, request: SubmitRequest) -> Submitted:
        """Accept a request, or refuse it without any effect; see ``Accepting.submit``."""
        return await self._accepting.submit(request)

    async def open_run(
        self,
        request: SubmitRequest,
        worker_id: str,
        lease_ms: int,
        *,
        fence: str,
        stall_after_ms: int = 0,
    ) -> Claim:
        """Accept and claim a run that is at work already; see ``Accepting.open_run``."""
        return await self._accepting.open_run(
            request, worker_id, lease_ms, fence=fence, stall_after_ms=stall_after_ms
        )

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

        Asking again is harmless: the worker is signalled again, and a run that ended because the
        same one asked for it is ``cancelled`` as before. The runs that this run has asked for are
        asked to stop as well.

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


def _bytes(value: bytes | str | None) -> bytes:
    return value.encode() if isinstance(value, str) else (value or b"")
