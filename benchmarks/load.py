"""The load generator as the measurements see it: connections, events, counts.

The program itself is ``native/load_client.c``, or ``load_client.py`` without a compiler; both
take the same files and commands and must give equal counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Distribution
from benchmarks.native import compile_program
from benchmarks.processes import SECRET, BenchmarkFailed, Process, RedisProcess
from relay.codec import RunEnvelope
from relay.events import EventType
from relay.keys import Keys
from relay.tokens import mint_token

FIRST_OFFSET = 1_000_000
FIRST_SEQ = 100_000
"""So that offsets have the same number of digits through a whole benchmark."""

HANDSHAKES_AT_ONCE = 64
WRITE_TIMEOUT_S = 30.0

_MARK = "@"


@dataclass(frozen=True)
class Target:
    """One connection to make."""

    user: int
    port: int
    path: str
    offer: str = "-"

    def line(self) -> str:
        return f"{self.user}\t{self.port}\t{self.path}\t{self.offer}\n"


@dataclass(frozen=True)
class Count:
    """What the load generator counted in one phase. Latency is from publishing to the client."""

    published: int
    expected: int
    received: int
    elapsed_s: float
    cpu_s: float
    latency: Distribution

    @property
    def rate(self) -> float:
        """Deliveries in a second."""
        return self.received / self.elapsed_s if self.elapsed_s else 0.0


class LoadClient:
    """A running load generator.

    Args:
        folder: For its files.
        targets: The connections that it makes.
        kind: ``c``, ``python``, or None for C where there is a compiler.
    """

    def __init__(self, folder: Path, targets: Sequence[Target], kind: str | None = None) -> None:
        program = None if kind == "python" else compile_program("load_client")
        if program is None and kind == "c":
            raise BenchmarkFailed("there is no C compiler")
        self.kind = "python" if program is None else "c"
        self._folder = folder
        self._feeds = 0
        stamp = time.monotonic_ns()
        self._files = folder / f"load-{stamp}"
        connections = self._files.with_suffix(".connections")
        connections.write_text("".join(target.line() for target in targets))
        command = [sys.executable, "-m", "benchmarks.load_client"] if program is None else [program]
        self.process = Process("load generator", [*map(str, command), str(connections)], pipes=True)

    def connect(self, *, is_relay: bool, concurrency: int = HANDSHAKES_AT_ONCE) -> float:
        """Open all connections; give how long that took in seconds.

        A connection to the relay counts as open when it has its ``connection_established``.
        """
        return self.process.ask(f"connect {concurrency} {int(is_relay)}")["elapsed_s"]

    def use_redis(self, server: RedisProcess, feeds: Sequence[str]) -> None:
        """Give it Redis and the users' events to publish, one line a user."""
        path = self._files.with_suffix(".feeds")
        path.write_text("".join(feeds))
        self._feeds = len(feeds)
        self.process.ask(f"redis {server.port} {path}")

    def flow(
        self, duration_s: float, *, window: int, burst: int = 1, batched: bool = False
    ) -> Count:
        """Publish as fast as events arrive, with at most ``window`` bursts unanswered."""
        return self._count(f"flow {duration_s * 1000:.0f} {window} {burst} {int(batched)}")

    def pace(
        self, duration_s: float, *, rate: float, burst: int = 1, batched: bool = False
    ) -> Count:
        """Publish at a rate, whatever comes back; latency counts from when an event was due."""
        return self._count(f"pace {duration_s * 1000:.0f} {rate} {burst} {int(batched)}")

    def reset(self) -> None:
        """Begin a new count: marks start at 0 for each user."""
        self.process.ask("reset")

    def write(self, server: RedisProcess, count: int, burst: int = 10) -> None:
        """Write so many events for each user, which nobody is connected to receive."""
        self.process.ask(f"write {count} {burst}")
        keys = Keys()
        name = keys.user(user_name(self._feeds - 1)).channel
        deadline_s = time.monotonic() + WRITE_TIMEOUT_S
        while int(server.client.hget(name, "offset") or 0) < FIRST_OFFSET + count:
            if time.monotonic() > deadline_s:
                raise BenchmarkFailed("Redis did not take all events")
            time.sleep(0.005)

    def begin_trickle(self, rate: float) -> None:
        """Publish singly at a rate, until ``end``."""
        self.process.tell(f"trickle {rate}")

    def begin_probe(self, interval_ms: float) -> None:
        """Ping on the first connection, until ``end``; latency is that of the answers."""
        self.process.tell(f"probe {interval_ms}")

    def end(self) -> Count:
        """End what was begun; give what came of it."""
        self.process.tell("end")
        return self._counted("what was begun", self.process.answer())

    def collect(self, expected: int, timeout_s: float) -> Count:
        """Wait until so many events of another publisher have arrived since ``reset``."""
        return self._count(f"collect {expected} {timeout_s * 1000:.0f}")

    def _count(self, command: str) -> Count:
        return self._counted(command, self.process.ask(command))

    def _counted(self, command: str, answer: Mapping[str, float]) -> Count:
        faults = {
            name: answer[name]
            for name in ("missing", "repeated", "foreign", "resets", "closed")
            if answer[name]
        }
        if answer["received"] != answer["expected"]:
            faults["received"] = answer["received"]
            faults["expected"] = answer["expected"]
        if faults:
            raise BenchmarkFailed(f"{command}: delivery was not exact: {faults}")
        return Count(
            published=int(answer["published"]),
            expected=int(answer["expected"]),
            received=int(answer["received"]),
            elapsed_s=answer["elapsed_s"],
            cpu_s=answer["cpu_s"],
            latency=Distribution(
                samples=int(answer["samples"]),
                p50_ms=answer["p50_us"] / 1000,
                p99_ms=answer["p99_us"] / 1000,
                p999_ms=answer["p999_us"] / 1000,
                max_ms=answer["max_us"] / 1000,
            ),
        )

    def stop(self) -> None:
        self.process.stop()


