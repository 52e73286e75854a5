"""The load generator in Python, for machines without a C compiler.

The same files, commands and answers as ``native/load_client.c``, which has the documentation. It
costs several times as much for each event, so that it is more often what limits a measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgpack
import uvloop

from benchmarks.websocket import CLOSE, PING, PONG, client_frame, handshake, read_frames

QUIET_S = 5.0
CONNECT_LIMIT_S = 240.0
_MARK = re.compile(rb"bench:(\d+):(\d+):(\d+);")


@dataclass
class Tally:
    """What has arrived since the count began."""

    published: int = 0
    expected: int = 0
    received: int = 0
    missing: int = 0
    repeated: int = 0
    foreign: int = 0
    resets: int = 0
    closed: int = 0
    first_ns: int = field(default_factory=time.monotonic_ns)
    last_ns: int = 0
    samples_us: list[int] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One WebSocket connection."""

    def __init__(self, generator: Generator, user: int, request: bytes) -> None:
        self.user = user
        self.next = 0
        self._generator = generator
        self._request = request
        self._buffer = bytearray()
        self._state = "upgrading"
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._state == "upgrading":
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if head[9:12] != b"101":
                self._generator.fail(f"user {self.user}: refused: {head[:100]!r}")
                return
            self._buffer = rest
            self._state = "establishing"
            if not self._generator.wants_established:
                self._is_open()
        at_ns = time.monotonic_ns()
        for opcode, payload in read_frames(self._buffer):
            self._receive(opcode, payload, at_ns)
        self._generator.changed()

    def _is_open(self) -> None:
        self._state = "open"
        self._generator.opened += 1

    def _receive(self, opcode: int, payload: bytes, at_ns: int) -> None:
        assert self._transport is not None
        if opcode == PING:
            self._transport.write(client_frame(PONG, payload))
        elif opcode == PONG:
            self._generator.receive_pong(payload, at_ns)
        elif opcode == CLOSE:
            self._transport.close()
        elif mark := _MARK.search(payload):
            self._receive_event(int(mark[1]), int(mark[2]), int(mark[3]), at_ns)
        elif self._state == "establishing" and b"connection_established" in payload:
            self._is_open()
        elif b'"type":"reset"' in payload:
            self._generator.tally.resets += 1

    def _receive_event(self, user: int, number: int, sent_ns: int, at_ns: int) -> None:
        tally = self._generator.tally
        tally.received += 1
        tally.last_ns = at_ns
        if user != self.user:
            tally.foreign += 1
            return
        if number < self.next:
            tally.repeated += 1
        else:
            tally.missing += number - self.next
            self.next = number + 1
        tally.samples_us.append(max(0, at_ns - sent_ns) // 1000)

    def ping(self, due_ns: int) -> None:
        assert self._transport is not None
        self._transport.write(client_frame(PING, due_ns.to_bytes(8)))

    def connection_lost(self, _: Exception | None) -> None:
        if self._state == "open":
            self._generator.tally.closed += 1
        else:
            self._generator.fail(f"user {self.user}: closed during the handshake")


class RedisConnection(asyncio.Protocol):
    """Sends commands and looks at the answers for errors only."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if data[:1] == b"-" or b"\n-" in data:
            self._fail(f"Redis: {data[:200]!r}")

    def connection_lost(self, _: Exception | None) -> None:
        self._fail("Redis closed the connection")


@dataclass
class Feed:
    """One user's events."""

    user: int
    is_relay: bool
    live: bytes
    hash: bytes
    log: bytes
    epoch: bytes
    offset: int
    seq: int
    run: bytes
    prefix: bytes
    suffix: bytes
    number: int = 0
    connections: int = 0

    def commands(self, burst: int, is_batched: bool, at_ns: int) -> list[bytes]:
        entries = [self._next_entry(at_ns) for _ in range(burst)]
        written = [command(b"HINCRBY", self.hash, b"offset", b"%d" % burst)]
        for offset, seq, _, run, event in entries:
            place = (self.log, b"MAXLEN", b"~", b"256", b"%d-0" % offset)
            written.append(command(b"XADD", *place, b"e", event, b"s", b"%d" % seq, b"r", run))
        if not self.is_relay:
            messages = [event for *_, event in entries]
        elif is_batched:
            messages = [self._message(entries)]
        else:
            messages = [self._message([entry]) for entry in entries]
        return written + [command(b"PUBLISH", self.live, message) for message in messages]

    def _next_entry(self, at_ns: int) -> tuple[int, int, int, bytes, bytes]:
        mark = b"bench:%d:%d:%d;" % (self.user, self.number, at_ns)
        self.number += 1
        self.offset += 1
        self.seq += 1
        return self.offset, self.seq, 0, self.run, self.prefix + mark + self.suffix

    def _message(self, entries: list[tuple[int, int, int, bytes, bytes]]) -> bytes:
        packed: bytes = msgpack.packb([1, self.epoch, entries], use_bin_type=False)
        return packed


def command(*parts: bytes) -> bytes:
    bulks = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%b" % (len(parts), bulks)


class Generator:
    """Carries out the commands."""

    def __init__(self, path: str) -> None:
        self.wants_established = False
        self.opened = 0
        self.tally = Tally()
        self.clients: list[Client] = []
        self._targets: list[tuple[int, Client]] = []
        for line in Path(path).read_text().splitlines():
            user, port, target, offer = line.split("\t")
            request = handshake(int(port), target, None if offer == "-" else offer)
            self._targets.append((int(port), Client(self, int(user), request)))
        self.clients = [client for _, client in self._targets]
        self._feeds: list[Feed] = []
        self._next_feed = 0
        self._redis: RedisConnection | None = None
        self._changed = asyncio.Event()
        self._failure: str | None = None

    def fail(self, text: str) -> None:
        self._failure = self._failure or text
        self._changed.set()

    def changed(self) -> None:
        self._changed.set()

    def receive_pong(self, payload: bytes, at_ns: int) -> None:
        tally = self.tally
        tally.received += 1
        tally.last_ns = at_ns
        tally.samples_us.append(max(0, at_ns - int.from_bytes(payload)) // 1000)

    async def _turn(self, timeout_s: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        if self._failure is not None:
            raise SystemExit(f"load_client: {self._failure}")

    async def connect(self, concurrency: int, until_established: int) -> dict[str, float]:
        self.wants_established = bool(until_established)
        loop = asyncio.get_running_loop()
        since_s = time.monotonic()
        begun = 0
        while self.opened < len(self._targets):
            while begun < len(self._targets) and begun - self.opened < concurrency:
                port, client = self._targets[begun]
                begun += 1
                await loop.create_connection(lambda made=client: made, "127.0.0.1", port)  # type: ignore[misc]
            if self.opened < len(self._targets):
                await self._turn(1.0)
            if time.monotonic() - since_s > CONNECT_LIMIT_S:
                raise SystemExit(f"load_client: connected only {self.opened}")
        return {"connected": self.opened, "elapsed_s": time.monotonic() - since_s}

    async def redis(self, port: int, path: str) -> dict[str, float]:
        lines = await asyncio.to_thread(Path(path).read_text)
        for user, line in enumerate(lines.splitlines()):
            parts = [part.encode() for part in line.split("\t")]
            kind, live, hash_key, log, epoch, offset, seq, run, prefix, suffix = parts
            feed = Feed(
                user=user,
                is_relay=kind == b"relay",
                live=live,
                hash=hash_key,
                log=log,
                epoch=epoch,
                offset=int(offset),
                seq=int(seq),
                run=run,
                prefix=prefix,
                suffix=suffix,
            )
            feed.connections = sum(client.user == user for client in self.clients)
            self._feeds.append(feed)
        loop = asyncio.get_running_loop()
        _, self._redis = await loop.create_connection(
            lambda: RedisConnection(self.fail), "127.0.0.1", port
        )
        return {"feeds": len(self._feeds)}

    def reset(self) -> None:
        self.tally = Tally()
        for client in self.clients:
            client.next = 0
        for feed in self._feeds:
            feed.number = 0

    def _publish(self, burst: int, is_batched: bool, at_ns: int) -> bytes:
        feed = self._feeds[self._next_feed]
        self._next_feed = (self._next_feed + 1) % len(self._feeds)
        self.tally.published += burst
        self.tally.expected += burst * feed.connections
        return b"".join(feed.commands(burst, is_batched, at_ns))

    def _send(self, commands: list[bytes]) -> None:
        assert self._redis is not None
        assert self._redis.transport is not None
        if commands:
            self._redis.transport.write(b"".join(commands))

    async def flow(
        self, duration_ms: int, window: int, burst: int, is_batched: int
    ) -> dict[str, float]:
        self.reset()
        tally = self.tally
        end_ns = tally.first_ns + duration_ms * 1_000_000
        while (at_ns := time.monotonic_ns()) < end_ns:
            commands = []
            while tally.expected - tally.received < window * burst:
                commands.append(self._publish(burst, bool(is_batched), at_ns))
            self._send(commands)
            await self._turn(0.05)
        return await self._finish()

    async def pace(
        self, duration_ms: int, rate: float, burst: int, is_batched: int
    ) -> dict[str, float]:
        self.reset()
        await self._pace(duration_ms * 1e6, rate, burst, bool(is_batched))
        return await self._finish()

    async def _pace(self, duration_ns: float, rate: float, burst: int, is_batched: bool) -> None:
        end_ns = self.tally.first_ns + duration_ns
        due_ns, interval_ns = float(self.tally.first_ns), 1e9 * burst / rate
        while due_ns < end_ns:
            at_ns = time.monotonic_ns()
            commands = []
            while due_ns <= at_ns and due_ns < end_ns:
                commands.append(self._publish(burst, is_batched, int(due_ns)))
                due_ns += interval_ns
            self._send(commands)
            await asyncio.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))

    async def trickle(self, rate: float, told: Awaitable[object]) -> dict[str, float]:
        self.reset()
        await _until(told, self._pace(float("inf"), rate, 1, is_batched=False))
        return await self._finish()

    async def probe(self, interval_ms: float, told: Awaitable[object]) -> dict[str, float]:
        self.reset()
        await _until(told, self._ping_for_ever(interval_ms * 1e6))
        return await self._finish()

    async def _ping_for_ever(self, interval_ns: float) -> None:
        due_ns = float(self.tally.first_ns)
        while True:
            while due_ns <= time.monotonic_ns():
                self.clients[0].ping(int(due_ns))
                self.tally.published += 1
                self.tally.expected += 1
                due_ns += interval_ns
            await asyncio.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))

    async def write(self, count: int, burst: int) -> dict[str, float]:
        for _ in range(count // burst):
            at_ns = time.monotonic_ns()
            self._send([self._publish(burst, True, at_ns) for _ in self._feeds])
            await asyncio.sleep(0)
        return {"written": count * len(self._feeds)}

    async def collect(self, expected: int, timeout_ms: int) -> dict[str, float]:
        self.tally.expected = expected
        deadline_s = time.monotonic() + timeout_ms / 1000
        while self.tally.received < expected and time.monotonic() < deadline_s:
            await self._turn(0.05)
        return self._count()

    async def _finish(self) -> dict[str, float]:
        seen, quiet_since_s = self.tally.received, time.monotonic()
        while self.tally.received < self.tally.expected:
            if time.monotonic() - quiet_since_s > QUIET_S:
                break
            await self._turn(0.05)
            if self.tally.received != seen:
                seen, quiet_since_s = self.tally.received, time.monotonic()
        return self._count()

    def _count(self) -> dict[str, float]:
        tally = self.tally
        ordered = sorted(tally.samples_us) or [0]
        usage = resource.getrusage(resource.RUSAGE_SELF)

        def at(share: float) -> int:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return {
            "published": tally.published,
            "expected": tally.expected,
            "received": tally.received,
            "missing": tally.missing,
            "repeated": tally.repeated,
            "foreign": tally.foreign,
            "resets": tally.resets,
            "closed": tally.closed,
            "elapsed_s": max(0, tally.last_ns - tally.first_ns) / 1e9,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "samples": len(tally.samples_us),
            "p50_us": at(0.5),
            "p99_us": at(0.99),
            "p999_us": at(0.999),
            "max_us": at(1),
        }


async def _until(told: Awaitable[object], work: Coroutine[Any, Any, None]) -> None:
    """Work until the next line comes."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)  # What is due at once is done, also where the line is here already.
    await told
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _main(path: str) -> None:
    generator = Generator(path)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode():
        match line.split():
            case ["connect", concurrency, established]:
                answer = await generator.connect(int(concurrency), int(established))
            case ["redis", port, feeds]:
                answer = await generator.redis(int(port), feeds)
            case ["flow", *arguments]:
                duration_ms, window, burst, batched = map(int, arguments)
                answer = await generator.flow(duration_ms, window, burst, batched)
            case ["pace", duration_ms, rate, burst, batched]:
                answer = await generator.pace(
                    int(duration_ms), float(rate), int(burst), int(batched)
                )
            case ["trickle", rate]:
                answer = await generator.trickle(float(rate), reader.readline())
            case ["probe", interval_ms]:
                answer = await generator.probe(float(interval_ms), reader.readline())
            case ["write", count, burst]:
                answer = await generator.write(int(count), int(burst))
            case ["collect", expected, timeout_ms]:
                answer = await generator.collect(int(expected), int(timeout_ms))
            case ["reset"]:
                generator.reset()
                answer = {"reset": True}
            case ["quit"]:
                return
            case _:
                raise SystemExit(f"load_client: unknown command: {line}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1]))
