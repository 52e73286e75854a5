"""Processes of two versions on one Redis: whatever one does not understand, nobody loses."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import orjson
import pytest
import pytest_asyncio
import structlog

from agent_worker import dispatcher
from gateway.app import Gateway, running_gateway
from relay.codec import Task, decode_live, decode_task, encode_task
from relay.columns import Columns
from relay.config import Settings
from relay.keys import WIRE_VERSION, Keys
from relay.orphans import sweep_orphans
from relay.publisher import Publisher
from relay.scripts import RedisLink, Script
from relay.testing import SequenceChecker
from tests.integration.gateway_support import (
    Work,
    bearer,
    eventually,
    gateway_settings,
    raw_tab,
    refusal,
    tab,
)
from tests.integration.worker_support import Client, echo_worker, worker_settings

STARTED = b'{"type":"agent_started","run_id":"r","attempt":1,"later":[1],"data":{"newer":true}}'
UNKNOWN = b'{"type":"later_type","run_id":"r","data":{}}'


NEWER = b"""
local function newer(message)
  local parts = cmsgpack.unpack(message)
  parts[1] = %d
  parts[4] = {later = 1}
  for _, entry in ipairs(parts[3]) do
    entry[6] = 'more'
  end
  return cmsgpack.pack(parts)
end
"""


def of_a_newer_release(scripts: dict[str, Script], version: int) -> dict[str, Script]:
    """Give the scripts as a later release could have them: more elements, another version."""
    newer = {}
    for name, script in scripts.items():
        source = script.source
        for made in (
            b"live_message(channel, batch)",
            b"cmsgpack.pack({%d, channel.epoch, {}})" % WIRE_VERSION,
        ):
            source = source.replace(b"LIVE, " + made, b"LIVE, newer(" + made + b")")
        source = NEWER % version + source
        sha = hashlib.sha1(source, usedforsecurity=False).hexdigest()
        newer[name] = Script(name, source, sha)
    assert newer["publish"].source.count(b"newer(") == 3
    return newer


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return gateway_settings(redis_url, key_prefix)


@pytest_asyncio.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    async with running_gateway(settings) as running:
        yield running


@pytest.mark.parametrize(("version", "is_understood"), [(1, True), (2, False), (99, False)])
async def test_gateway_delivers_everything_that_a_newer_worker_publishes(
    gateway: Gateway, settings: Settings, version: int, is_understood: bool
) -> None:
    checker = SequenceChecker()
    newer = Work(settings)
    newer.link.scripts = of_a_newer_release(newer.link.scripts, version)
    # A publisher knows its script from the beginning.
    newer.publisher = Publisher(newer.link, newer.keys)
    async with newer as work, tab(gateway) as first, tab(gateway) as second:
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                run_id = await work.run(pieces=tuple("A text in several pieces."))
                for opened in (first, second):
                    await opened.until("agent_completed", run_id=run_id)
        for index, opened in enumerate((first, second)):
            for frame in opened.frames:
                checker.received(f"tab {index}", "alice", frame)
    checker.verify()
    assert len({frame["run_id"] for frame in first.events}) == 3
    messages = [line["event"] for line in logs if line["log_level"] == "error"]
    if is_understood:
        assert gateway.hub.not_understood == 0
        assert not messages
    else:
        assert gateway.hub.not_understood > 3
        assert messages == ["live message not understood: history is read instead"]
        assert f"version {version}" in str(logs)


@pytest.mark.parametrize(("event", "op"), [(STARTED, "start"), (UNKNOWN, "")])
async def test_clients_get_what_a_newer_worker_adds_to_events(
    gateway: Gateway, settings: Settings, event: bytes, op: str
) -> None:
    async with Work(settings) as work, tab(gateway) as opened:
        run_id = await work.submit()
        claim: Any = await work.registry.claim("alice", run_id, "worker", 15_000)
        batch: list[Any] = [run_id, claim.fence, 1, "", "", *Columns(0, op, "", "", event, "")]
        await work.link.run([work.link.call("publish", work.keys.user("alice"), run_id, *batch)])
        expected = orjson.loads(event)
        live = await opened.until(expected["type"])
        assert live == {**expected, "offset": live["offset"], "seq": 2}
        async with tab(gateway, query="?since=0") as from_history:
            assert await from_history.until(expected["type"]) == live


async def test_fields_that_a_newer_peer_adds_to_a_run_survive_its_life(settings: Settings) -> None:
    async with Work(settings) as work:
        run_id = await work.submit()
        key = work.keys.user("alice").run(run_id)
        await work.link.client.hset(key, mapping={"later": b"\x00kept", "later:map": "{}"})
        await work.carry_out(run_id)
        assert await work.link.client.hmget(key, ["status", "later", "later:map"]) == [
            b"completed",
            b"\x00kept",
            b"{}",
        ]


# --- What version 1 has written stays readable: a newer gateway or worker must pass these too ---


def test_live_messages_and_tasks_of_version_1_are_read() -> None:
    live = bytes.fromhex("9301a4653161629295010200a472756e31c4027b7d95020001a0a0")
    batch = decode_live(live)
    assert (batch.epoch, len(batch.publications)) == ("e1ab", 2)
    event, claim = batch.publications
    assert (event.offset, event.seq, event.kind, event.run_id) == (1, 2, 0, "run1")
    assert event.event == b"{}"
    assert (claim.offset, claim.seq, claim.kind, claim.is_claim) == (2, 0, 1, True)
    task = bytes.fromhex("84a17601a7757365725f6964a161a672756e5f6964a172a56167656e74a164")
    assert decode_task(task) == Task("a", "r", "d")
    assert encode_task(Task("a", "r", "d")) == task


def test_fields_that_a_newer_writer_adds_to_a_task_are_kept() -> None:
    fields = {"v": 1, "user_id": "a", "run_id": "r", "agent": "d", "later": [b"\xff", {"x": None}]}
    task = decode_task(msgpack.packb(fields))
    assert msgpack.unpackb(encode_task(task)) == fields


# --- Tasks ---


def newer_task(run_id: str) -> bytes:
    packed: bytes = msgpack.packb({"v": 2, "who": "alice", "run": run_id, "agent": "echo"})
    return packed


async def test_tasks_of_a_newer_version_are_left_to_newer_workers(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_concurrency=1)
    async with Client(settings) as client, echo_worker().running(settings):
        redis, stream = client.link.client, client.keys.tasks("echo")
        await client.ended(await client.submit("echo"))
        tasks = {newer_task(f"run_{number}") for number in range(3)}
        for task in tasks:
            await redis.xadd(stream, {"task": task, "later": "field"})
        # An old worker's only place is not held by what it cannot do.
        assert (await client.ended(await client.submit("echo"))).summary.status == "completed"
        taken: set[bytes] = set()

        async def newer_worker_has_all() -> bool:
            reply = await redis.xreadgroup("workers", "newer", {stream: ">"}, block=1_000)
            for entry_id, fields in reply[0][1] if reply else []:
                assert fields[b"later"] == b"field"
                if fields[b"task"] in tasks:
                    taken.add(fields[b"task"])
                    await redis.xack(stream, "workers", entry_id)
                    await redis.xdel(stream, entry_id)
            return taken == tasks

        await eventually(newer_worker_has_all)
        assert await redis.xlen(client.keys.dead_letters) == 0

        async def nothing_is_left() -> bool:
            return await redis.xlen(stream) == 0

        await eventually(nothing_is_left)


async def test_task_that_no_newer_worker_takes_goes_to_the_dead_letters(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "NEWER_PATIENCE_MS", 600)
    settings = worker_settings(redis_url, key_prefix)
    async with Client(settings) as client, echo_worker().running(settings):
        redis, stream = client.link.client, client.keys.tasks("echo")
        await redis.xadd(stream, {"task": newer_task("run_x")})

        async def letter() -> Any:
            return await redis.xrange(client.keys.dead_letters)

        [(_, fields)] = await eventually(letter)
        assert fields[b"task"] == newer_task("run_x")
        assert b"version 2" in fields[b"reason"]
        assert b"no newer worker" in fields[b"reason"]

        async def nothing_is_left() -> bool:
            return await redis.xlen(stream) == 0

        await eventually(nothing_is_left)


async def test_worker_that_stops_gives_newer_tasks_back_at_once(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix)
    async with Client(settings) as client:
        redis, stream = client.link.client, client.keys.tasks("echo")
        async with echo_worker().running(settings):
            await client.ended(await client.submit("echo"))
            await redis.xadd(stream, {"task": newer_task("run_x")})

            async def is_taken() -> bool:
                return bool((await redis.xpending(stream, "workers"))["pending"])

            await eventually(is_taken)
        [(_, fields)] = await redis.xrange(stream)
        assert fields[b"task"] == newer_task("run_x")
        assert (await redis.xpending(stream, "workers"))["pending"] == 0


async def test_newer_tasks_of_a_dead_worker_are_given_back_as_they_are(
    redis_url: str, key_prefix: str
) -> None:
    link, keys = RedisLink(redis_url), Keys(key_prefix)
    stream = keys.tasks("echo")
    later = encode_task(Task("alice", "run_y", "echo", {"later": 1}))
    try:
        await link.client.hset(keys.agents, "echo", "{}")
        await link.client.xgroup_create(stream, "workers", "0", mkstream=True)
        for task in (newer_task("run_x"), later):
            await link.client.xadd(stream, {"task": task})
        await link.client.xreadgroup("workers", "dead", {stream: ">"})
        await sweep_orphans(link, keys, 0)
        entries = await link.client.xrange(stream)
        assert [fields[b"task"] for _, fields in entries] == [newer_task("run_x"), later]
        assert await link.client.xlen(keys.dead_letters) == 0
    finally:
        await link.aclose()


# --- Subprotocols ---


@pytest.mark.parametrize("offered", [["relay.v1"], ["relay.v2", "relay.v1"], ["x", "relay.v1"]])
async def test_the_subprotocol_that_both_speak_is_chosen(
    gateway: Gateway, offered: list[str]
) -> None:
    async with raw_tab(gateway, headers=bearer(), subprotocols=offered) as opened:
        assert (await opened.receive())["type"] == "connection_established"
        assert opened.socket.subprotocol == "relay.v1"


@pytest.mark.parametrize("offered", [["relay.v2"], ["graphql-ws", "relay.v10"], ["RELAY.V1"]])
async def test_client_that_speaks_other_subprotocols_only_is_told_which_there_are(
    gateway: Gateway, offered: list[str]
) -> None:
    response, problem = await refusal(gateway, headers=bearer(), subprotocols=offered)
    assert response.status_code == 422
    assert offered[0] in problem["detail"]
    assert "relay.v1" in problem["recovery_suggestions"][0]
