"""``python -m benchmarks.soak``: an hour at half load. Does memory grow, is anything lost, does
latency drift?

Half of the rate that the gateway sustains at the start, or what keeps it busy for half of the time
where that is less, and beside it a worker whose runs begin and end all the time, through the whole
path.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.compiled import compiled_relay
from benchmarks.figures import DISTRIBUTION_COLUMNS, Distribution, Table, over_rounds
from benchmarks.load import (
    open_channels,
    relay_feeds,
    relay_target,
    token_for,
)
from benchmarks.processes import (
    ROOT,
    BenchmarkFailed,
    Gateway,
    Placement,
    Process,
    RedisProcess,
    raise_file_limit,
    stop_in_order_on_sigterm,
)
from benchmarks.stage import Plan, Stage
from benchmarks.trend import Trend, trend_of
from benchmarks.websocket import JsonSocket

USERS = 500
RUN_USER = USERS
STRETCH_S = 20.0
MOST_RATE = 25_000
"""A gateway is then busy for about half of its processor. At half of what it can be sent in one go,
50,000 on two processors, what is paced fills the other one with Redis and the load generator."""

JUDGED = ("gateway", "worker")
"""Redis is not: it keeps each run's state for a day, and its memory grows with their number."""

FLAT_KIB = 1_024.0
"""What memory may grow by in the second half, beyond noise, and still count as flat."""

SETTLING_SHARE = 10
"""One part in so many, at the start, is left out where latency is judged."""

STEADY_MS, STEADY_SHARE = 2.0, 0.25
"""What a percentile may grow by, beyond noise: milliseconds, or a share of the usual."""


@dataclass
class Diary:
    """What each stretch of the load was like."""

    at_s: list[float] = field(default_factory=list)
    latency: list[Distribution] = field(default_factory=list)
    memory_kib: dict[str, list[int]] = field(default_factory=dict)
    delivered: int = 0

    def note(self, at_s: float, processes: dict[str, Process]) -> None:
        self.at_s.append(at_s)
        for name, process in processes.items():
            self.memory_kib.setdefault(name, []).append(process.rss_kib())

    def memory_trend(self, name: str) -> Trend:
        """Give the trend over the second half; caches and logs fill in the first."""
        half = len(self.at_s) // 2
        return trend_of(self.at_s[half:], self.memory_kib[name][half:])


