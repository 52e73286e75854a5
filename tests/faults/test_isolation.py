"""P1, the hard way: many users, all that can go wrong, and nobody sees an event of another user.

Clients here are plain sockets that keep nothing but what the wire gave them: the relay's own client
would hide a frame that should not have come. Every user's id is in all that is made for them, so a
frame that names another user is a breach, whatever kind of frame it is. They also try what only an
attacker would: another user's position, device, runs, and connections with no or bad tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidStatus,
    WebSocketException,
)
from websockets.typing import Subprotocol

from relay.tokens import mint_token
from tests.conftest import OwnRedis
from tests.faults.conftest import Report
from tests.faults.sizes import sized
from tests.support.stack import Stack

ROOT = Path(__file__).parents[2]
AGENTS = "tests.e2e.agents.marked_agents:worker"
SOMEBODY = re.compile(r"user-\d{3}")
AFTER_EXPIRY_S = 1.0
RESTART_DEADLINE_S = 120.0
EXPIRED_S = 60.0
"""So long ago that no difference of clocks excuses it."""


@dataclass(frozen=True)
class Size:
    users: int
    seconds: float
    kill_every_s: float
    act_every_s: float


@dataclass
class Sightings:
    """What all clients saw, counted; breaches are kept."""

    breaches: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    runs: dict[str, str] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    late: list[tuple[float, float, str]] = field(default_factory=list)
    delays: list[tuple[float, float]] = field(default_factory=list)
    own_delays: list[tuple[float, float]] = field(default_factory=list)

    async def watch_own_delays(self) -> None:
        """Note when this process was late: what it read late did not come late."""
        while True:
            began_s = time.time()
            await asyncio.sleep(0.05)
            self.own_delays.append((began_s + 0.05, time.time()))

    async def watch_delays_of(self, url: str) -> None:
        """Note how long a gateway takes for nothing: a busy machine keeps it from its clock."""
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=10) as client:
            while True:
                began_s = time.time()
                with contextlib.suppress(httpx.TransportError):
                    await client.get(f"{url}/healthz")
                    self.delays.append((began_s, time.time()))
                await asyncio.sleep(0.2)

    def judge_late_events(self) -> None:
        """Make breaches of the events after expiry that no delay of the machine explains."""
        for expired_s, came_s, what in self.late:
            # What came while this process was behind waits for as many turns of its loop as there
            # are steps from the socket to here; a gateway is late by one.
            own_s = sum(_within(self.own_delays, expired_s, came_s))
            excused_s = own_s + max(_within(self.delays, expired_s, came_s), default=0.0)
            late_s = came_s - expired_s
            self.counts["late events"] += 1
            if late_s > AFTER_EXPIRY_S + excused_s:
                self.breaches.append(
                    f"{late_s:.2f} s after expiry ({excused_s:.2f} s slow): {what}"
                )


def _within(delays: list[tuple[float, float]], start_s: float, end_s: float) -> list[float]:
    """Give the delays that lie at least partly in a time."""
    return [ended - began for began, ended in delays if began <= end_s and ended >= start_s]


class User:
    """One user with one device, who comes and goes."""

    def __init__(self, number: int, stack: Stack, seen: Sightings, act_every_s: float) -> None:
        self.id = f"user-{number:03d}"
        self._stack = stack
        self._seen = seen
        self._act_every_s = act_every_s
        self._random = random.Random(number)
        self._numbers = itertools.count()
        self._own_runs: list[str] = []
        self._trespasses: set[str] = set()

    async def live(self, end_s: float) -> None:
        """Come and go until the end; every visit is one connection."""
        await asyncio.sleep(self._random.random())
        while time.monotonic() < end_s:
            if self._random.random() < 0.1:
                await self._intrude()
            else:
                await self._visit(end_s)
            await asyncio.sleep(self._random.random() * 0.5)

    # --- Visits ---

    async def _visit(self, end_s: float) -> None:
        ttl_s = self._random.uniform(1.5, 4.0) if self._random.random() < 0.3 else 3_600.0
        expires_s = time.time() + ttl_s
        try:
            since = self._since()
            socket = await self._connect(self._stack.token(self.id, ttl_s), since)
        except InvalidStatus as error:
            self._seen.counts[f"answered {error.response.status_code}"] += 1
            return
        except (OSError, WebSocketException, TimeoutError):
            self._seen.counts["found a dead gateway"] += 1
            return
        self._seen.counts["connections"] += 1
        self._seen.counts["from a position"] += ":" in since or since == "0"
        # Longer than a short token lives: the gateway must end it.
        stay_s = ttl_s + 3.0 if ttl_s < 10 else self._random.uniform(0.2, 5.0)
        leave_s = min(time.monotonic() + stay_s, end_s)
        acting = asyncio.create_task(self._act(socket))
        try:
            async with asyncio.timeout_at(_loop_time(leave_s)):
                await self._read(socket, expires_s)
        except TimeoutError:
            if ttl_s < 10 and leave_s < end_s:
                self._seen.breaches.append(f"{self.id} outlived its token")
        except ConnectionClosed:
            code = socket.close_code
            self._seen.counts["ended by expiry" if code == 4401 else "lost"] += 1
        finally:
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
            if self._random.random() < 0.5:
                # As a tab that is killed, or a phone that goes under ground.
                socket.transport.abort()
            await socket.close()

    async def _connect(self, token: str, since: str) -> ClientConnection:
        # One of three gateways, which may be dead at the moment; another user's device at times.
        url = self._random.choice(self._stack.urls).replace("http", "ws", 1)
        device = self.id if self._random.random() < 0.8 else self._other()
        return await connect(
            f"{url}/v1/ws?since={since}&client_id=device-of-{device.replace('user-', '')}",
            additional_headers={"Authorization": f"Bearer {token}"},
            subprotocols=[Subprotocol("relay.v1")],
            open_timeout=10,
            ping_interval=None,
            close_timeout=1,
            max_queue=None,
            proxy=None,
        )

    def _since(self) -> str:
        positions = self._seen.positions
        own, others = positions.get(self.id, "0"), positions.get(self._other(), "0")
        return self._random.choice(["active", "0", "now", own, own, others])

    async def _read(self, socket: ClientConnection, expires_s: float) -> None:
        is_established, is_bounded = False, False
        async for text in socket:
            now_s = time.time()
            assert isinstance(text, str)
            frame: dict[str, Any] = json.loads(text)
            self._seen.counts["frames"] += 1
            strangers = set(SOMEBODY.findall(text)) - {self.id}
            if strangers:
                self._seen.breaches.append(f"{self.id} saw {strangers}: {text[:300]}")
            if frame["type"] == "connection_established":
                is_established = True
                # One that came just after its expiry is judged by the leeway for clocks.
                is_bounded = now_s < expires_s
                self._seen.positions[self.id] = frame["position"]
            if "offset" in frame or frame["type"] == "event_part":
                self._seen.counts["events"] += 1
                if not is_established:
                    self._seen.breaches.append(f"{self.id} got an event first: {text[:300]}")
                if is_bounded and now_s > expires_s + AFTER_EXPIRY_S:
                    self._seen.late.append((expires_s, now_s, f"{self.id}: {text[:200]}"))
                owner = self._seen.runs.setdefault(frame.get("run_id", ""), self.id)
                if frame.get("run_id") and owner != self.id:
                    self._seen.breaches.append(f"{self.id} saw a run of {owner}: {text[:300]}")
                epoch = self._seen.positions[self.id].partition(":")[0]
                self._seen.positions[self.id] = f"{epoch}:{frame['offset']}"
            elif frame["type"] == "ack" and frame["id"] in self._trespasses:
                self._seen.breaches.append(f"{self.id} stopped a run of another: {text[:300]}")
            elif frame["type"] == "ack" and frame.get("run_id"):
                self._own_runs.append(frame["run_id"])
            elif frame["type"] == "error":
                self._seen.counts[f"refused: {frame['code']}"] += 1

    async def _act(self, socket: ClientConnection) -> None:
        """Ask, stop own runs, and try to stop and to answer those of others."""
        while True:
            chance = self._random.random()
            if chance < 0.6:
                agent = "steady" if chance < 0.2 else "quick"
                message: dict[str, Any] = {
                    "type": "user_message",
                    "thread_id": self._random.choice(["t1", "t2"]),
                    "agent": agent,
                    "content": f"{self.id} asks {next(self._numbers)}",
                }
            elif chance < 0.8 and self._own_runs:
                message = {"type": "cancel", "run_id": self._random.choice(self._own_runs[-3:])}
            elif runs := [run for run, owner in self._seen.runs.items() if owner != self.id]:
                message = {"type": "cancel", "run_id": self._random.choice(runs)}
                self._seen.counts["foreign runs tried"] += 1
            else:
                message = {"type": "ping"}
            message["id"] = f"m{next(self._numbers)}"
            if message["type"] == "cancel" and message["run_id"] not in self._own_runs:
                self._trespasses.add(message["id"])
            await socket.send(json.dumps(message))
            await asyncio.sleep(self._random.uniform(0.3, 1.7) * self._act_every_s)

    # --- Intrusions ---

    async def _intrude(self) -> None:
        """Try to connect without a right to; whatever comes over such a connection is a breach."""
        other = self._other()
        valid = self._stack.token(other)
        token = self._random.choice(
            [
                "",
                self._stack.token(other, -EXPIRED_S),
                mint_token("somebody else's secret, long enough", other, 60),
                valid[:-4] + ("aaaa" if not valid.endswith("aaaa") else "bbbb"),
            ]
        )
        try:
            socket = await self._connect(token, self._since())
        except InvalidStatus as error:
            # 429 is for an address that has tried too often.
            is_told = error.response.status_code in (401, 429)
            self._seen.counts["intruders refused" if is_told else "intruders turned away"] += 1
            return
        except (OSError, WebSocketException, TimeoutError):
            self._seen.counts["intruders found a dead gateway"] += 1
            return
        self._seen.breaches.append(f"{self.id} got in without a token of {other}")
        await socket.close()

    def _other(self) -> str:
        while (other := f"user-{self._random.randrange(1_000):03d}") == self.id:
            pass
        return self._random.choice([*self._seen.positions, other])


def _loop_time(monotonic_s: float) -> float:
    return asyncio.get_running_loop().time() + monotonic_s - time.monotonic()


@sized(
    small=Size(users=30, seconds=8, kill_every_s=3, act_every_s=1),
    full=Size(users=300, seconds=180, kill_every_s=5, act_every_s=3),
)
async def test_nobody_ever_sees_an_event_of_another(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    settings = {"MAX_QUEUED_RUNS_PER_USER": 1_000, "FRAMES_PER_SECOND": 100}
    async with Stack(tmp_path, server.url, settings=settings) as stack:
        await asyncio.gather(
            stack.start_gateways(3),
            stack.start_worker(AGENTS, ROOT),
            stack.start_worker(AGENTS, ROOT),
        )
        seen = Sightings()
        users = [User(number, stack, seen, size.act_every_s) for number in range(size.users)]
        end_s = time.monotonic() + size.seconds
        watching = [asyncio.create_task(seen.watch_own_delays())]
        watching += [asyncio.create_task(seen.watch_delays_of(url)) for url in stack.urls]
        kills = asyncio.create_task(keep_killing(stack, size.kill_every_s, end_s))
        try:
            async with asyncio.TaskGroup() as group:
                for user in users:
                    group.create_task(user.live(end_s))
            killed = await kills
        finally:
            for task in (*watching, kills):
                task.cancel()
            await asyncio.gather(*watching, kills, return_exceptions=True)
        seen.judge_late_events()
        report(
            users=size.users,
            seconds=size.seconds,
            gateways_killed=killed,
            runs=len(seen.runs),
            breaches=len(seen.breaches),
            slowest_ms=max(end_s - begin_s for begin_s, end_s in (*seen.delays, *seen.own_delays))
            * 1_000,
            **{name.replace(" ", "_"): count for name, count in sorted(seen.counts.items())},
        )
        print("\n".join(seen.breaches))
        assert not seen.breaches, seen.breaches[:5]
        # There was something to see, and each of the things that could go wrong did.
        assert killed
        assert len(set(seen.runs.values())) == size.users
        for what in ("events", "from a position", "ended by expiry", "lost", "intruders refused"):
            assert seen.counts[what], what
        assert seen.counts["refused: unknown_run"]
        stack.assert_no_defects()


async def keep_killing(stack: Stack, every_s: float, end_s: float) -> int:
    """Kill the gateways in turn, each when the one before is back; give how many."""
    killed = 0
    while time.monotonic() + every_s < end_s:
        await asyncio.sleep(every_s)
        gateway = stack.gateways[killed % len(stack.gateways)]
        await gateway.kill()
        gateway.start()
        await gateway.wait_ready(RESTART_DEADLINE_S)
        killed += 1
    return killed
