"""What a run at work asks of the relay beside publishing: deadlines, and runs of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog

from agent_worker.metrics import WorkerMetrics
from agent_worker.patience import until_redis_answers
from relay.errors import RequestRefused
from relay.run_model import Claim, ParentAttempt, RunDetail, SubmitRequest
from relay.runs import RunRegistry

_log = structlog.get_logger(__name__)


class Errands(Protocol):
    """What a run asks for. Everything waits for Redis as long as it takes."""

    async def look_no_later(self, at_ms: int) -> None:
        """Have the reaper look at this run no later than this."""

    async def release(self) -> bool:
        """Give the run back before it began; False if it has to be ended instead."""

    async def start_child(
        self, agent: str, content: str, metadata: Mapping[str, Any], message_id: str
    ) -> None:
        """Submit a run below this one; doing it twice changes nothing.

        Raises:
            RequestRefused: Unknown agent, a quota is used up, or this run may ask no more.
        """

    async def read_child(self, run_id: str) -> RunDetail | None:
        """Look up a run below this one."""

    async def stop_child(self, run_id: str, reason: str) -> None:
        """Ask a run below this one to stop; one that has ended is left alone."""

    def wait_begins(self) -> None:
        """Note that this run waits for runs below it, at least with a part of it."""

    def wait_ends(self) -> None:
        """Note that this wait is over."""


class RegistryErrands:
    """Errands for one claimed run.

    Args:
        registry: All runs.
        claim: The right to this one.
        metrics: Where failures are counted.
        on_waiting: Called with 1 when a wait for a run below this one begins, with -1 at its end.
    """

    def __init__(
        self,
        registry: RunRegistry,
        claim: Claim,
        metrics: WorkerMetrics,
        on_waiting: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._registry = registry
        self._claim = claim
        self._user_id = claim.envelope.user_id
        self._metrics = metrics
        self._on_waiting = on_waiting

    async def look_no_later(self, at_ms: int) -> None:
        """See ``Errands``."""
        await until_redis_answers(
            lambda: self._registry.look_no_later(self._user_id, self._claim.run_id, at_ms),
            "deadline",
            self._metrics,
        )

    async def release(self) -> bool:
        """See ``Errands``."""
        return await until_redis_answers(
            lambda: self._registry.release(self._claim), "release", self._metrics
        )

    async def start_child(
        self, agent: str, content: str, metadata: Mapping[str, Any], message_id: str
    ) -> None:
        """See ``Errands``."""
        request = SubmitRequest(
            user_id=self._user_id,
            thread_id=self._claim.envelope.thread_id,
            agent=agent,
            content=content,
            message_id=message_id,
            metadata=metadata,
            # In its parent's lane it would wait for its parent's end.
            policy="parallel",
            parent=ParentAttempt(self._claim.run_id, self._claim.fence),
        )
        await until_redis_answers(lambda: self._registry.submit(request), "submit", self._metrics)

    async def read_child(self, run_id: str) -> RunDetail | None:
        """See ``Errands``."""
        return await until_redis_answers(
            lambda: self._registry.get(self._user_id, run_id), "child", self._metrics
        )

    async def stop_child(self, run_id: str, reason: str) -> None:
        """See ``Errands``."""
        try:
            await until_redis_answers(
                lambda: self._registry.cancel(self._user_id, run_id, by="system", reason=reason),
                "cancel",
                self._metrics,
            )
        except RequestRefused as refused:
            if refused.code not in ("run_ended", "unknown_run"):
                _log.warning("child_not_stopped", run_id=run_id, reason=str(refused))

    def wait_begins(self) -> None:
        """See ``Errands``."""
        self._on_waiting(1)

    def wait_ends(self) -> None:
        """See ``Errands``."""
        self._on_waiting(-1)
