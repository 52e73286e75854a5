"""The delivery machine as a hypothesis state machine: the promises hold at every rest, too.

The world and its operations are those of ``delivery_model``, whose own search is faster and goes
further. Here hypothesis chooses what happens next, lets everything come to rest now and then in
the middle of a history, and shortens what fails.
"""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.relay import delivery_model as model
from tests.unit.relay.test_recovery_model import ABLATIONS

seeds = st.integers(0, 2**32 - 1)
traffic = st.sampled_from(sorted(model.BASE_WEIGHTS))
faults = st.sampled_from(sorted(model.FAULT_WEIGHTS))


class Delivery(RuleBasedStateMachine):
    """Redis, two gateways and clients, driven in any order; hypothesis owns the choice."""

    def __init__(self) -> None:
        super().__init__()
        self._small_parts = contextlib.ExitStack()
        self._small_parts.enter_context(model.small_parts())
        self.world = model.World()
        self.has_moved = False

    @rule(name=traffic, seed=seeds)
    def something_happens(self, name: str, seed: int) -> None:
        """Publish, deliver, read, write, connect, leave."""
        self.world.step(name, seed)
        self.has_moved = True

    @rule(name=faults, seed=seeds)
    def something_breaks(self, name: str, seed: int) -> None:
        """Lose a message, a connection, a key, a tail of history, a gateway."""
        self.world.step(name, seed)
        self.has_moved = True

    @rule(seed=seeds, count=st.integers(1, 6))
    def a_burst_is_published(self, seed: int, count: int) -> None:
        """Publish faster than anything is delivered."""
        rng = random.Random(seed)
        for _ in range(count):
            self.world.publish(rng)
        self.has_moved = True

    @precondition(lambda self: self.has_moved)
    @rule()
    def everything_comes_to_rest(self) -> None:
        """Stop all faults: each cursor is live at the stored offset, nobody lacks anything."""
        self.world.quiesce()
        self.has_moved = False

    def teardown(self) -> None:
        """Whatever happened: in the end all is well."""
        try:
            self.world.quiesce()
        finally:
            self._small_parts.close()


QUICK = settings(
    # The same histories each time: a test either holds or does not.
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    stateful_step_count=80,
    suppress_health_check=list(HealthCheck),
)


def test_whatever_happens_next_no_promise_is_broken() -> None:
    run_state_machine_as_test(Delivery, settings=QUICK)


@pytest.mark.parametrize(
    "taken_out", ["rule 8: a claim is a gap", "rule 13: audit", "a lost body is a reset"]
)
def test_a_rule_that_is_taken_out_is_missed(
    taken_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ABLATIONS[taken_out](monkeypatch)
    search_only = settings(QUICK, phases=[Phase.generate])
    with pytest.raises(model.Violation):
        run_state_machine_as_test(Delivery, settings=search_only)
