"""Readiness that is measured: green only while probes come back through Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from relay.probe import Probe

PROBE_INTERVAL_S = 1.0
SLACK_S = 1.0
"""An event loop that cannot run a probe for this long beyond its time is itself unwell."""

REVOCATIONS_AGE_S = 4.0
"""A gateway that has not heard of revocations for so long would take tokens that are worthless."""


@dataclass(frozen=True, slots=True)
class Check:
    """One named condition.

    Attributes:
        is_required: Whether clients must be sent elsewhere while it is not met. What is the same on
            every gateway is not: taking all of them away would end what still works.
    """

    name: str
    is_ok: bool
    detail: str
    is_required: bool = True


class Health:
    """Probes Redis all the time, so that being asked costs nothing and cannot mislead.

    Args:
        probe: The round trip.
        is_subscribed: Whether the pub/sub connection is up.
        agents_error: Gives why the list of agents cannot be read, or None.
        revocations_age_s: Gives how long ago revocations were last read.
        interval_s: Time between probes.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        is_subscribed: Callable[[], bool],
        agents_error: Callable[[], str | None],
        revocations_age_s: Callable[[], float],
        interval_s: float = PROBE_INTERVAL_S,
    ) -> None:
        self._probe = probe
        self._is_subscribed = is_subscribed
        self._agents_error = agents_error
        self._revocations_age_s = revocations_age_s
        self._interval_s = interval_s
        self._succeeded_s: float | None = None
        self.is_draining = False

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.probe_once()
            await asyncio.sleep(self._interval_s)

    async def probe_once(self) -> bool:
        """Make one probe and remember how it went."""
        is_back = await self._probe.check()
        if is_back:
            self._succeeded_s = time.monotonic()
        return is_back

    @property
    def probe_age_s(self) -> float:
        """Time since a probe came back; infinite before the first one."""
        if self._succeeded_s is None:
            return float("inf")
        return time.monotonic() - self._succeeded_s

    @property
    def is_ready(self) -> bool:
        """Whether clients should be sent here."""
        return all(check.is_ok for check in self.checks() if check.is_required)

    def checks(self) -> list[Check]:
        """Give all conditions and what is known about each."""
        return [
            self._check_probe(),
            self._check_subscription(),
            self._check_revocations(),
            self._check_drain(),
            self._check_agents(),
        ]

    def _check_probe(self) -> Check:
        error = self._probe.last_error
        oldest_s = self._interval_s + self._probe.deadline_s + SLACK_S
        if error is None and self.probe_age_s > oldest_s:
            error = f"no probe came back for {self.probe_age_s:.1f} s"
        if error is not None:
            return Check("redis_round_trip", False, error)
        return Check(
            "redis_round_trip",
            True,
            f"a probe came back in {self._probe.last_round_trip_ms or 0:.1f} ms",
        )

    def _check_subscription(self) -> Check:
        if self._is_subscribed():
            return Check("subscription", True, "the pub/sub connection is up")
        return Check("subscription", False, "the pub/sub connection is down; reconnecting")

    def _check_revocations(self) -> Check:
        age_s = self._revocations_age_s()
        if age_s > REVOCATIONS_AGE_S:
            return Check("revocations", False, f"revoked tokens were not read for {age_s:.1f} s")
        return Check("revocations", True, "revoked tokens are known")

    def _check_drain(self) -> Check:
        if self.is_draining:
            return Check("drain", False, "this gateway is handing its connections over")
        return Check("drain", True, "not draining")

    def _check_agents(self) -> Check:
        error = self._agents_error()
        if error is None:
            return Check("agents", True, "the list of agents can be read", is_required=False)
        return Check(
            "agents",
            False,
            f"the list of agents cannot be read, so no run can be submitted: {error}",
            is_required=False,
        )
