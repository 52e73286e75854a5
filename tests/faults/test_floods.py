"""Floods, from one user and from nobody in particular: bounded memory, and others are served.

The other user's delays are reported for each flood, and for none; the machine is the same for the
flood and for those who suffer it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from tests.conftest import OwnRedis
from tests.faults.bystander import bystander
from tests.faults.conftest import Report
from tests.faults.load import Load
from tests.faults.sizes import sized
from tests.support.fleet import percentile
from tests.support.stack import GatewayProcess, Stack, rss_bytes

MIB = 1_048_576
GROWTH_LIMIT_BYTES = 48 * MIB
"""For 500 waiting sockets and thousands of failures."""

FORGOTTEN_DEADLINE_S = 20.0


def opening(gateway: GatewayProcess, token: str, query: str = "") -> connect:
    return connect(
        f"{gateway.url.replace('http', 'ws', 1)}/v1/ws{query}",
        additional_headers={"Authorization": f"Bearer {token}"},
        proxy=None,
        compression=None,
        max_size=None,
    )


async def statistics(stack: Stack, gateway: GatewayProcess) -> dict[str, int]:
    token = stack.token("operator", scopes=["relay:admin"])
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(
            gateway.admin_url + "/v1/admin/stats", headers={"Authorization": f"Bearer {token}"}
        )
    return dict(answer.json())


async def nobody_left(stack: Stack, gateway: GatewayProcess) -> None:
    async with asyncio.timeout(FORGOTTEN_DEADLINE_S):
        while True:
            figures = await statistics(stack, gateway)
            if not (figures["connections"] or figures["opening"] or figures["places_owed"]):
                return
            await asyncio.sleep(0.05)


# --- Coming and going ---


@dataclass(frozen=True)
class Cycles:
    # The allocator's arenas have their size after some thousands.
    warm_up: int
    count: int
    at_once: int


@sized(small=Cycles(100, 200, 20), full=Cycles(4_000, 10_000, 50))
async def test_connections_that_come_and_go_leave_a_node_where_it_was(
    size: Cycles, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with Stack(tmp_path, server.url) as stack, server.client() as client:
        gateway = await stack.start_gateway()
        tokens = [stack.token(f"user-{number}") for number in range(100)]
        numbers = iter(range(size.warm_up + size.count))

        async def cycle(until: int) -> None:
            for number in numbers:
                async with opening(gateway, tokens[number % 100], f"?client_id=c{number}") as one:
                    assert json.loads(await one.recv())["type"] == "connection_established"
                if number >= until:
                    return

        async def keys() -> set[bytes]:
            # Whose turn it is to sweep is nobody's residue: it comes and goes.
            found = [key async for key in client.scan_iter("*") if not key.endswith(b":sweep")]
            return set(found)

        async def cycles(until: int) -> tuple[int, int, set[bytes]]:
            async with asyncio.TaskGroup() as group:
                for _ in range(size.at_once):
                    group.create_task(cycle(until))
            await nobody_left(stack, gateway)
            files = psutil.Process(gateway.pid).num_fds()
            return rss_bytes(gateway), files, await keys()

        rss_before, files_before, keys_before = await cycles(size.warm_up - size.at_once)
        began_s = time.monotonic()
        rss_after, files_after, keys_after = await cycles(size.warm_up + size.count)
        took_s = time.monotonic() - began_s
        figures = await statistics(stack, gateway)
        report(
            cycles=size.count,
            cycles_per_s=size.count / took_s,
            grown_kib=(rss_after - rss_before) // 1024,
            more_files=files_after - files_before,
            more_keys=len(keys_after - keys_before),
        )
        assert figures["opened"] == size.warm_up + size.count
        assert keys_after <= keys_before
        assert not [key for key in keys_after if key.endswith(b":connections")]
        # The sockets of requests to the internal listener, and those to Redis, come and go.
        assert files_after - files_before <= 10
        # 10,000 that left a hundred bytes each would be a megabyte.
        assert rss_after - rss_before < max(2 * MIB, size.count * 200)
        stack.assert_no_defects()


# --- Floods ---


@dataclass(frozen=True)
class Flood:
    seconds: float
    sockets: int
    guessers: int
    tabs: int
    rounds: tuple[tuple[str, ...], ...]


Attack = Callable[[Flood, Stack, GatewayProcess, Counter[str]], Awaitable[None]]


@contextlib.asynccontextmanager
async def repeated(work: Callable[[], Awaitable[None]], at_once: int) -> AsyncIterator[None]:
    """Do something over and over, so many at once, while the block runs."""

    async def again() -> None:
        while True:
            await work()

    tasks = [asyncio.create_task(again()) for _ in range(at_once)]
    try:
        yield
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def silent_sockets(
    size: Flood, _: Stack, gateway: GatewayProcess, seen: Counter[str]
) -> None:
    """Open sockets that never send a whole request, and open them again when they are closed."""

    async def hold() -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            seen["opened"] += 1
            try:
                writer.write(b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"x" * 4_000)
                await reader.read()
                seen["turned_away"] += 1
            finally:
                writer.close()
        except OSError:
            seen["failed"] += 1

    async with repeated(hold, size.sockets):
        await asyncio.sleep(size.seconds)


async def guesses(size: Flood, _: Stack, gateway: GatewayProcess, seen: Counter[str]) -> None:
    """Try tokens and tickets that are not valid."""

    async def guess() -> None:
        try:
            async with opening(gateway, "a.b.c"):
                seen["let_in"] += 1
        except InvalidStatus as error:
            seen[str(error.response.status_code)] += 1
        except (OSError, WebSocketException):
            seen["failed"] += 1

    async with repeated(guess, size.guessers):
        await asyncio.sleep(size.seconds)
    assert seen["let_in"] == 0
    assert seen["401"]


async def many_tabs(size: Flood, stack: Stack, gateway: GatewayProcess, seen: Counter[str]) -> None:
    """One user opens connections without end; those that get in stay."""
    token = stack.token("mallory")
    held: list[ClientConnection] = []

    async def come() -> None:
        try:
            held.append(await opening(gateway, token))
            seen["let_in"] += 1
        except InvalidStatus as error:
            seen[str(error.response.status_code)] += 1
        except (OSError, WebSocketException):
            seen["failed"] += 1

    try:
        async with repeated(come, size.tabs):
            await asyncio.sleep(size.seconds)
        assert seen["let_in"] == 20
        assert seen["429"]
    finally:
        for one in held:
            await one.close()


ATTACKS: dict[str, Attack] = {
    "silent_sockets": silent_sockets,
    "guesses": guesses,
    "many_tabs": many_tabs,
}


@sized(
    small=Flood(seconds=1.0, sockets=80, guessers=4, tabs=4, rounds=(tuple(ATTACKS),)),
    full=Flood(
        seconds=20.0,
        sockets=2_000,
        guessers=16,
        tabs=16,
        rounds=((), *((name,) for name in ATTACKS)),
    ),
)
async def test_floods_cost_bounded_memory_and_others_are_served(
    size: Flood, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    settings = {"MAX_WAITING_SOCKETS": max(16, size.sockets // 4)}
    async with Stack(tmp_path, server.url, settings=settings) as stack:
        gateway = await stack.start_gateway()
        for names in size.rounds:
            seen: Counter[str] = Counter()
            rss_before = rss_bytes(gateway)
            label = "_and_".join(names) or "nothing"
            # Its own process counts every event: one that is lost or late for ever fails there.
            async with bystander(stack, gateway, tmp_path, label) as watched:
                for name in names:
                    await ATTACKS[name](size, stack, gateway, seen)
                if not names:
                    await asyncio.sleep(size.seconds)
            grown = rss_bytes(gateway) - rss_before
            report(
                **{f"{label}_{key}": count for key, count in seen.items()},
                **{
                    f"{label}_p99_ms": percentile(watched.delays_ms, 0.99),
                    f"{label}_grown_kib": grown // 1024,
                },
            )
            assert grown < GROWTH_LIMIT_BYTES, label
        await nobody_left(stack, gateway)
        figures = await gateway.metrics()
        assert figures["relay_waiting_sockets"] <= settings["MAX_WAITING_SOCKETS"]
        assert figures["relay_sockets_turned_away_total"] > 0
        stack.assert_no_defects()


# --- Revocation ---


@dataclass(frozen=True)
class Revoked:
    clients: int
    history: int
    within_s: float


@sized(small=Revoked(12, 10, 10.0), full=Revoked(120, 100, 1.0))
async def test_revocation_ends_every_connection_also_in_the_middle_of_a_replay(
    size: Revoked, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    async with (
        Stack(tmp_path, server.url, settings={"MAX_CONNECTIONS_PER_USER": 200}) as stack,
        Load(server.url, stack.key_prefix) as load,
    ):
        gateways = await stack.start_gateways(3)
        run = await load.open("alice")
        for _ in range(size.history):
            await run.think(padding=30_000)
        await load.settle()
        token = stack.token("alice")
        read: list[int] = []
        over: list[tuple[float, int | None]] = []

        async def replay(number: int) -> None:
            gateway = gateways[number % 3]
            async with opening(gateway, token, "?since=0") as one:
                await one.recv()
                read.append(number)
                # Every other one reads a frame now and then: its replay has only begun.
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await one.recv()
                        if number % 2:
                            await asyncio.sleep(0.05)
                over.append((time.monotonic(), one.close_code))

        operator = stack.token("operator", scopes=["relay:admin"])
        async with asyncio.TaskGroup() as group:
            for number in range(size.clients):
                group.create_task(replay(number))
            while len(read) < size.clients:
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(trust_env=False) as client:
                answer = await client.post(
                    gateways[0].admin_url + "/v1/admin/users/alice/revoke",
                    headers={"Authorization": f"Bearer {operator}"},
                )
            revoked_s = time.monotonic()
            assert answer.status_code == 202
            gone_s: list[float] = []
            async with asyncio.timeout(size.within_s + 30):
                for gateway in gateways:
                    while (await gateway.metrics())["relay_connections"]:
                        await asyncio.sleep(0.01)
                    gone_s.append(time.monotonic() - revoked_s)
        report(
            clients=size.clients,
            nodes_ms=max(gone_s) * 1_000,
            readers_p99_ms=percentile([at_s - revoked_s for at_s, _ in over], 0.99) * 1_000,
        )
        assert Counter(code for _, code in over).keys() <= {4401, 1006, None}
        assert max(gone_s) < size.within_s
        stack.assert_no_defects()
