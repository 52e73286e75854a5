"""How a gateway starts, why it may refuse to, when it says that it is ready, how it leaves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from gateway.app import Gateway, running_gateway
from gateway.protocol import Connection
from gateway.server import Listener, bind, server_config
from relay.errors import CloseCode, ConfigurationError, RedisMisconfigured, RedisUnavailable
from relay.keys import Keys
from tests.integration.gateway_support import (
    SECRET,
    bearer,
    eventually,
    gateway_settings,
    http,
    raw_tab,
    tab,
)
from tests.support.acl import as_user

if TYPE_CHECKING:
    import redis.asyncio

    from relay.config import Settings
    from tests.conftest import OwnRedis

ROOT = Path(__file__).parents[2]


async def refuse_to_start(settings: Settings, kind: type[Exception]) -> str:
    started_s = time.monotonic()
    with pytest.raises(kind) as caught:
        async with running_gateway(settings):
            pass
    assert time.monotonic() - started_s < 8
    return str(caught.value)


# --- Starting ---


async def test_port_in_use_is_one_clear_sentence(redis_url: str, key_prefix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for name in ("port", "admin_port"):
            settings = gateway_settings(redis_url, key_prefix, **{name: port})
            text = await refuse_to_start(settings, ConfigurationError)
            assert text == (
                f"Port {port} on 127.0.0.1 is in use by another program. Stop that program, "
                f"or set RELAY_{name.upper()} to another port."
            )


async def test_host_that_is_not_ours_is_named(redis_url: str, key_prefix: str) -> None:
    for host in ("192.0.2.1", "no such host"):
        settings = gateway_settings(redis_url, key_prefix, host=host)
        text = await refuse_to_start(settings, ConfigurationError)
        assert host in text
        assert "RELAY_HOST" in text


async def test_no_key_for_tokens_is_named(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(redis_url, key_prefix, jwt_secret=())
    assert "RELAY_JWT_SECRET" in await refuse_to_start(settings, ConfigurationError)


async def test_redis_that_is_not_there_is_named(key_prefix: str) -> None:
    settings = gateway_settings("redis://127.0.0.1:1/0", key_prefix)
    text = await refuse_to_start(settings, RedisUnavailable)
    assert "127.0.0.1:1/0" in text


async def test_wrong_password_is_named_but_not_shown(own_redis: OwnRedis, key_prefix: str) -> None:
    server = await own_redis(password="right")
    wrong = server.url.replace("right", "wr0ng")
    text = await refuse_to_start(gateway_settings(wrong, key_prefix), RedisMisconfigured)
    assert "password" in text
    assert "wr0ng" not in text


async def test_wrong_scheme_is_named() -> None:
    with pytest.raises(ConfigurationError, match="RELAY_REDIS_URL"):
        gateway_settings("http://127.0.0.1:6379", "x")


async def test_node_is_known_while_it_lives(
    redis_url: str, key_prefix: str, redis: redis.asyncio.Redis
) -> None:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:
        key = Keys(key_prefix).node(gateway.node.node_id)
        assert 0 < await redis.pttl(key) <= 3_000
        await redis.pexpire(key, 100)

        async def is_renewed() -> bool:
            return bool(await redis.pttl(key) > 1_000)

        await eventually(is_renewed)
        assert dict(await redis.pubsub_numsub(key))[key.encode()] == 1
    assert not await redis.exists(key)


# --- Readiness ---


async def test_readiness_turns_red_when_redis_goes_silent_and_green_when_it_is_back(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    async with (
        running_gateway(gateway_settings(server.url, key_prefix)) as gateway,
        http(gateway, None) as client,
    ):

        async def is_ready() -> bool:
            status = (await client.get("/readyz")).status_code
            assert status in (200, 503)
            return status == 200

        async def is_not_ready() -> bool:
            return not await is_ready()

        assert await is_ready()
        # Frozen, not dead: no connection is refused or reset.
        server.pause()
        silent_s = time.monotonic()
        await eventually(is_not_ready)
        assert time.monotonic() - silent_s < 5
        detail = (await client.get(gateway.admin_url + "/readyz")).json()
        [red] = [c for c in detail["checks"] if c["name"] == "redis_round_trip"]
        assert red["ok"] is False
        assert "Redis" in red["detail"]
        assert (await client.get("/healthz")).status_code == 200
        server.resume()
        await eventually(is_ready)


async def test_readiness_needs_pubsub_not_only_commands(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    async with (
        running_gateway(gateway_settings(server.url, key_prefix)) as gateway,
        http(gateway, None) as client,
        server.client() as operator,
    ):

        async def is_ready() -> bool:
            return (await client.get("/readyz")).status_code == 200

        async def is_not_ready() -> bool:
            return not await is_ready()

        await operator.execute_command("ACL", "SETUSER", "gateway", "-subscribe")
        await operator.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(is_not_ready)
        await asyncio.sleep(2.5)  # Longer than a probe's deadline: it must stay red.
        assert await is_not_ready()
        await operator.execute_command("ACL", "SETUSER", "gateway", "+subscribe")
        await eventually(is_ready)


# --- Leaving ---

PROGRAM = """
import sys
from gateway.app import Gateway, serve
from relay.config import load_settings
started = Gateway.start
async def start(gateway):
    await started(gateway)
    print("READY", gateway.url, flush=True)
