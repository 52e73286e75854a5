"""P5: a slow reader costs a node its outbox and nobody else anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from relay.scripts import LogLimits
from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.conftest import Report
from tests.faults.load import Load, LoadRun, keep_publishing
from tests.faults.sizes import one_size, sized
from tests.support.fleet import Fleet, percentile
from tests.support.proxy import TcpProxy
from tests.support.stack import Stack, rss_bytes

SLOW_BYTES_PER_S = 1_024
FAST_READERS = 10
DELTAS_PER_S = 200
GROWTH_LIMIT_BYTES = 2 * 1_048_576
CATCH_UP_LIMIT_S = 5.0
FAST_DELAY_LIMIT_MS = 250


@dataclass(frozen=True)
class Size:
    seconds: float
    lifecycle_every_s: float
    outbox_bytes: int
    padding: int


async def stream_for(run: LoadRun, size: Size) -> None:
    """Publish deltas at a steady rate with a lifecycle event now and then."""
    end_s = time.monotonic() + size.seconds
    thinking_s = time.monotonic() + size.lifecycle_every_s
    while time.monotonic() < end_s:
        due_s = min(end_s, thinking_s)
        await keep_publishing(
            [run],
            DELTAS_PER_S,
            lambda due_s=due_s: time.monotonic() >= due_s,
            lifecycle_share=0,
            padding=size.padding,
        )
        await run.think()
        thinking_s += size.lifecycle_every_s


@sized(
    small=Size(seconds=5, lifecycle_every_s=1, outbox_bytes=32_768, padding=400),
    full=Size(seconds=60, lifecycle_every_s=10, outbox_bytes=262_144, padding=0),
)
async def test_a_slow_reader_costs_little_and_disturbs_nobody(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    settings = {"OUTBOX_BYTES": size.outbox_bytes}
    async with (
        Stack(tmp_path, server.url, settings=settings) as stack,
        Load(server.url, stack.key_prefix) as load,
    ):
        gateway = await stack.start_gateway()
        with TcpProxy(gateway.port, bytes_per_s=SLOW_BYTES_PER_S) as modem:
            async with Fleet(stack.urls, stack.token) as fleet:
                fast = [fleet.add("alice", name=f"fast-{n}") for n in range(FAST_READERS)]
                await fleet.connect()
                # Once without the slow one: what the load itself makes the node grow by.
                before = await load.open("alice")
                await stream_for(before, size)
                await before.complete()
                await arrive(load.runs, fleet.clients)
                seen = [len(client.events) for client in fast]
                rss_before = rss_bytes(gateway)

                slow = fleet.add("alice", since="now", name="slow", urls=[modem.url])
                await slow.start()
                run = await load.open("alice")
                await stream_for(run, size)
                await run.settle()
                grown = rss_bytes(gateway) - rss_before
                is_behind = slow.texts(run.run_id).pieces != fast[0].texts(run.run_id).pieces
                assert is_behind, "the slow reader was not slow"
                modem.limit(None)
                await run.complete()
                caught_up_s = await slow.until(
                    lambda one: one.has_ended(run.run_id), CATCH_UP_LIMIT_S
                )
                await arrive(load.runs, fast)
                verify(load.runs, fast)
                verify([run], [slow])
                assert not fleet.outages()
                slow_frames = sum(slow.texts(run.run_id).frames.values())
                fast_frames = sum(fast[0].texts(run.run_id).frames.values())
                assert slow_frames < fast_frames / 2, "its text was not joined"
                delays = [
                    client.delay_s(index) * 1_000
                    for client, first in zip(fast, seen, strict=True)
                    for index in range(first, len(client.events))
                ]
                report(
                    grown_kib=grown // 1024,
                    caught_up_ms=caught_up_s * 1_000,
                    slow_text_frames=slow_frames,
                    fast_text_frames=fast_frames,
                    fast_p99_ms=percentile(delays, 0.99),
                )
                assert grown < GROWTH_LIMIT_BYTES
                assert percentile(delays, 0.99) < FAST_DELAY_LIMIT_MS


@one_size
async def test_a_reader_that_falls_below_the_floor_gets_a_reset(
    own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    settings = {"OUTBOX_BYTES": 16_384, "LOG_MAX_EVENTS": 50}
    limits = LogLimits(max_events=50)
    async with (
        Stack(tmp_path, server.url, settings=settings) as stack,
        Load(server.url, stack.key_prefix, limits=limits) as load,
    ):
        gateway = await stack.start_gateway()
        with TcpProxy(gateway.port, bytes_per_s=SLOW_BYTES_PER_S) as modem:
            async with Fleet(stack.urls, stack.token) as fleet:
                slow = fleet.add("alice", name="slow", urls=[modem.url])
                await fleet.connect()
                for _ in range(8):
                    run = await load.open("alice")
                    for _ in range(40):
                        await run.think(padding=1_000)
                    await run.complete()
                modem.limit(None)
                await slow.until(lambda one: one.has_ended(load.runs[-1].run_id))
                # One for each time that it fell below: it may again, before it is fast.
                assert {frame["reason"] for frame in slow.resets} == {"history_trimmed"}
                # What it has from then on is whole.
                last = load.runs[-1]
                assert slow.lifecycle(last.run_id) == last.lifecycle
                assert not slow.outages
