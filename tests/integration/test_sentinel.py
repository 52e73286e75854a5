"""A Redis behind Sentinel: the master dies, another one takes over, and nobody is told a lie."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import TYPE_CHECKING

import pytest
import redis.asyncio

from agent_worker.bridge import AgentWebSocketBridge, BridgeState
from gateway.app import running_gateway
from relay.errors import RedisUnavailable
from relay.lifeline import Lifeline
from relay.scripts import RedisLink
from relay.testing.redis_server import RedisServer, find_redis_server, free_port
from tests.integration.gateway_support import SECRET, eventually, tab
from tests.integration.worker_support import Client, echo_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

from relay.config import Settings, load_settings

SERVICE = "main"
PASSWORD = "the password of a master and of its replica"


class Sentinel:
    """A Sentinel process that watches one master, and decides alone."""

    def __init__(self, folder: Path, master_port: int) -> None:
        self.port = free_port()
        self._config = folder / "sentinel.conf"
        self._config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {master_port} 1\n"
            f'sentinel auth-pass {SERVICE} "{PASSWORD}"\n'
            f"sentinel down-after-milliseconds {SERVICE} 1000\n"
            f"sentinel failover-timeout {SERVICE} 5000\n"
        )
        self._log = (folder / "sentinel.log").open("wb")
        program = find_redis_server()
        assert program is not None
        self._process = subprocess.Popen(
            [program, str(self._config), "--sentinel"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._lifeline = Lifeline.for_process_group(self._process.pid)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._lifeline.release()
        self._log.close()

    async def knows_replica(self) -> bool:
        async with redis.asyncio.Redis(port=self.port, decode_responses=True) as client:
            with contextlib.suppress(redis.exceptions.RedisError):
                replicas = await client.sentinel_slaves(SERVICE)
                return any(not replica["is_disconnected"] for replica in replicas)
        return False


class Pair:
    """A master, its replica, and a Sentinel that watches both."""

    def __init__(self, folder: Path) -> None:
        self.master = RedisServer(folder / "first", password=PASSWORD)
        self._folder = folder
        self.replica: RedisServer | None = None
        self.sentinel: Sentinel | None = None

    async def start(self) -> None:
        await self.master.start()
        port = self.master.port
        self.replica = RedisServer(
            self._folder / "second",
            password=PASSWORD,
            options={
                "replicaof": f"127.0.0.1 {port}",
                "masterauth": PASSWORD,
                "repl-diskless-sync-delay": "0",
            },
        )
        await self.replica.start()
        self.sentinel = Sentinel(self._folder, port)
        await eventually(self.sentinel.knows_replica, 30)
        await eventually(self._is_in_step, 30)

    async def _is_in_step(self) -> bool:
        assert self.replica is not None
        async with self.replica.client() as client:
            info = await client.info("replication")
            return bool(info["master_link_status"] == "up")

    @property
    def url(self) -> str:
        assert self.sentinel is not None
        # The first one of the list is nobody: the next one is asked.
        places = f"127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}"
        return f"redis+sentinel://:{PASSWORD.replace(' ', '%20')}@{places}/{SERVICE}/0"

    def stop(self) -> None:
        if self.sentinel is not None:
            self.sentinel.stop()
        for server in (self.replica, self.master):
            if server is not None:
                server.kill_blocking()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path)
    try:
        await pair.start()
        yield pair
    finally:
        pair.stop()


def settings_of(pair: Pair, key_prefix: str) -> Settings:
    return load_settings(
        env_file=None,
        redis_url=pair.url,
        key_prefix=key_prefix,
        port=0,
        admin_port=0,
        jwt_secret=SECRET,
    )


async def test_a_failover_is_followed_by_gateway_worker_and_bridge(
    pair: Pair, key_prefix: str
) -> None:
    settings = settings_of(pair, key_prefix)
    async with (
        running_gateway(settings) as gateway,
        echo_worker().running(settings),
        AgentWebSocketBridge(settings) as bridge,
        Client(settings) as client,
        tab(gateway) as opened,
    ):

        async def all_do_their_work() -> bool:
            try:
                asked = await client.submit("echo")
            except RedisUnavailable:
                # One of its connections was to the old master.
                return False
            completed = await opened.until("agent_completed", run_id=asked)
            assert completed["data"]["result"] == "hi"
            async with bridge.run(user_id="alice", thread_id="t", agent="outside") as run:
                run.result = "from outside"
            completed = await opened.until("agent_completed", run_id=run.run_id)
            assert completed["data"]["result"] == "from outside"
            return True

        assert await all_do_their_work()

        # What the replica has not got yet would be lost, and said so; not what this is about.
        async with pair.master.client() as master:
            assert await master.wait(1, 5_000) == 1
        await pair.master.kill()
        assert (await opened.until("degraded"))["reason"]
        while (await opened.receive(60)).get("ended") is not True:
            pass

        async def bridge_is_well() -> bool:
            return bridge.health().state is BridgeState.ACTIVE

        await eventually(bridge_is_well, 60)
        await eventually(all_do_their_work, 60)
        assert await opened.is_alive()


async def test_a_service_that_no_sentinel_knows_is_unavailable(pair: Pair) -> None:
    link = RedisLink(pair.url.replace(f"/{SERVICE}/", "/another/"), timeout_s=2)
    try:
        with pytest.raises(RedisUnavailable, match="another"):
            await link.check()
    finally:
        await link.aclose()


async def test_sentinels_that_are_away_are_unavailable(key_prefix: str) -> None:
    link = RedisLink(f"redis+sentinel://127.0.0.1:{free_port()}/{SERVICE}", timeout_s=2)
    try:
        with pytest.raises(RedisUnavailable, match="does not answer"):
            async with asyncio.timeout(10):
                await link.check()
    finally:
        await link.aclose()
