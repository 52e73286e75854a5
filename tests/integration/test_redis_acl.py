"""The rights in ``deploy/acl``: what each part needs, nothing of another's, a word if one misses.

That they are enough is shown by all other tests: gateways and workers run as these users in every
one of them (``tests/support/acl.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis.asyncio

from agent_worker import Run, Worker
from gateway.app import running_gateway
from relay.errors import RedisMisconfigured
from relay.keys import Keys
from relay.scripts import RedisLink, mapped_errors
from relay.testing.processes import ManagedProcess
from tests.conftest import OwnRedis
from tests.integration.gateway_support import eventually, gateway_settings, tab
from tests.support.acl import ACL_FILES, ROLES, as_user, settings_as
from tests.support.redis_server import find_redis_server, free_port
from tests.support.stack_process import run_relay

KEYS = Keys("relay")
ALICE = KEYS.user("alice")

NOBODY_MAY = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("RANDOMKEY",),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("EVAL", "return 1", "0"),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "LOAD", "x"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("CLIENT", "LIST"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "me", "on"),
    ("LATENCY", "RESET"),
    ("MONITOR",),
    ("SHUTDOWN",),
    ("REPLICAOF", "no", "one"),
    ("PSUBSCRIBE", "*"),
    ("GET", "somebody-elses:key"),
    ("SET", "relay", "x"),
    ("PUBLISH", "somebody-elses", "x"),
    ("SUBSCRIBE", "somebody-elses"),
]
ONLY_A_WORKER_MAY = [
    ("XREADGROUP", "GROUP", "workers", "thief", "STREAMS", KEYS.tasks("docs"), ">"),
    ("XGROUP", "CREATE", KEYS.tasks("docs"), "workers", "0", "MKSTREAM"),
    ("CLIENT", "UNBLOCK", "1"),
]
ONLY_A_GATEWAY_MAY = [
    ("GETDEL", KEYS.ticket("x")),
    ("GET", KEYS.ticket("x")),
    ("SET", KEYS.ticket("x"), "an identity"),
    ("PUBSUB", "CHANNELS", "*"),
    ("SUBSCRIBE", KEYS.node("gw-1")),
    ("XADD", KEYS.revocations, "*", "user", "alice"),
    ("XDEL", KEYS.revocations, "1-1"),
]
ONLY_AN_OPERATOR_MAY = [("CONFIG", "GET", "maxmemory-policy")]
REFUSED = [
    *((role, command) for role in ROLES for command in NOBODY_MAY),
    *((role, command) for role in ("gateway", "operator") for command in ONLY_A_WORKER_MAY),
    *(("worker", command) for command in ONLY_A_GATEWAY_MAY),
    *((role, command) for role in ("gateway", "worker") for command in ONLY_AN_OPERATOR_MAY),
]


@asynccontextmanager
async def session(url: str) -> AsyncIterator[redis.asyncio.client.Redis]:
    """Give a client with one connection, since some commands change what it may do."""
    async with redis.asyncio.Redis.from_url(url, single_connection_client=True) as client:
        yield client


async def test_rights_end_where_the_part_does(redis_url: str) -> None:
    for role in ROLES:
        async with session(as_user(redis_url, role)) as client:
            for _, command in [each for each in REFUSED if each[0] == role]:
                with pytest.raises(redis.exceptions.ResponseError) as caught:
                    await client.execute_command(*command)
                text = str(caught.value)
                # FUNCTION is unknown before Redis 7.
                assert "permission" in text or "unknown command" in text, (role, command, text)


async def test_a_script_gives_no_more_rights_than_its_caller_has(redis_url: str) -> None:
    async with session(as_user(redis_url, "worker")) as client:
        for source in (
            f"return redis.call('GETDEL', '{KEYS.ticket('x')}')",
            f"return redis.call('GET', '{KEYS.ticket('x')}')",
            "return redis.call('FLUSHALL')",
            "return redis.call('KEYS', '*')",
            "return redis.call('PUBLISH', 'relay:node:gw-1', 'revoke')",
        ):
            sha = await client.script_load(source)
            with pytest.raises(redis.exceptions.ResponseError):
                await client.evalsha(sha, 0)
        # What is left open, as docs/security.md says: its own rights, in scripts of its own making.
        sha = await client.script_load(f"return redis.call('EXISTS', '{ALICE.log}')")
        assert await client.evalsha(sha, 0) == 0


def test_nobody_can_log_in_by_the_files_alone() -> None:
    for role in ROLES:
        first, name, *rules = (ACL_FILES / f"{role}.acl").read_text().split()
        assert (first, name) == ("user", role)
        assert not [rule for rule in rules if rule == "nopass" or rule[0] in ">#"]
        assert {"on", "resetkeys", "resetchannels", "-@all"} <= set(rules)
        commands = [rule for rule in rules if rule.startswith("+")]
        assert commands == sorted(commands)
        assert not [rule for rule in commands if rule.startswith("+@")]
        assert rules.index("-@all") < rules.index(commands[0])


@pytest.mark.parametrize("role", ROLES)
def test_every_command_of_the_scripts_is_among_the_rights(role: str) -> None:
    # A script runs with its caller's rights, and most of them are called by every part.
    sources = (resources.files("relay") / "lua").iterdir()
    used = {
        f"+{command.lower()}"
        for source in sources
        for command in re.findall(r"call\('([A-Z]+)'", source.read_text())
    }
    assert len(used) > 20
    assert used <= set((ACL_FILES / f"{role}.acl").read_text().split())


@pytest.mark.parametrize(
    ("role", "taken", "words"),
    [
        ("gateway", "-publish", "may not run the command publish"),
        ("gateway", "-hkeys", "may not run the command"),
        ("worker", "-xgroup", "may not run the command xgroup"),
    ],
)
async def test_missing_right_is_named_with_the_file_that_gives_it(
    own_redis: OwnRedis, key_prefix: str, role: str, taken: str, words: str
) -> None:
    server = await own_redis()
    link = RedisLink(as_user(server.url, role))
    async with server.client() as owner:
        await owner.execute_command("ACL", "SETUSER", role, taken)  # type: ignore[no-untyped-call]
    command: tuple[Any, ...] = {
        "-publish": ("PUBLISH", KEYS.node("x"), "x"),
        "-hkeys": ("HKEYS", KEYS.agents),
        "-xgroup": ("XGROUP", "CREATE", KEYS.tasks("x"), "workers", "0", "MKSTREAM"),
    }[taken]
    try:
        with pytest.raises(RedisMisconfigured) as caught, mapped_errors(link.url):
            await link.client.execute_command(*command)  # type: ignore[no-untyped-call]
    finally:
        await link.aclose()
    assert f"the user '{role}' {words}" in str(caught.value)
    assert f"deploy/acl/{role}.acl" in str(caught.value)
    assert (ACL_FILES / f"{role}.acl").is_file()


async def test_right_that_is_missing_in_a_script_is_named_too(own_redis: OwnRedis) -> None:
    server = await own_redis()
    link = RedisLink(as_user(server.url, "gateway"))
    async with server.client() as owner:
        await owner.execute_command("ACL", "SETUSER", "gateway", "-hmget")  # type: ignore[no-untyped-call]
    try:
        with pytest.raises(RedisMisconfigured) as caught:
            await link.run([link.call("rotate", ALICE, None, "e")])
    finally:
        await link.aclose()
    assert "the user 'gateway' may not run the command hmget (in a script)" in str(caught.value)
    assert "deploy/acl/gateway.acl" in str(caught.value)


async def test_commands_of_operators_work_as_the_operator(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis(append_only=True)
    settings = gateway_settings(server.url, key_prefix)
    worker = Worker("research")

    @worker.agent("echo")
    async def echo(run: Run) -> str:
        return run.request.content

    environment = {
        "RELAY_REDIS_URL": as_user(server.url, "operator"),
        "RELAY_KEY_PREFIX": key_prefix,
        "RELAY_JWT_SECRET": "s" * 32,
    }
    async with (
        running_gateway(settings) as gateway,
        worker.running(settings_as(settings, "worker")),
        tab(gateway.url) as alice,
    ):
        await alice.send(type="user_message", id="m1", thread_id="t1", agent="echo", content="x")
        await alice.until("agent_completed")
        doctor, workers, letters = await asyncio.gather(
            *(
                asyncio.to_thread(run_relay, *words, **environment)
                for words in (("doctor",), ("workers",), ("dead-letters", "list"))
            )
        )
    for done in (doctor, workers, letters):
        assert done.returncode == 0, done.stdout + done.stderr
    assert "CONFIG is not allowed" not in doctor.stdout
    assert "research" in workers.stdout


async def test_every_part_of_a_stack_logs_in_as_its_user(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(redis_url, key_prefix)
    worker = Worker("research")

    @worker.agent("echo")
    async def echo(run: Run) -> str:
        return run.request.content

    link = RedisLink(redis_url)
    try:
        before = {client["id"] for client in await link.client.client_list()}
        async with (
            running_gateway(settings) as gateway,
            worker.running(settings_as(settings, "worker")),
            tab(gateway.url) as alice,
        ):
            await alice.send(
                type="user_message", id="m1", thread_id="t1", agent="echo", content="x"
            )
            await alice.until("agent_completed")
            clients = await link.client.client_list()
    finally:
        await link.aclose()
    users = [client["user"] for client in clients if client["id"] not in before]
    assert set(users) == {"gateway", "worker"}
    assert users.count("gateway") >= 2
    assert users.count("worker") >= 3


async def test_redis_of_the_compose_file_knows_its_users_only(tmp_path: Path) -> None:
    entrypoint = tmp_path / "docker-entrypoint.sh"
    entrypoint.write_text('#!/bin/sh\nexec "$@"\n')
    entrypoint.chmod(0o755)
    port = free_port()
    server = ManagedProcess(
        ["sh", str(ACL_FILES / "start-redis.sh"), "--port", str(port), "--save", ""],
        environment={
            "PATH": f"{tmp_path}:{Path(find_redis_server() or '').parent}:/usr/bin:/bin",
            "TMPDIR": str(tmp_path),
            "REDIS_GATEWAY_PASSWORD": "of-the-gateway",
            "REDIS_WORKER_PASSWORD": "of-the-worker",
        },
        folder=tmp_path,
        log_path=tmp_path / "redis.log",
    )
    server.start()
    try:

        async def answers() -> bool:
            with contextlib.suppress(redis.exceptions.ConnectionError):
                async with session(f"redis://127.0.0.1:{port}") as client:
                    return bool(await client.ping())
            return False

        await eventually(answers)
        async with session(f"redis://127.0.0.1:{port}") as anybody:
            for command in (("GET", "relay:agents"), ("INFO",), ("ACL", "WHOAMI")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    await anybody.execute_command(*command)
        for role in ("gateway", "worker"):
            async with session(f"redis://{role}:of-the-{role}@127.0.0.1:{port}") as part:
                assert await part.hgetall(KEYS.agents) == {}
        with pytest.raises(redis.exceptions.AuthenticationError):
            async with session(f"redis://operator:@127.0.0.1:{port}") as nobody:
                await nobody.ping()
        assert "of-the-gateway" not in " ".join(psutil.Process(server.pid).cmdline())
        assert (tmp_path / "relay-users.conf").stat().st_mode & 0o077 == 0
    finally:
        server.end_blocking()