Gateway.start = start
serve(load_settings(env_file=None, port=0, admin_port=0, redis_url=sys.argv[1],
                    key_prefix=sys.argv[2], jwt_secret=sys.argv[3]))
"""


class GatewayProcess:
    """A gateway as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    @classmethod
    async def start(cls, redis_url: str, key_prefix: str) -> GatewayProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM,
            as_user(redis_url, "gateway"),
            key_prefix,
            SECRET,
            stdout=asyncio.subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not k.startswith("RELAY_")},
        )
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if line.startswith(b"READY"):
                return cls(process, line.split()[1].decode())
        raise AssertionError(f"the gateway ended with {await process.wait()}")

    async def end(self) -> int:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_hands_every_client_over_and_ends_the_process(
    redis_url: str, key_prefix: str, number: signal.Signals
) -> None:
    gateway = await GatewayProcess.start(redis_url, key_prefix)
    try:
        async with (
            tab(gateway.url) as one,
            tab(gateway.url) as two,
            tab(gateway.url, "bob") as three,
            raw_tab(gateway.url, headers=bearer("carol")) as four,
        ):
            gateway.process.send_signal(number)
            asked_s = time.monotonic()
            for opened in (one, two, three, four):
                code, reason = await opened.closed()
                assert code == CloseCode.DRAIN
                assert reason
                last = opened.frames[-1]
                assert (last["type"], last["reason"]) == ("reconnect", "drain")
                assert 0 <= last["after_ms"] < 300
            async with asyncio.timeout(10):
                await gateway.process.communicate()
            assert time.monotonic() - asked_s < 5
            assert gateway.process.returncode == 0
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(trust_env=False) as client:
                await client.get(gateway.url + "/healthz")
    finally:
        await gateway.end()


async def test_client_that_ignores_the_close_does_not_hold_the_gateway(
    redis_url: str, key_prefix: str
) -> None:
    gateway = await GatewayProcess.start(redis_url, key_prefix)
    try:
        async with tab(gateway.url) as opened:
            opened.socket.transport.pause_reading()
            gateway.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(8):
                await gateway.process.communicate()
            assert gateway.process.returncode == 0
            opened.socket.transport.resume_reading()
    finally:
        await gateway.end()


async def test_readiness_is_red_during_the_drain(redis_url: str, key_prefix: str) -> None:
    async with (
        running_gateway(gateway_settings(redis_url, key_prefix)) as gateway,
        tab(gateway),
        httpx.AsyncClient(trust_env=False) as client,
    ):
        gateway.health.is_draining = True
        answer = await client.get(gateway.admin_url + "/readyz")
        assert answer.status_code == 503
        assert [c["name"] for c in answer.json()["checks"] if not c["ok"]] == ["drain"]
        answer = await client.post(gateway.url + "/v1/tickets", headers=bearer())
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0


