"""What clients receive: their own events, in order, on every tab and gateway."""

from __future__ import annotations

import asyncio
import contextlib
import socket as sockets
import time
from typing import TYPE_CHECKING, Any

import pytest

from gateway.app import Gateway, running_gateway
from relay.errors import CloseCode
from tests.integration.gateway_support import (
    Tab,
    Work,
    bearer,
    eventually,
    gateway_settings,
    raw_tab,
    tab,
    token,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import redis.asyncio

    from tests.conftest import OwnRedis

KINDS = [
    "agent_queued",
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "text_delta",
    "agent_completed",
]


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as running:
        yield running


@pytest.fixture
async def work(gateway: Gateway) -> AsyncIterator[Work]:
    async with Work(gateway.settings) as running:
        yield running


def check_order(opened: Tab, user_id: str) -> list[dict[str, Any]]:
    events = opened.events
    offsets = [event["offset"] for event in events]
    assert offsets == sorted(set(offsets))
    assert {event["user_id"] for event in events} <= {user_id}
    return events


async def test_established_connection_knows_all_that_a_page_needs(
    gateway: Gateway, work: Work
) -> None:
    run_id = await work.submit()
    async with tab(gateway) as opened:
        frame = opened.frames[0]
        assert frame["user_id"] == "alice"
        assert frame["node"] == gateway.node.node_id
        assert frame["recovered"] is True
        assert frame["heartbeat_ms"] == 15_000
        assert frame["agents"] == [{"name": "echo", "description": "Says what you said."}]
        assert frame["limits"] == {
            "max_frame_bytes": 65_536,
            "max_content_chars": 32_768,
            "max_connections": 20,
            "frames_per_second": 20,
        }
        [run] = frame["runs"]
        assert (run["run_id"], run["status"]) == (run_id, "queued")
        epoch, _, offset = frame["position"].partition(":")
        assert epoch
        assert int(offset) == run["first_offset"] - 1
        assert (await opened.until("agent_queued"))["run_id"] == run_id


async def test_every_tab_on_every_gateway_sees_the_same(gateway: Gateway, work: Work) -> None:
    async with (
        running_gateway(gateway.settings) as second,
        tab(gateway) as one,
        tab(gateway) as two,
        tab(second) as three,
        tab(second, "bob") as stranger,
    ):
        answer = await two.ask(type="user_message", thread_id="t", content="hello")
        await work.carry_out(answer["run_id"])
        for opened in (one, two, three):
            await opened.until("agent_completed")
            events = check_order(opened, "alice")
            assert list(dict.fromkeys(event["type"] for event in events)) == KINDS
            lifecycle = [event["seq"] for event in events if "seq" in event]
            assert lifecycle == list(range(1, len(lifecycle) + 1))
            assert events[-1]["data"]["result"] == "Hello"
        assert one.events == three.events
        assert {two.frames[0]["node"], three.frames[0]["node"]} == {
            gateway.node.node_id,
            second.node.node_id,
        }
        assert await stranger.is_alive()
        assert not stranger.events


async def test_odd_user_ids_are_users_like_any_other(gateway: Gateway, work: Work) -> None:
    names = ["{alice}", "a:b", "*", "a\nb", "%7Balice%7D", "alice}:live", "å🎈", "alice", " "]
    async with contextlib.AsyncExitStack() as stack:
        tabs = {name: await stack.enter_async_context(tab(gateway, name)) for name in names}
        for name in names:
            await work.run(name, pieces=(f"for {name}",))
        for name, opened in tabs.items():
            await opened.until("agent_completed")
            events = check_order(opened, name)
            assert events[-1]["data"]["result"] == f"for {name}"
            assert len({event["run_id"] for event in events}) == 1


async def test_connection_is_established_only_when_the_subscription_is_confirmed(
    gateway: Gateway, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    confirm = gateway.hub.subscriber._on_confirmed
    with monkeypatch.context() as patched:
        patched.setattr(gateway.hub.subscriber, "_on_confirmed", held.append)
        async with raw_tab(gateway, headers=bearer("bob")) as opened:
            with pytest.raises(TimeoutError):
                await opened.receive(0.35)
            assert len(held) == 1
            patched.undo()
            confirm(held[0])
            assert (await opened.receive())["type"] == "connection_established"
            run_id = await work.run("bob")
            assert (await opened.until("agent_completed"))["run_id"] == run_id
            check_order(opened, "bob")


async def test_request_sent_at_once_is_answered_after_the_establishment(
    gateway: Gateway, redis: redis.asyncio.Redis
) -> None:
    async with tab(gateway):
        pass
    await redis.execute_command("CLIENT", "PAUSE", 300, "ALL")
    async with raw_tab(gateway, headers=bearer("bob")) as opened:
        await opened.send(type="ping", id="1")
        assert (await opened.receive())["type"] == "connection_established"
        assert (await opened.receive())["type"] == "pong"


async def test_client_resumes_where_it_was_on_another_gateway(gateway: Gateway, work: Work) -> None:
    async with running_gateway(gateway.settings) as second, tab(gateway) as before:
        first = await work.run()
        await before.until("agent_completed")
        epoch = before.frames[0]["position"].partition(":")[0]
        position = f"{epoch}:{before.events[-1]['offset']}"
        missed = await work.run()
        async with tab(second, query=f"?since={position}") as after:
            assert after.frames[0]["recovered"] is True
            await after.until("agent_completed")
            assert {event["run_id"] for event in check_order(after, "alice")} == {missed}
            assert first != missed
        async with tab(second, query="?since=now") as late:
            assert await late.is_alive()
            assert not late.events
        async with tab(second, query="?since=0") as everything:
            while len([e for e in everything.events if e["type"] == "agent_completed"]) < 2:
                await everything.receive()


async def test_position_that_cannot_be_recovered_is_told(gateway: Gateway) -> None:
    async with tab(gateway, query="?since=abc123:7") as opened:
        assert opened.frames[0]["recovered"] is False
        assert (await opened.receive())["type"] == "reset"


async def test_heartbeats_carry_the_position(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(redis_url, key_prefix, heartbeat_ms=200)
    async with running_gateway(settings) as gateway, Work(settings) as work, tab(gateway) as opened:
        await work.run()
        await opened.until("agent_completed")
        epoch = opened.frames[0]["position"].partition(":")[0]
        started_s = time.monotonic()
        for _ in range(3):
            beat = await opened.until("heartbeat")
            assert beat["position"] == f"{epoch}:{opened.events[-1]['offset']}"
        assert 0.35 < time.monotonic() - started_s < 1.5


async def test_token_is_announced_refreshed_and_enforced(gateway: Gateway) -> None:
    async with tab(gateway, ttl_s=1.5) as refreshed, tab(gateway, ttl_s=1.5) as left_alone:
        assert (await refreshed.until("token_expiring"))["expires_at"].endswith("Z")
        answer = await refreshed.ask(type="refresh_token", token=token("bob"))
        assert answer["code"] == "invalid_token"
        answer = await refreshed.ask(type="refresh_token", token="garbage")
        assert answer["code"] == "invalid_token"
        assert "garbage" not in answer["message"]
        answer = await refreshed.ask(type="refresh_token", token=token())
        assert answer["type"] == "ack"
        assert (await left_alone.closed())[0] == CloseCode.TOKEN_EXPIRED
        assert await refreshed.is_alive()


@pytest.mark.usefixtures("server")
async def test_client_that_does_not_read_costs_its_budget_and_nobody_else(
    redis_url: str, key_prefix: str
) -> None:
    settings = gateway_settings(redis_url, key_prefix, outbox_bytes=65_536)
    async with running_gateway(settings) as gateway, Work(settings) as work:
        raw = sockets.socket()
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4_096)
        raw.setblocking(False)
        host, port = gateway.url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
        async with (
            raw_tab(gateway, headers=bearer(), sock=raw, max_queue=1) as slow,
            tab(gateway) as fast,
        ):
            text = "x" * 20_000
            for _ in range(40):
                await work.run(pieces=(text,))
            while len([e for e in fast.events if e["type"] == "agent_completed"]) < 40:
                await fast.receive()
            [stuck] = [
                connection
                for connection in gateway.pool
                if connection.connection_id != fast.frames[0]["connection_id"]
            ]
            # Its budget, and one page or frame above it, whatever was published.
            assert stuck._transport.size_bytes < 65_536 + 300_000  # type: ignore[attr-defined]
            while len([e for e in slow.events if e["type"] == "agent_completed"]) < 40:
                await slow.receive()
            results = [
                event["data"]["result"]
                for event in check_order(slow, "alice")
                if event["type"] == "agent_completed"
            ]
            assert results == [text] * 40
            lifecycle = [e for e in slow.events if "seq" in e]
            assert lifecycle == [e for e in fast.events if "seq" in e]


async def test_closed_connection_leaves_nothing_behind(gateway: Gateway) -> None:
    for _ in range(3):
        async with tab(gateway) as opened:
            assert len(gateway.pool) == 1
            connection_id = opened.frames[0]["connection_id"]
            assert gateway.pool.get(connection_id, "alice") is not None
            assert gateway.pool.get(connection_id, "bob") is None

        async def is_empty() -> bool:
            return not len(gateway.pool)

        await eventually(is_empty)
    assert not gateway.pool._by_user
    assert len(gateway._wheel) == 0
    assert gateway.metrics.closed == {"1000": 3}


async def test_outage_of_redis_is_told_and_survived(own_redis: OwnRedis, key_prefix: str) -> None:
    server = await own_redis(append_only=True)
    settings = gateway_settings(server.url, key_prefix)
    async with running_gateway(settings) as gateway, tab(gateway) as opened:
        await server.kill()
        assert (await opened.until("degraded"))["reason"]
        answer = await opened.ask(type="user_message", thread_id="t", agent="echo", content="x")
        assert (answer["code"], answer["retryable"]) == ("unavailable", True)
        await server.start()
        assert (await opened.until("degraded"))["ended"] is True
        async with Work(settings) as work:
            run_id = await work.run()
            assert (await opened.until("agent_completed"))["run_id"] == run_id


async def test_client_that_takes_nothing_is_closed_with_4410(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outbox.NO_PROGRESS_LIMIT_MS", 600)
    settings = gateway_settings(redis_url, key_prefix, heartbeat_ms=200)
    async with running_gateway(settings) as gateway, Work(settings) as work, tab(gateway) as fast:
        raw = sockets.socket()
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4_096)
        raw.setblocking(False)
        host, port = gateway.url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
        async with raw_tab(gateway, headers=bearer(), sock=raw, max_queue=None) as slow:
            slow.socket.transport.pause_reading()
            for _ in range(150):
                await work.run(pieces=("x" * 20_000,))

            async def is_closed() -> bool:
                return gateway.metrics.closed["4410"] == 1

            await eventually(is_closed)
            slow.socket.transport.resume_reading()
            assert (await slow.closed())[0] == CloseCode.TOO_SLOW
        while len([e for e in fast.events if e["type"] == "agent_completed"]) < 150:
            await fast.receive()


async def test_five_at_once_of_whom_one_leaves_and_two_fall_silent(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.protocol.PING_INTERVAL_MS", 200)
    monkeypatch.setattr("gateway.protocol.PING_TIMEOUT_MS", 300)
    settings = gateway_settings(redis_url, key_prefix)
    users = [f"user-{number}" for number in range(5)]
    async with running_gateway(settings) as gateway, contextlib.AsyncExitStack() as stack:
        tabs = [await stack.enter_async_context(tab(gateway, user)) for user in users]
        *healthy, leaving, deaf, mute = tabs
        await leaving.socket.close()
        for silent in (deaf, mute):
            silent.socket.transport.pause_reading()

        async def are_gone() -> bool:
            return len(gateway.pool) == len(healthy)

        await eventually(are_gone)
        assert gateway.metrics.closed == {"1000": 1, "4408": 2}
        assert {connection.user_id for connection in gateway.pool} == set(users[:2])
        for one in healthy:
            assert await one.is_alive()
        for silent in (deaf, mute):
            silent.socket.transport.resume_reading()
            assert (await silent.closed())[0] == CloseCode.NO_PONG


async def test_client_that_does_not_answer_pings_is_closed_with_4408(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.protocol.PING_INTERVAL_MS", 200)
    monkeypatch.setattr("gateway.protocol.PING_TIMEOUT_MS", 300)
    settings = gateway_settings(redis_url, key_prefix)
    async with running_gateway(settings) as gateway, tab(gateway) as silent, tab(gateway) as lively:
        silent.socket.transport.pause_reading()

        async def is_closed() -> bool:
            return gateway.metrics.closed["4408"] == 1

        await eventually(is_closed)
        silent.socket.transport.resume_reading()
        assert (await silent.closed())[0] == CloseCode.NO_PONG
        assert await lively.is_alive()
