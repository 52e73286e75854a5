"""The Redis that the tests run on is real, private to each key prefix, and can be hurt."""

import asyncio
from pathlib import Path

import pytest
import redis.asyncio
import redis.exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from relay.testing.redis_server import RedisServer
from tests.conftest import OwnRedis


async def test_session_redis_has_streams_and_scripts(
    redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    await redis.xadd(f"{key_prefix}:log", {"event": "x"}, id="1-0")
    size = await redis.eval("return redis.call('XLEN', KEYS[1])", 1, f"{key_prefix}:log")
    assert size == 1


async def test_restart_with_append_only_file_keeps_data(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True, password="p@ss/word")
    async with server.client() as client:
        await client.set("kept", "yes")
        port = server.port
        await server.restart()
        assert server.port == port
        assert await client.get("kept") == b"yes"


async def test_kill_keeps_what_was_acknowledged(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with server.client() as client:
        await client.set("kept", "yes")
        await server.kill()
        assert not server.is_running
        await server.start()
        assert await client.get("kept") == b"yes"


async def test_restart_without_persistence_is_empty(own_redis: OwnRedis) -> None:
    server = await own_redis()
    async with server.client() as client:
        await client.set("gone", "yes")
        await server.restart()
        assert await client.get("gone") is None


async def test_paused_server_accepts_connections_but_does_not_answer(own_redis: OwnRedis) -> None:
    server = await own_redis()
    client = redis.asyncio.Redis(port=server.port, socket_timeout=0.3, retry=Retry(NoBackoff(), 0))
    async with client:
        server.pause()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.close()
        await writer.wait_closed()
        with pytest.raises(redis.exceptions.TimeoutError):
            await client.ping()
        server.resume()
        assert await client.ping()


async def test_two_servers_of_one_test_are_apart(own_redis: OwnRedis) -> None:
    first, second = await own_redis(), await own_redis(options={"maxmemory": "50mb"})
    async with first.client() as one, second.client() as two:
        await one.set("key", "1")
        assert await two.get("key") is None
        assert (await two.config_get("maxmemory"))["maxmemory"] == "52428800"


async def test_start_failure_shows_what_redis_said(own_redis: OwnRedis) -> None:
    with pytest.raises(RuntimeError, match="did not come up"):
        await own_redis(options={"no-such-option": "1"})


async def test_words_and_values_with_spaces_reach_redis(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    password = 'with "quotes", a \\ and a\nbreak'
    options = {
        "unixsocket": f"{folder}/a socket",
        "client-output-buffer-limit": "pubsub 2mb 1mb 30",
        "maxmemory-policy": "noeviction",
    }
    server = RedisServer(folder, password=password, options=options)
    await server.start()
    try:
        async with server.client() as client:
            kept = await client.config_get("*")
        assert kept["unixsocket"] == options["unixsocket"]
        assert kept["requirepass"] == password
        assert "pubsub 2097152 1048576 30" in kept["client-output-buffer-limit"]
    finally:
        await server.stop()