async def test_part_that_fails_ends_the_gateway(redis_url: str, key_prefix: str) -> None:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:

        async def fail() -> None:
            raise RuntimeError("defect")

        gateway._run_in_background(fail(), "part")
        with pytest.raises(RuntimeError, match="defect"):
            async with asyncio.timeout(5):
                await gateway.wait()


def break_reader(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.hub.reader, "_requests", Broken())
    gateway.hub.reader._wake.set()


def break_checks(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.hub, "checks", Broken())


def break_subscriber(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.hub.subscriber, "_on_lost", Broken().fail)
    connection = gateway.hub.subscriber._connection
    assert connection is not None
    connection.end(ConnectionError("cut"))


class Broken:
    """A part that fails whatever it is asked."""

    def fail(self, *_: object) -> None:
        raise RuntimeError("defect")

    advance = take = fail


@pytest.mark.parametrize("break_part", [break_reader, break_checks, break_subscriber])
async def test_gateway_without_its_feeds_ends(
    redis_url: str,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    break_part: Callable[[Gateway, pytest.MonkeyPatch], None],
) -> None:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:
        break_part(gateway, monkeypatch)
        with pytest.raises(RuntimeError, match="defect"):
            async with asyncio.timeout(5):
                await gateway.wait()


@pytest.mark.usefixtures("server")
async def test_connection_that_fails_at_its_time_is_cut_off_alone(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = Connection.tick

    def fail_for_alice(connection: Connection) -> None:
        if connection.user_id == "alice":
            raise RuntimeError("defect")
        tick(connection)

    monkeypatch.setattr(Connection, "tick", fail_for_alice)
    async with (
        running_gateway(gateway_settings(redis_url, key_prefix, heartbeat_ms=300)) as gateway,
        tab(gateway, "bob") as bob,
        tab(gateway, "alice") as alice,
    ):
        assert await alice.closed() == (CloseCode.INTERNAL, "connection failed")
        await bob.until("heartbeat")
        assert [connection.user_id for connection in gateway.pool] == ["bob"]


async def unused(scope: object, receive: object, send: object) -> None:
    raise AssertionError("nobody asks for anything")


def listener(look: Callable[[int], Awaitable[bool]]) -> Listener:
    """Give a server that looks in its own way whether it should go on."""
    listening = bind("127.0.0.1", 0, host_variable="HOST", port_variable="PORT")
    made = Listener(server_config(unused, max_frame_bytes=1_000), listening)
    made.on_tick = look  # type: ignore[method-assign]
    return made


async def test_server_stops_when_it_is_asked_and_not_when_it_looks_next() -> None:
    async def look_for_ever(_: int) -> bool:
        return await asyncio.Event().wait()

    serving = listener(look_for_ever)
    await serving.start()
    async with asyncio.timeout(5):
        await serving.stop()


async def test_server_that_fails_while_it_serves_says_so() -> None:
    async def fail(_: int) -> bool:
        raise RuntimeError("defect")

    serving = listener(fail)
    with pytest.raises(RuntimeError, match="defect"):
        await serving.main_loop()
    await serving.stop()


async def test_gateway_that_never_started_stops_cleanly(redis_url: str, key_prefix: str) -> None:
    await Gateway(gateway_settings(redis_url, key_prefix)).stop()


async def test_a_blocked_event_loop_shows_in_its_metric(redis_url: str, key_prefix: str) -> None:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:

        async def is_told() -> bool:
            time.sleep(0.3)  # noqa: ASYNC251 -- the very thing that must show
            await asyncio.sleep(0.2)
            return gateway.metrics.loop_lag_max_s > 0.1

        await eventually(is_told)


async def test_metrics_in_the_documents_are_those_of_a_gateway(
    redis_url: str, key_prefix: str
) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    documented = re.findall(r"^\| `(relay_\w+)`(?: by `\w+`)? \| (.*) \|$", text, re.MULTILINE)
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:
        exposition = gateway.metrics.exposition().decode()
    given = re.findall(r"^# HELP (relay_\w+) (.*)$", exposition, re.MULTILINE)
    assert sorted(documented) == sorted(given)
