"""The gateway's port against bytes that no client would send."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from pathlib import Path
from random import Random

import psutil
import pytest

from relay.config import Settings
from tests.fuzz.raw import Case, make_case
from tests.integration.gateway_support import Tab, Work, eventually, gateway_settings, raw_tab
from tests.support.stack import GatewayProcess, Stack

AT_ONCE = 40
PATIENCE_S = 0.05
MOST_GROWTH_BYTES = 64 * 1024 * 1024
SEED = 20261123


async def send(case: Case, port: int) -> None:
    """Play a case, read a little of what comes, and leave."""
    loop = asyncio.get_running_loop()
    with socket.socket() as line:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(line, ("127.0.0.1", port))
        # A gateway that has seen enough closes while we still send, or takes no more.
        with contextlib.suppress(ConnectionError, TimeoutError):
            for number, piece in enumerate(case.pieces):
                await _write(line, piece, is_slow=case.is_slow)
                patience_s = 2.0 if case.awaits_answer and number == 0 else PATIENCE_S
                await _read(line, patience_s, until=b"\r\n\r\n" if number == 0 else b"never")
        if case.is_reset:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _write(line: socket.socket, piece: bytes, *, is_slow: bool) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        if not is_slow:
            await loop.sock_sendall(line, piece)
            return
        for byte in piece:
            await loop.sock_sendall(line, bytes([byte]))
            await asyncio.sleep(0)


async def _read(line: socket.socket, patience_s: float, until: bytes) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while data := await loop.sock_recv(line, 65_536):
                if until in data:
                    return


async def fuzz(stack: Stack, gateway: GatewayProcess, cases: int, seed: int) -> None:
    """Send cases, some at once, from users of their own."""
    print(f"seed {seed}")
    random = Random(seed)
    made = [
        make_case(random, gateway.port, stack.token(f"fuzz-{index % 50}")) for index in range(cases)
    ]
    waiting = asyncio.Queue[Case]()
    for case in made:
        waiting.put_nowait(case)

    async def player() -> None:
        while not waiting.empty():
            await send(waiting.get_nowait(), gateway.port)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(player())


async def bystander_is_served(work: Work, opened: Tab) -> None:
    run_id = await work.run("bystander")
    await opened.until("agent_completed", run_id=run_id)


async def survive(stack: Stack, settings: Settings, rounds: int, cases: int, seed: int) -> None:
    gateway = await stack.start_gateway(MAX_CONNECTIONS_PER_USER=1_000)
    process = psutil.Process(gateway.pid)
    headers = {"Authorization": f"Bearer {stack.token('bystander')}"}
    async with Work(settings) as work, raw_tab(gateway.url, headers=headers) as opened:
        await opened.until("connection_established")
        # A first round fills the pools and caches that stay.
        await fuzz(stack, gateway, AT_ONCE * 2, seed)
        await eventually(lambda: only_the_bystander_is_left(gateway))
        descriptors, memory = process.num_fds(), process.memory_info().rss
        for number in range(rounds):
            playing = asyncio.create_task(fuzz(stack, gateway, cases, seed + number))
            while not playing.done():
                await bystander_is_served(work, opened)
            await playing
            assert gateway.is_running
        try:
            await eventually(lambda: only_the_bystander_is_left(gateway), 30)
            await eventually(lambda: descriptors_are_back(process, descriptors), 30)
        except AssertionError:
            print(await gateway.metrics(), process.net_connections())
            raise
        assert process.memory_info().rss - memory < MOST_GROWTH_BYTES
        await bystander_is_served(work, opened)
        assert await opened.is_alive()
    stack.assert_no_defects()


async def only_the_bystander_is_left(gateway: GatewayProcess) -> bool:
    figures = await gateway.metrics()
    return figures["relay_connections"] == 1


async def descriptors_are_back(process: psutil.Process, before: int) -> bool:
    # Redis' pool may have kept a connection or two that the load before had not needed.
    return process.num_fds() <= before + 4


async def test_gateway_survives_what_no_client_would_send(
    tmp_path: Path, redis_url: str, key_prefix: str
) -> None:
    async with Stack(tmp_path, redis_url, key_prefix=key_prefix) as stack:
        settings = gateway_settings(redis_url, key_prefix, jwt_secret=stack.secret)
        await survive(stack, settings, rounds=1, cases=1_000, seed=SEED)


@pytest.mark.faults_full
async def test_gateway_survives_ten_thousands_of_strange_connections(
    tmp_path: Path, redis_url: str, key_prefix: str
) -> None:
    async with Stack(tmp_path, redis_url, key_prefix=key_prefix) as stack:
        settings = gateway_settings(redis_url, key_prefix, jwt_secret=stack.secret)
        seed = secrets.randbits(32)
        await survive(stack, settings, rounds=10, cases=2_000, seed=seed)
