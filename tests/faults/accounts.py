"""Comparing what clients received with what was published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.faults.load import LoadRun
from tests.support.fleet import FleetClient


def verify(runs: Sequence[LoadRun], clients: Iterable[FleetClient]) -> None:
    """Fail unless every client has every event of its user's runs, once, in order, and no other.

    A client that was told to start over by a ``reset`` is held to what followed it.
    """
    for client in clients:
        offsets: list[int] = []
        for event in client.events:
            if event["type"] == "reset":
                offsets = []
                continue
            assert event["user_id"] == client.user_id
            assert not offsets or event["offset"] > offsets[-1], (client.name, offsets[-3:], event)
            offsets.append(event["offset"])
        assert not client.holes
        for run in runs:
            if run.user_id != client.user_id or run.is_lost:
                continue
            assert client.lifecycle(run.run_id) == run.lifecycle, client.name
            texts = client.texts(run.run_id).pieces
            assert [texts[key] for key in texts if key[0] == run.attempt] == run.texts


async def arrive(
    runs: Sequence[LoadRun], clients: Iterable[FleetClient], deadline_s: float = 30.0
) -> None:
    """Wait until every client has the end of each of its user's runs."""
    for client in clients:
        for run in runs:
            if run.user_id == client.user_id and not run.is_lost:
                await client.until(lambda one, run=run: one.has_ended(run.run_id), deadline_s)
