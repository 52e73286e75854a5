"""A worker process that only publishes, through the relay's own publisher, and says what it cost.

    python -m benchmarks.publishing REDIS_URL MODE ARGUMENTS...

It prints one JSON line when it is ready, waits for a line on stdin, and prints its figures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import uvloop

from benchmarks.load import event_sizes, user_name
from relay.events import EventType
from relay.keys import Keys
from relay.publisher import Publisher
from relay.run_model import AgentInfo, Claim, SubmitRequest
from relay.run_stream import RunStream
from relay.runs import RunRegistry
from relay.scripts import RedisLink

AGENT = "bench"
EVENTS_PER_RUN = 200
DELTA = "seven c"
CLOCK_S = 0.005

_BARE_SCRIPT = """
local id = redis.call('XADD', KEYS[1], '*', 'e', ARGV[1])
redis.call('PUBLISH', KEYS[2], ARGV[1])
return id
"""


class Bench:
    """A publisher with runs to publish for."""

    def __init__(self, link: RedisLink, publisher: Publisher) -> None:
        self.link = link
        self.publisher = publisher
        self.keys = Keys()
        self.registry = RunRegistry(link, self.keys)

    async def claim(self, user: int, message_id: str = "m") -> Claim:
        name = user_name(user)
        request = SubmitRequest(name, "t", AGENT, "go", message_id)
        submitted = await self.registry.submit(request)
        claim = await self.registry.claim(name, submitted.run_id, "bench", 600_000)
        if not isinstance(claim, Claim):
            raise SystemExit(f"run of {name} not claimed: {claim.reason}")
        return claim

    async def open_runs(self, count: int) -> list[RunStream]:
        """Give runs of as many users that have started."""
        streams = []
        for user in range(count):
            stream = self.publisher.open(await self.claim(user))
            await stream.publish(EventType.AGENT_STARTED, {})
            streams.append(stream)
        await asyncio.gather(*(stream.flush() for stream in streams))
        return streams

    async def spent_in_redis(self) -> dict[str, float]:
        """Give what Redis has spent so far: its processor time, and that of script calls alone."""
        info: dict[str, Any] = await self.link.client.info("everything")
        scripts = info.get("cmdstat_evalsha", {"calls": 0, "usec": 0})
        user, system = "used_cpu_user", "used_cpu_sys"
        if f"{user}_main_thread" in info:
            user, system = f"{user}_main_thread", f"{system}_main_thread"
        return {
            "redis_us": (info[user] + info[system]) * 1e6,
            "script_us": scripts["usec"],
            "script_calls": scripts["calls"],
        }


Work = Callable[[], Awaitable[int]]


def answer(figures: dict[str, float]) -> None:
    print(json.dumps(figures), flush=True)


async def wait_for_go() -> None:
    await asyncio.to_thread(sys.stdin.readline)


async def measured(bench: Bench, work: Work) -> dict[str, float]:
    """Give what ``work`` cost; it returns how many events that were."""
    before = await bench.spent_in_redis()
    cpu_s, began_s = time.process_time(), time.perf_counter()
    events = await work()
    elapsed_s = time.perf_counter() - began_s
    cpu_s = time.process_time() - cpu_s
    after = await bench.spent_in_redis()
    return {
        "events": events,
        "elapsed_s": elapsed_s,
        "cpu_us": cpu_s * 1e6,
        **{name: after[name] - before[name] for name in before},
    }


def custom(value: str) -> dict[str, Any]:
    return {"name": "m", "value": value}


PLAIN = custom("x" * 29)


async def alone(bench: Bench, events: int) -> Work:
    """One event, its acknowledgement, the next."""
    streams = await bench.open_runs(-(-events // EVENTS_PER_RUN))

    async def work() -> int:
        for stream in streams:
            for _ in range(EVENTS_PER_RUN):
                await stream.publish(EventType.CUSTOM, PLAIN)
                await stream.flush()
        return len(streams) * EVENTS_PER_RUN

    return work


async def long_run(bench: Bench, events: int) -> Work:
    """The same on one active run that is longer than what a log keeps of ended ones."""
    [stream] = await bench.open_runs(1)
    for number in range(2_000):
        await stream.publish(EventType.CUSTOM, PLAIN)
        if number % 50 == 0:
            await stream.flush()
    await stream.flush()

    async def work() -> int:
        for _ in range(events):
            await stream.publish(EventType.CUSTOM, PLAIN)
            await stream.flush()
        return events

    return work


async def batches(bench: Bench, events: int, size: int = 10) -> Work:
    """Ten events in one go, their acknowledgement, the next ten."""
    streams = await bench.open_runs(-(-events // EVENTS_PER_RUN))

    async def work() -> int:
        for stream in streams:
            for _ in range(EVENTS_PER_RUN // size):
                for _ in range(size):
                    await stream.publish(EventType.CUSTOM, PLAIN)
                await stream.flush()
        return len(streams) * EVENTS_PER_RUN

    return work


async def side_by_side(bench: Bench, events: int, runs: int = 50) -> Work:
    """Fifty runs at once, each with one event on its way at a time."""
    streams = await bench.open_runs(runs)
    each = events // runs

    async def publish(stream: RunStream) -> None:
        for _ in range(each):
            await stream.publish(EventType.CUSTOM, PLAIN)
            await stream.flush()

    async def work() -> int:
        await asyncio.gather(*(publish(stream) for stream in streams))
        return each * runs

    return work


async def deltas(bench: Bench, events: int, runs: int = 200, rate: float = 100.0) -> Work:
    """Runs that stream text, each a hundred pieces a second; an event is a piece.

    One clock drives them all: a timer for each piece would cost more than the piece.
    """
    streams = await bench.open_runs(runs)

    async def work() -> int:
        began_s, sent = time.perf_counter(), 0
        while sent < events:
            due = int((time.perf_counter() - began_s) * rate * runs)
            for number in range(sent, min(due, events)):
                await streams[number % runs].delta(DELTA)
                sent += 1
            await asyncio.sleep(CLOCK_S)
        await asyncio.gather(*(stream.flush() for stream in streams))
        return events

    return work


async def bare(bench: Bench, events: int, pipelined: int = 1) -> Work:
    """A script with one XADD and one PUBLISH, called through redis-py."""
    client = bench.link.client
    payload = b"x" * event_sizes()[0]
    sha = await client.script_load(_BARE_SCRIPT)
    channel = bench.keys.user("bare")
    names = (channel.base + "bare", channel.live)

    async def work() -> int:
        for _ in range(events // pipelined):
            if pipelined == 1:
                await client.evalsha(sha, 2, *names, payload)
            else:
                pipeline = client.pipeline(transaction=False)
                for _ in range(pipelined):
                    pipeline.evalsha(sha, 2, *names, payload)
                await pipeline.execute()
        return events // pipelined * pipelined

    return work


async def whole_runs(bench: Bench, runs: int, concurrency: int) -> Work:
    """Submit, claim, five events, the end; an event is a run."""

    async def run(user: int) -> None:
        for number in range(runs // concurrency):
            stream = bench.publisher.open(await bench.claim(user, f"m{number}"))
            await stream.publish(EventType.AGENT_STARTED, {})
            await stream.publish(EventType.AGENT_THINKING, {"thought": "Looking"})
            call = {"tool_call_id": "c", "tool_name": "search"}
            await stream.publish(EventType.TOOL_EXECUTING, {**call, "parameters": {}})
            ended = {**call, "status": "ok", "result": 1, "duration_ms": 1}
            await stream.publish(EventType.TOOL_COMPLETED, ended)
            await stream.finish(EventType.AGENT_COMPLETED, {"result": "done", "duration_ms": 1})
            stream.close()

    async def work() -> int:
        await asyncio.gather(*(run(user) for user in range(concurrency)))
        return runs // concurrency * concurrency

    return work


async def paced(bench: Bench, users: int, rate: float, seconds: float) -> Work:
    """Each user's run publishes marked events at a rate; marks carry the time they were due."""
    streams = await bench.open_runs(users)
    each = int(rate * seconds)

    async def publish(user: int, stream: RunStream) -> None:
        due_ns = time.monotonic_ns() + int(user / users / rate * 1e9)
        for number in range(each):
            wait_s = (due_ns - time.monotonic_ns()) / 1e9
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            mark = f"bench:{user}:{number}:{due_ns};"
            await stream.publish(EventType.CUSTOM, custom(mark))
            due_ns += int(1e9 / rate)
        await stream.flush()

    async def work() -> int:
        await asyncio.gather(*(publish(*pair) for pair in enumerate(streams)))
        return each * users

    return work


