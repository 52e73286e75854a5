"""What every claimed run of a process needs, whoever carries it out: its identity, its lease."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from agent_worker.leases import Lease
from agent_worker.run import Request, RunInfo
from agent_worker.stops import AttemptControl, read_answers, read_cancel_flag
from relay.errors import PublishRefused
from relay.keys import Keys
from relay.run_model import Claim

_log = structlog.get_logger(__name__)


def info_of(claim: Claim) -> RunInfo:
    """Say which run, attempt and request a claim is for."""
    envelope, request = claim.envelope, claim.request
    return RunInfo(
        run_id=envelope.run_id,
        user_id=envelope.user_id,
        thread_id=envelope.thread_id,
        agent=envelope.agent,
        attempt=envelope.attempt,
        request=Request(request.content, request.metadata, request.message_id),
    )


def lease_of(claim: Claim, keys: Keys, control: AttemptControl) -> Lease:
    """Make the lease of a claim, whose news are told to ``control`` on the running event loop."""
    loop = asyncio.get_running_loop()

    def tell(callback: Callable[[], None]) -> None:
        # The loop is closed where its process ends without waiting for the thread.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(callback)

    def pass_on(answers: bytes) -> None:
        try:
            read = read_answers(answers)
        except ValueError as error:
            _log.error("answers_not_readable", run_id=claim.run_id, reason=str(error))
            return
        for request_id, answer in read.items():
            control.answer(request_id, answer)

    def lose(refusal: PublishRefused) -> None:
        tell(lambda: control.refuse(refusal))

    return Lease(
        user=keys.user(claim.envelope.user_id),
        run_id=claim.run_id,
        agent=claim.envelope.agent,
        since_ms=time.time_ns() // 1_000_000,
        fence=claim.fence,
        on_cancel=lambda flag: tell(lambda: control.request_stop(read_cancel_flag(flag))),
        on_answers=lambda answers: tell(lambda: pass_on(answers)),
        on_lost=lose,
    )
