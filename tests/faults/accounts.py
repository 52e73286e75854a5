"""Comparing what clients received with what was published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from relay.testing import SequenceChecker
from tests.faults.load import LoadRun
from tests.support.fleet import FleetClient


def verify(runs: Sequence[LoadRun], clients: Iterable[FleetClient]) -> None:
    """Fail unless every client has every event of its user's runs, once, in order, and no other.

    Beyond what the checker demands, a client that was told to start over must have the runs that
    Redis still knows whole, from what followed the ``reset``.
    """
    for client in clients:
        # One each: a checker keeps what its clients saw, and some here saw megabytes.
        checker = SequenceChecker()
        own = [run for run in runs if run.user_id == client.user_id and not run.is_lost]
        for run in own:
            for kind, data in run.events:
                checker.published(run.user_id, run.run_id, kind, data)
            for text in run.texts:
                checker.streamed(run.user_id, run.run_id, text, run.attempt)
        checker.client(client.name, client.user_id, sees_all=_saw_the_beginning(client))
        for _, frame in client.frames:
            checker.received(client.name, client.user_id, frame)
        checker.verify()
        assert not client.holes, (client.name, client.holes)
        for run in own:
            assert client.lifecycle(run.run_id) == run.lifecycle, client.name
            texts = client.texts(run.run_id).pieces
            assert [texts[key] for key in texts if key[0] == run.attempt] == run.texts, client.name


def _saw_the_beginning(client: FleetClient) -> bool:
    established = next(
        frame for _, frame in client.frames if frame["type"] == "connection_established"
    )
    return bool(established["position"].endswith(":0"))


async def arrive(
    runs: Sequence[LoadRun], clients: Iterable[FleetClient], deadline_s: float = 30.0
) -> None:
    """Wait until every client has the end of each of its user's runs."""
    for client in clients:
        for run in runs:
            if run.user_id == client.user_id and not run.is_lost:
                await client.until(lambda one, run=run: one.has_ended(run.run_id), deadline_s)