async def _prepare(bench: Bench, mode: str, arguments: Sequence[str]) -> Work:
    match mode, arguments:
        case "paced", [users, rate, seconds]:
            return await paced(bench, int(users), float(rate), float(seconds))
        case "runs", [runs, concurrency]:
            return await whole_runs(bench, int(runs), int(concurrency))
        case "bare-pipelined", [events]:
            return await bare(bench, int(events), pipelined=50)
        case _, [events]:
            modes = {
                "alone": alone,
                "long-run": long_run,
                "batches": batches,
                "side-by-side": side_by_side,
                "deltas": deltas,
                "few-deltas": partial(deltas, runs=50),
                "bare": bare,
            }
            return await modes[mode](bench, int(events))
    raise SystemExit(f"publishing: unknown mode {mode} {' '.join(arguments)}")


async def _main(url: str, mode: str, arguments: Sequence[str]) -> None:
    link = RedisLink(url)
    keys = Keys()
    async with Publisher(link, keys) as publisher:
        bench = Bench(link, publisher)
        await bench.registry.register_agents([AgentInfo(AGENT)])
        work = await _prepare(bench, mode, arguments)
        answer({"ready": 1})
        await wait_for_go()
        answer(await measured(bench, work))
    await link.aclose()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], sys.argv[2], sys.argv[3:]))