class Runs(threading.Thread):
    """One user who asks the worker again and again, and checks each run's sequence."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(name="runs")
        self.completed = 0
        self.failure: BaseException | None = None
        self._port = gateway.port
        self._is_over = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._ask())
        except BaseException as error:  # noqa: BLE001 -- told to the main thread by stop
            self.failure = error

    async def _ask(self) -> None:
        offer = f"relay.v1, bearer.{token_for(RUN_USER)}"
        socket = await JsonSocket.open(self._port, "/v1/ws?since=now", offer)
        await socket.receive_until("connection_established")
        while not self._is_over.is_set():
            await self._ask_once(socket)
            self.completed += 1
            await asyncio.sleep(0.1)
        await socket.close()

    async def _ask_once(self, socket: JsonSocket) -> None:
        socket.send(
            {
                "type": "user_message",
                "id": f"soak-{self.completed}",
                "thread_id": "soak",
                "agent": "words",
                "content": "as many words as it takes",
            }
        )
        seqs: list[int] = []
        async with asyncio.timeout(30):
            while True:
                frame = await socket.receive()
                if "seq" in frame:
                    seqs.append(frame["seq"])
                if frame["type"] in ("agent_error", "agent_cancelled", "error"):
                    raise BenchmarkFailed(f"a run failed: {frame}")
                if frame["type"] == "agent_completed":
                    break
        if seqs != list(range(1, len(seqs) + 1)):
            raise BenchmarkFailed(f"a run's sequence has a hole: {seqs}")

    def stop(self) -> None:
        """Let the current run end.

        Raises:
            BenchmarkFailed: A run was not right.
        """
        self._is_over.set()
        self.join(60)
        if self.failure is not None:
            raise BenchmarkFailed(f"runs beside the load: {self.failure!r}") from self.failure


def soak(plan: Plan, minutes: float) -> tuple[str, bool]:
    """Run it; give the report and whether all is well."""
    with Stage(plan) as stage:
        server = stage.redis()
        open_channels(server, USERS)
        gateway = stage.gateway(server)
        worker = stage.worker(server, "quickstart:worker", str(ROOT / "examples"))
        load = stage.load([relay_target(user, gateway.port) for user in range(USERS)])
        load.connect(is_relay=True)
        load.use_redis(server, relay_feeds(server, USERS))
        most = median(load.flow(1.0, window=USERS).rate for _ in range(3))
        rate = min(MOST_RATE, most / 2)
        plan.say(f"{rate:,.0f} events/s, half of {most:,.0f}, for {minutes:g} minutes")
        runs = Runs(gateway)
        runs.start()
        diary = Diary()
        processes = {"gateway": gateway.process, "worker": worker, "Redis": server.process}
        began_s = time.monotonic()
        stretch_s = min(STRETCH_S, minutes * 60 / 6)
        try:
            while time.monotonic() - began_s < minutes * 60:
                count = load.pace(stretch_s, rate=rate)
                diary.delivered += count.received
                diary.latency.append(count.latency)
                diary.note(time.monotonic() - began_s, processes)
                if runs.failure is not None:
                    break
        finally:
            runs.stop()
        return report(diary, runs.completed, rate, minutes, _history(server))


def _history(server: RedisProcess) -> str:
    return f"{server.client.dbsize():,} keys in Redis at the end"


def report(diary: Diary, runs: int, rate: float, minutes: float, history: str) -> tuple[str, bool]:
    """Give the report, and whether all is well: memory flat, and no drift in latency."""
    faults = [
        f"memory of the {name} grows"
        for name in JUDGED
        if name in diary.memory_kib and diary.memory_trend(name).sure_growth > FLAT_KIB
    ]
    percentiles = {
        "p50": [latency.p50_ms for latency in diary.latency],
        "p99": [latency.p99_ms for latency in diary.latency],
    }
    settled = len(diary.at_s) // SETTLING_SHARE
    trends = {
        name: trend_of(diary.at_s[settled:], times[settled:]) for name, times in percentiles.items()
    }
    for name, trend in trends.items():
        usual_ms = median(percentiles[name]) if percentiles[name] else 0.0
        if trend.sure_growth > max(STEADY_MS, STEADY_SHARE * usual_ms):
            faults.append(f"{name} latency drifts")
    verdict = f"NOT WELL: {', '.join(faults)}" if faults else "all is well"
    text = "\n\n".join(
        [
            f"Soak of {minutes:g} minutes at {rate:,.0f} events/s: {verdict}",
            (
                f"{diary.delivered:,} events delivered, each once and in order; {runs:,} whole "
                f"runs beside them; {history}."
            ),
            _memory_table(diary).markdown(),
            _latency_table(diary, trends).markdown(),
        ]
    )
    return text, not faults


def _memory_table(diary: Diary) -> Table:
    columns = ["resident memory", "first KiB", "middle KiB", "last KiB", "second half, KiB an hour"]
    table = Table(columns)
    for name, sizes in diary.memory_kib.items():
        cells = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        trend = diary.memory_trend(name).text()
        table.rows.append([name, *(f"{size:,}" for size in cells), trend])
    return table


def _latency_table(diary: Diary, trends: Mapping[str, Trend]) -> Table:
    table = Table(["publish to client", *DISTRIBUTION_COLUMNS])
    third = max(1, len(diary.latency) // 3)
    for name, parts in (
        ("first third", diary.latency[:third]),
        ("last third", diary.latency[-third:]),
    ):
        table.rows.append([name, *over_rounds(parts).cells()])
    slopes = [trends[name].text(2) for name in ("p50", "p99")]
    table.rows.append(["ms an hour", *slopes, "", "", ""])
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    raise_file_limit()
    stop_in_order_on_sigterm()

    def say(text: str) -> None:
        print(f"... {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="agent-relay-soak-") as folder:
        try:
            plan = Plan(False, Path(folder), Placement(), say, compiled=compiled_relay(say))
            text, is_well = soak(plan, options.minutes)
        except BenchmarkFailed as failure:
            print(f"Error: {failure}", file=sys.stderr)
            return 1
    print(text)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
