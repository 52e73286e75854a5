"""A result of 10 MiB: whole on every tab, in nobody's way."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio

from tests.conftest import OwnRedis
from tests.faults.accounts import arrive, verify
from tests.faults.bystander import bystander
from tests.faults.conftest import Report
from tests.faults.load import Load
from tests.faults.sizes import sized
from tests.support.fleet import EventStreamClient, Fleet, FleetClient, percentile
from tests.support.proxy import TcpProxy
from tests.support.stack import Stack

LATE_HEARTBEATS = 1.5
"""A heartbeat is on time if it comes within half an interval of when it is due."""

OMEM_LIMIT_BYTES = 1_048_576


@dataclass(frozen=True)
class Size:
    result_bytes: int
    slow_bytes_per_s: float
    heartbeat_ms: int
    others_limit_ms: float


@sized(
    small=Size(2 * 1_048_576, slow_bytes_per_s=524_288, heartbeat_ms=2_000, others_limit_ms=1_000),
    full=Size(10 * 1_048_576, slow_bytes_per_s=131_072, heartbeat_ms=5_000, others_limit_ms=50),
)
async def test_a_large_result_arrives_whole_and_delays_nobody(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with (
        Stack(tmp_path, server.url, settings={"HEARTBEAT_MS": size.heartbeat_ms}) as stack,
        Load(server.url, stack.key_prefix) as load,
        server.client() as redis_client,
    ):
        gateway = await stack.start_gateway()
        with TcpProxy(gateway.port, bytes_per_s=size.slow_bytes_per_s) as modem:
            async with Fleet(stack.urls, stack.token) as fleet:
                tab = fleet.add("alice", name="tab")
                slow = fleet.add("alice", name="slow", urls=[modem.url])
                stream = fleet.add("alice", name="stream", kind=EventStreamClient)
                await fleet.connect()
                run = await load.open("alice")
                result = _result(size.result_bytes)
                is_over = asyncio.Event()
                watching = asyncio.create_task(_largest_omem(redis_client, is_over))
                try:
                    # In a process of its own: this one is busy with ten megabytes, three times.
                    async with bystander(stack, gateway, tmp_path) as other:
                        await run.think()
                        began_s = time.monotonic()
                        await run.complete(result)
                        fast_s = await tab.until(lambda one: one.has_ended(run.run_id), 60.0)
                        stream_s = await stream.until(lambda one: one.has_ended(run.run_id), 60.0)
                        slow_s = await slow.until(lambda one: one.has_ended(run.run_id), 300.0)
                        ended_s = time.monotonic()
                finally:
                    is_over.set()
                omem = await watching
                await arrive(load.runs, fleet.clients)
                verify(load.runs, fleet.clients)
                for client in (tab, slow, stream):
                    assert client.events[-1]["data"]["result"] == result
                assert not fleet.outages()
                delays = other.delays_ms
                gaps = {
                    client.name: _longest_without_heartbeat(client, began_s, ended_s)
                    for client in fleet.clients
                }
                report(
                    mebibytes=size.result_bytes / 1_048_576,
                    fast_tab_ms=fast_s * 1_000,
                    event_stream_ms=(fast_s + stream_s) * 1_000,
                    slow_tab_s=fast_s + stream_s + slow_s,
                    others_p99_ms=percentile(delays, 0.99),
                    others_p999_ms=percentile(delays, 0.999),
                    others_max_ms=max(delays),
                    omem_max=omem,
                    heartbeat_ms=size.heartbeat_ms,
                    heartbeat_gap_s=max(gaps.values()),
                )
                late_s = LATE_HEARTBEATS * size.heartbeat_ms / 1_000
                assert max(gaps.values()) < late_s, gaps
                assert omem < OMEM_LIMIT_BYTES
                # Not the largest of thousands: that one shows what else the machine did.
                assert percentile(delays, 0.999) < size.others_limit_ms


def _result(size: int) -> str:
    """Give text with characters of one to four bytes, quotes and line ends."""
    chooser = random.Random(9)
    block = "".join(chooser.choices('abc "\\\n€äß😀\t', k=4_096))
    return (block * (size // len(block.encode()) + 1)).encode()[:size].decode(errors="ignore")


async def _largest_omem(client: redis.asyncio.Redis, is_over: asyncio.Event) -> int:
    """Give the largest output buffer of a subscriber while it lasts."""
    largest = 0
    while not is_over.is_set():
        for info in await client.client_list(_type="pubsub"):
            largest = max(largest, int(info["omem"]))
        await asyncio.sleep(0.005)
    return largest


def _longest_without_heartbeat(client: FleetClient, began_s: float, ended_s: float) -> float:
    beats = [at_s for at_s, frame in client.frames if frame["type"] == "heartbeat"]
    moments = [began_s, *(at_s for at_s in beats if began_s < at_s < ended_s), ended_s]
    return max(later - earlier for earlier, later in itertools.pairwise(moments))