def user_name(user: int) -> str:
    return f"u{user:05d}"


def token_for(user: int) -> str:
    """Mint a token that outlives the benchmark."""
    return mint_token(SECRET, user_name(user), 86_400, now_s=time.time())


def epoch_of(user: int) -> str:
    return f"{user:012x}"


def first_position(user: int) -> str:
    """Give the position of a client that has seen nothing of what the benchmark writes."""
    return f"{epoch_of(user)}:{FIRST_OFFSET}"


def relay_target(user: int, port: int, since: str = "now") -> Target:
    """Describe a connection of a user to a gateway, with a token as browsers send it.

    Args:
        user: Who connects.
        port: The gateway's.
        since: A position, or ``now``.
    """
    offer = f"relay.v1, bearer.{token_for(user)}"
    return Target(user, port, f"/v1/ws?since={since}", offer)


def plain_target(user: int, port: int, label: str) -> Target:
    """Describe a connection to a reference gateway; ``label`` keeps their channels apart."""
    return Target(user, port, f"/ws/{label}-{user_name(user)}")


def _event_parts(user: int, padding: int = 0) -> tuple[str, str, str]:
    """Give the run, and an event's bytes before and behind its mark."""
    run_id = f"run_{user:024d}"
    envelope = RunEnvelope(run_id, 1, "t", user_name(user), "a")
    event = envelope.encode(
        EventType.CUSTOM, 1_790_000_000_123, {"name": "m", "value": _MARK + "." * padding}
    ).decode()
    before, after = event.split(_MARK)
    return run_id, before, after


def open_channels(server: RedisProcess, users: int) -> None:
    """Make the users' channels, before anybody connects to them.

    They are as ``relay/lua/_channel.lua`` makes them, but begin at a round offset.
    """
    keys = Keys()
    instance = server.client.info("replication")["master_replid"]
    now_ms = str(time.time_ns() // 1_000_000)
    pipeline = server.client.pipeline(transaction=False)
    for user in range(users):
        pipeline.hset(
            keys.user(user_name(user)).channel,
            mapping={
                "epoch": epoch_of(user),
                "offset": str(FIRST_OFFSET),
                "floor": "0",
                "tail": "0",
                "bytes": "0",
                "instance": instance,
                "previous": "",
                "touched": now_ms,
            },
        )
    pipeline.execute()


def relay_feeds(server: RedisProcess, users: int, padding: int = 0) -> list[str]:
    """Give the lines with which the generator writes events as ``publish.lua`` does.

    It moves the channel's offset, appends to the log and publishes the live message; the run with
    its fence and the bounds of the log are left out, so that Redis is not what saturates. To a
    gateway there is no difference, also when it has to read what it has missed. ``padding`` makes
    each event longer by so many bytes.
    """
    keys = Keys()
    pipeline = server.client.pipeline(transaction=False)
    for user in range(users):
        pipeline.hmget(keys.user(user_name(user)).channel, ["epoch", "offset"])
    lines = []
    for user, (epoch, offset) in enumerate(pipeline.execute()):
        names = keys.user(user_name(user))
        run_id, before, after = _event_parts(user, padding)
        written = [names.channel, names.log, epoch.decode(), offset.decode(), str(FIRST_SEQ)]
        lines.append("\t".join(["relay", names.live, *written, run_id, before, after]) + "\n")
    return lines


def plain_feeds(users: int, label: str, padding: int = 0) -> list[str]:
    """Give the lines with which the generator publishes the same frames for a reference.

    It writes as much to Redis beside them, so that Redis takes the same time for each event.
    """
    lines = []
    for user in range(users):
        run_id, before, after = _event_parts(user, padding)
        frame = f'{{"offset":{FIRST_OFFSET},"seq":{FIRST_SEQ},{before[1:]}'
        name = f"{label}-{user_name(user)}"
        numbers = [epoch_of(user), str(FIRST_OFFSET), str(FIRST_SEQ)]
        written = [f"{name}:channel", f"{name}:log", *numbers, run_id]
        lines.append("\t".join(["plain", name, *written, frame, after]) + "\n")
    return lines


def event_sizes() -> tuple[int, int]:
    """Give the size of an event's stored bytes and of its frame, with a mark of usual length."""
    _, before, after = _event_parts(123)
    mark = "bench:123:1234:1234567890123;"
    stored = len(before) + len(mark) + len(after)
    return stored, stored + len(f'"offset":{FIRST_OFFSET},"seq":{FIRST_SEQ},')
