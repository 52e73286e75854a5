"""Cancelling runs: at once where no worker has them, otherwise through their worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from relay import clock
from relay.codec import RunEnvelope, Task, text_of
from relay.columns import lifecycle_columns
from relay.deadlines import Deadlines
from relay.errors import DecodingFailed, RequestRefused
from relay.events import EventType
from relay.keys import Keys
from relay.run_model import CancelOutcome
from relay.scripts import RedisLink, mapped_errors
from relay.tasks import dispatch

PARENT_STOPPED = "the run that asked for this one has stopped"

_ATTEMPTS = 8


class Cancelling:
    """Cancels runs, and with a run those that it asked for.

    Args:
        link: Redis.
        keys: Key names.
        deadlines: Where the reaper is told to look.
        grace_ms: How long a worker may take to stop a cancelled run.
    """

    def __init__(self, link: RedisLink, keys: Keys, deadlines: Deadlines, grace_ms: int) -> None:
        self._link = link
        self._keys = keys
        self._deadlines = deadlines
        self._grace_ms = grace_ms

    async def cancel(
        self, user_id: str, run_id: str, *, by: str, reason: str | None
    ) -> CancelOutcome:
        """Ask a run to stop, and those below it; see ``RunRegistry.cancel``."""
        user = self._keys.user(user_id)
        for _ in range(_ATTEMPTS):
            with mapped_errors(self._link.url):
                stored = await self._link.client.hmget(
                    user.run(run_id), ["attempt", "thread", "agent", "created_ms"]
                )
            if stored[0] is None:
                raise RequestRefused("unknown_run")
            attempt, now_ms = int(text_of(stored[0])), clock.now_ms()
            envelope = RunEnvelope(run_id, attempt, text_of(stored[1]), user_id, text_of(stored[2]))
            flag = {"by": by, "reason": reason}
            ended = {**flag, "duration_ms": max(0, now_ms - int(text_of(stored[3])))}
            call = self._link.call(
                "cancel",
                user,
                run_id,
                run_id,
                attempt,
                orjson.dumps(flag),
                *lifecycle_columns(envelope, EventType.CANCEL_REQUESTED, now_ms, flag),
                *lifecycle_columns(envelope, EventType.AGENT_CANCELLED, now_ms, ended),
            )
            await self._deadlines.bring_forward(user_id, run_id, now_ms + self._grace_ms)
            [reply] = await self._link.run([call])
            outcome = await self._done(user_id, run_id, flag, [text_of(part) for part in reply])
            if outcome is not None:
                await self.cancel_children(user_id, run_id)
                return outcome
        raise RequestRefused("internal", "The run changes too quickly to be cancelled. Try again.")

    async def cancel_children(self, user_id: str, run_id: str) -> None:
        """Ask all runs that a run has asked for to stop.

        Raises:
            RedisUnavailable: Which of them were told is unknown; ask again.
        """
        user = self._keys.user(user_id)
        with mapped_errors(self._link.url):
            children = await self._link.client.hget(user.run(run_id), "children")
        for child in text_of(children).split():
            try:
                await self.cancel(user_id, child, by="system", reason=PARENT_STOPPED)
            except RequestRefused as refused:
                # It has ended by itself, which is what was wanted.
                if refused.code not in ("run_ended", "unknown_run"):
                    raise

    async def _done(
        self, user_id: str, run_id: str, flag: Mapping[str, Any], reply: Sequence[str]
    ) -> CancelOutcome | None:
        match reply:
            case ["requested", worker]:
                await self._signal(worker, user_id, run_id, flag)
                return CancelOutcome(run_id, "cancel_requested", already=False)
            case ["already", _, worker]:
                await self._signal(worker, user_id, run_id, flag)
                return CancelOutcome(run_id, "cancel_requested", already=True)
            case ["cancelled", next_run, next_agent]:
                if next_run:
                    await dispatch(self._link, self._keys, Task(user_id, next_run, next_agent))
                return CancelOutcome(run_id, "cancelled", already=False)
            case ["ended", "cancelled", stored, next_run, next_agent] if _is_by(stored, flag["by"]):
                # The first time may have ended before the next run's workers were told, or before
                # its caller knew.
                if next_run:
                    await dispatch(self._link, self._keys, Task(user_id, next_run, next_agent))
                return CancelOutcome(run_id, "cancelled", already=True)
            case ["ended", status, *_]:
                raise RequestRefused("run_ended", f"The run has already ended: {status}.")
            case ["unknown"]:
                raise RequestRefused("unknown_run")
            case ["changed", _]:
                return None
        raise DecodingFailed(f"cancel answered {reply!r}")

    async def _signal(
        self, worker_id: str, user_id: str, run_id: str, flag: Mapping[str, Any]
    ) -> None:
        """Wake the run's worker. The flag in the run's hash is what counts."""
        if not worker_id:
            return
        signal = {"kind": "cancel", "user_id": user_id, "run_id": run_id, **flag}
        with mapped_errors(self._link.url):
            await self._link.client.publish(self._keys.worker(worker_id), orjson.dumps(signal))


def _is_by(stored: str, by: str) -> bool:
    """Whether a run's cancel flag is that of whoever asks."""
    try:
        flag = orjson.loads(stored or "{}")
    except ValueError as error:
        raise DecodingFailed(f"a run's hash cannot be read: {error}") from error
    return isinstance(flag, dict) and flag.get("by") == by
