"""A deploy: gateways are replaced one by one under load, and nobody loses anything."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gateway.drain import BATCH_INTERVAL_MS, CLOSES_PER_S
from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.conftest import Report
from tests.faults.load import keep_publishing
from tests.faults.scene import under_load
from tests.faults.sizes import sized
from tests.support.fleet import Fleet, percentile

GATEWAYS = 3
BATCH = CLOSES_PER_S * BATCH_INTERVAL_MS // 1_000
RATE_WINDOW_S = 0.1


@dataclass(frozen=True)
class Size:
    clients: int
    published_per_s: float
    settle_s: float
    p99_limit_ms: float


@sized(
    small=Size(clients=60, published_per_s=60, settle_s=0.5, p99_limit_ms=5_000),
    full=Size(clients=500, published_per_s=500, settle_s=5, p99_limit_ms=1_000),
)
async def test_a_rolling_restart_loses_nothing_and_spreads_its_clients(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with under_load(tmp_path, server.url, gateways=GATEWAYS) as (stack, load, fleet):
        for number in range(size.clients):
            fleet.add(f"user-{number // 2}")
        await fleet.connect()
        runs = [await load.open(f"user-{number}") for number in range(size.clients // 2)]
        is_over = asyncio.Event()
        publishing = asyncio.create_task(
            keep_publishing(runs, size.published_per_s, is_over.is_set)
        )
        drains = []
        try:
            for gateway in stack.gateways:
                await asyncio.sleep(size.settle_s)
                drained = [one for one in fleet.clients if one.is_connected]
                node = await _node_of(gateway.url, fleet)
                drained = [one for one in drained if one.nodes[-1] == node]
                before = {one.name: len(one.nodes) for one in drained}
                began_s = time.monotonic()
                assert await gateway.terminate() == 0
                for client in drained:
                    await client.until(
                        lambda one, n=before[client.name]: one.is_connected and len(one.nodes) > n
                    )
                closed = [
                    at_s - began_s
                    for one in drained
                    for at_s, _ in one.closed_at_s
                    if at_s >= began_s
                ]
                received = Counter(one.nodes[before[one.name]] for one in drained)
                assert node not in received
                drains.append((len(drained), sorted(closed), received))
                await stack.restart(gateway)
        finally:
            is_over.set()
        await publishing
        await load.complete_all()
        await arrive(load.runs, fleet.clients)
        verify(load.runs, fleet.clients)
        for count, closed, received in drains:
            assert len(closed) == count, "closed more than once"
            _assert_rate(closed)
            share = count / (GATEWAYS - 1)
            assert max(received.values()) <= 1.2 * share + 3 * math.sqrt(share), received
        durations = [outage.duration_ms for outage in fleet.outages()]
        report(
            clients=size.clients,
            drained=[count for count, _, _ in drains],
            spread=[sorted(received.values()) for _, _, received in drains],
            closes_took_ms=[round((closed[-1] - closed[0]) * 1_000) for _, closed, _ in drains],
            live_p50_ms=percentile(durations, 0.5),
            live_p99_ms=percentile(durations, 0.99),
        )
        assert percentile(durations, 0.99) < size.p99_limit_ms
        stack.assert_no_defects()


async def _node_of(url: str, fleet: Fleet) -> str:
    """Ask a gateway for its name, as a new client learns it."""
    visitor = fleet.add("visitor", urls=[url])
    await visitor.start()
    node = visitor.nodes[-1]
    await visitor.leave()
    fleet.clients.remove(visitor)
    return node


def _assert_rate(closed_s: list[float]) -> None:
    """Closes come in batches; in no window may there be more than the rate allows."""
    # Two batches more than the window holds: it can begin just before one, and what was on its
    # way when the machine was busy arrives together.
    allowed = RATE_WINDOW_S * CLOSES_PER_S + 2 * BATCH
    for first in closed_s:
        within = sum(first <= at_s < first + RATE_WINDOW_S for at_s in closed_s)
        assert within <= allowed, (within, allowed)
