"""TLS to Redis: every connection of every part, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop

from agent_worker import AgentWebSocketBridge, Run, Worker
from gateway.app import running_gateway
from relay.errors import RedisMisconfigured, RedisUnavailable
from relay.scripts import RedisLink
from relay.subscriber import Subscriber
from tests.conftest import OwnRedis
from tests.integration.gateway_support import gateway_settings, tab
from tests.integration.worker_support import worker_settings
from tests.support.acl import settings_as
from tests.support.certificates import Authority, Certificate
from tests.support.redis_server import free_port
from tests.support.stack_process import run_relay

pytestmark = pytest.mark.needs_redis_tls


@dataclass
class TlsRedis:
    """A Redis that speaks TLS on a port of its own."""

    authority: Authority
    client: Certificate
    port: int
    plain_url: str

    def url(self, *, host: str = "127.0.0.1", **parameters: object) -> str:
        query = "&".join(
            f"{name}={value}"
            for name, value in {"ssl_ca_certs": self.authority.path, **parameters}.items()
            if value
        )
        return f"rediss://{host}:{self.port}/0" + (f"?{query}" if query else "")


StartTls = Callable[..., Awaitable[TlsRedis]]


@pytest.fixture
def tls_redis(tmp_path: Path, own_redis: OwnRedis) -> StartTls:
    async def start(*, asks_clients: bool = False) -> TlsRedis:
        authority, port = Authority(tmp_path / "authority"), free_port()
        server = authority.issue("server")
        started = await own_redis(
            options={
                "tls-port": str(port),
                "tls-cert-file": str(server.certificate),
                "tls-key-file": str(server.key),
                "tls-ca-cert-file": str(authority.path),
                "tls-auth-clients": "yes" if asks_clients else "no",
            }
        )
        return TlsRedis(authority, authority.issue("client"), port, started.url)

    return start


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_messages_come_whole_and_in_order_through_tls(
    tls_redis: StartTls, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """asyncio's own TLS, and uvloop's, each put what they read into the buffer they are given."""
    payloads = [b"%d" % number * (60_000 if number % 9 == 0 else 1) for number in range(60)]

    async def check(url: str) -> list[bytes]:
        heard: list[bytes] = []
        confirmed = asyncio.Event()
        link = RedisLink(url)
        subscriber = Subscriber(
            link,
            on_message=lambda _, payload: heard.append(payload),
            on_lost=lambda: heard.append(b"lost"),
            on_confirmed=lambda _: confirmed.set(),
        )
        await subscriber.start()
        try:
            subscriber.subscribe(b"channel")
            async with asyncio.timeout(10):
                await confirmed.wait()
                async with link.client.pipeline(transaction=False) as pipeline:
                    for payload in payloads:
                        pipeline.publish("channel", payload)
                    await pipeline.execute()
                assert await subscriber.barrier()
        finally:
            await subscriber.aclose()
            await link.aclose()
        return heard

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(check(runner.run(started_url(tls_redis)))) == payloads


async def started_url(tls_redis: StartTls) -> str:
    return (await tls_redis()).url()


async def problem(url: str) -> str:
    """Give the sentence that a part which cannot use this Redis ends with."""
    link = RedisLink(url, timeout_s=1.0)
    try:
        with pytest.raises((RedisMisconfigured, RedisUnavailable)) as caught:
            await link.check()
    finally:
        await link.aclose()
    return str(caught.value)


@pytest.mark.parametrize("asks_clients", [False, True])
async def test_gateway_worker_and_bridge_use_tls_for_every_connection(
    tls_redis: StartTls, key_prefix: str, asks_clients: bool
) -> None:
    redis = await tls_redis(asks_clients=asks_clients)
    files = {"ssl_certfile": redis.client.certificate, "ssl_keyfile": redis.client.key}
    url = redis.url(**(files if asks_clients else {}))
    settings = gateway_settings(url, key_prefix)
    worker = Worker("secret")

    @worker.agent("echo")
    async def echo(run: Run) -> str:
        await run.delta(run.request.content)
        return run.text

    async with (
        running_gateway(settings) as gateway,
        worker.running(settings_as(settings, "worker")),
        AgentWebSocketBridge(worker_settings(url, key_prefix)) as bridge,
        tab(gateway.url) as alice,
    ):
        async with bridge.run(user_id="alice", thread_id="t0", agent="bridged") as run:
            await run.delta("by the bridge")
        assert (await alice.until("agent_completed"))["agent"] == "bridged"
        await alice.send(
            type="user_message", id="m1", thread_id="t1", agent="echo", content="hello"
        )
        ended = await alice.until("agent_completed")
        assert (ended["agent"], ended["data"]["result"]) == ("echo", "hello")

        owner = RedisLink(redis.plain_url)
        try:
            clients = await owner.client.client_list()
        finally:
            await owner.aclose()
        ports: dict[str, set[str]] = {}
        for client in clients:
            ports.setdefault(client["user"], set()).add(client["laddr"].rpartition(":")[2])
        # The subscribers, the workers' readers and the threads that keep leases are among them.
        assert ports["gateway"] == ports["worker"] == {str(redis.port)}
        commands = {client["cmd"] for client in clients if client["user"] == "worker"}
        assert {"subscribe", "xreadgroup"} & commands


async def test_each_mistake_with_tls_is_a_sentence_of_its_own(
    tls_redis: StartTls, tmp_path: Path
) -> None:
    redis = await tls_redis()
    other = Authority(tmp_path / "other", "Somebody else")
    not_trusted = await problem(redis.url(ssl_ca_certs=other.path))
    assert re.fullmatch(
        r"Redis at rediss://\S+ cannot be used: its certificate is not trusted: .+ Name the file "
        r"of the authority that signed it in RELAY_REDIS_URL: \S+ca\.pem",
        not_trusted,
    )
    # The authorities that the machine trusts do not know ours either.
    assert "is not trusted" in await problem(redis.url(ssl_ca_certs=None))
    assert "is for another host" in await problem(redis.url(host="localhost"))
    assert "cannot be read" in await problem(redis.url(ssl_ca_certs=tmp_path / "nothing"))
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("not a certificate")
    assert "in PEM form" in await problem(redis.url(ssl_ca_certs=no_pem))
    wrong_key = {"ssl_certfile": redis.client.certificate, "ssl_keyfile": tmp_path / "wrong.key"}
    wrong_key["ssl_keyfile"].write_bytes(other.issue("wrong").key.read_bytes())
    assert "another certificate" in await problem(redis.url(**wrong_key))
    plain_port = redis.plain_url.replace("redis://", "rediss://")
    assert "needs a port that speaks TLS" in await problem(plain_port)
    without_tls = redis.url(ssl_ca_certs=None).replace("rediss://", "redis://")
    assert "needs rediss://" in await problem(without_tls)


async def test_missing_client_certificate_is_named(tls_redis: StartTls) -> None:
    redis = await tls_redis(asks_clients=True)
    assert "ssl_certfile and ssl_keyfile" in await problem(redis.url())


@pytest.mark.parametrize("command", [["gateway"], ["worker", "quickstart:worker"], ["doctor"]])
async def test_commands_say_in_one_sentence_that_the_certificate_is_not_trusted(
    tls_redis: StartTls, tmp_path: Path, command: list[str]
) -> None:
    redis = await tls_redis()
    url = redis.url(ssl_ca_certs=Authority(tmp_path / "other", "Somebody else").path)
    examples = Path(__file__).parents[2] / "examples"
    done = run_relay(
        *command,
        folder=examples,
        RELAY_REDIS_URL=url.replace("//", "//gateway:a-password-of-nobody@"),
        RELAY_JWT_SECRET="s" * 32,
        RELAY_PORT="0",
        RELAY_ADMIN_PORT="0",
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert output.count("its certificate is not trusted") == 1
    assert "Traceback" not in output
    assert "a-password-of-nobody" not in output
