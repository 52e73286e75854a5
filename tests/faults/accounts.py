"""Comparing what clients received with what was published."""

from __future__ import annotations

from collections.abc import Iterable

from tests.faults.load import Load
from tests.support.fleet import Fleet, FleetClient


def verify(load: Load, clients: Iterable[FleetClient]) -> None:
    for client in clients:
        offsets = []
        for event in client.events:
            if event["type"] == "reset":
                offsets = []
                continue
            assert event["user_id"] == client.user_id
            assert not offsets or event["offset"] > offsets[-1], (client.name, offsets[-3:], event)
            offsets.append(event["offset"])
        assert not client.holes
        for run in load.runs:
            if run.user_id != client.user_id:
                continue
            if run.is_lost:
                continue
            assert client.lifecycle(run.run_id) == run.lifecycle, client.name
            texts = client.texts(run.run_id)
            assert sorted(texts.pieces.values()) == sorted(run.texts)


async def arrive(load: Load, fleet: Fleet, deadline_s: float = 30.0) -> None:
    """Wait until every client has the end of each of its runs."""
    for client in fleet.clients:
        for run in load.runs:
            if run.user_id == client.user_id and not run.is_lost:
                await client.until(lambda one, run=run: one.has_ended(run.run_id), deadline_s)
