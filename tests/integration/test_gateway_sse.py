"""The event stream: the same frames as on a WebSocket, resumable by ``Last-Event-ID``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket as sockets
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.app import Gateway, running_gateway
from relay.testing import streams
from tests.integration.gateway_support import (
    DEADLINE_S,
    Work,
    bearer,
    eventually,
    gateway_settings,
    tab,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(redis_url, key_prefix, heartbeat_ms=1_000)
    async with running_gateway(settings) as running:
        yield running


@pytest.fixture
async def work(gateway: Gateway) -> AsyncIterator[Work]:
    async with Work(gateway.settings) as running:
        yield running


class Stream:
    """A reader of one event stream, block by block."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.blocks: list[dict[str, Any]] = []
        streams.record("stream", None, lambda: [block["frame"] for block in self.blocks])

    async def receive(self) -> dict[str, Any]:
        fields: dict[str, str] = {}
        async with asyncio.timeout(DEADLINE_S):
            while line := await anext(self._lines):
                name, _, value = line.partition(": ")
                fields[name] = value
        block = {"event": fields.get("event"), "id": fields.get("id")}
        block["frame"] = json.loads(fields["data"])
        self.blocks.append(block)
        return block

    async def until(self, kind: str) -> dict[str, Any]:
        while True:
            block = await self.receive()
            if block["frame"].get("type") == kind:
                return block

    async def until_closed(self) -> dict[str, Any]:
        while True:
            block = await self.receive()
            if block["event"] == "close":
                return block["frame"]


@contextlib.asynccontextmanager
async def listen(
    gateway: Gateway, user_id: str = "alice", *, headers: dict[str, str] | None = None, **query: str
) -> AsyncIterator[Stream]:
    async with (
        httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=DEADLINE_S) as client,
        client.stream(
            "GET", "/v1/events", headers={**bearer(user_id), **(headers or {})}, params=query
        ) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


async def test_a_stream_carries_what_a_websocket_carries(gateway: Gateway, work: Work) -> None:
    async with tab(gateway) as opened, listen(gateway) as stream:
        first = await stream.receive()
        assert first["frame"]["type"] == "connection_established"
        assert first["id"] == first["frame"]["position"]
        await work.run()
        await opened.until("agent_completed")
        await stream.until("agent_completed")
        frames = [block["frame"] for block in stream.blocks if "offset" in block["frame"]]
        assert frames == opened.events
        for block in stream.blocks:
            if "offset" in block["frame"]:
                assert block["id"].endswith(f":{block['frame']['offset']}")


async def test_last_event_id_resumes_without_loss_or_repetition(
    gateway: Gateway, work: Work
) -> None:
    async with listen(gateway) as stream:
        await stream.receive()
        await work.run()
        seen = await stream.until("agent_thinking")
    await work.run()
    async with listen(gateway, headers={"Last-Event-ID": seen["id"]}) as stream:
        established = await stream.receive()
        assert established["frame"]["recovered"] is True
        await stream.until("agent_completed")
        await stream.until("agent_completed")
        offsets = [
            block["frame"]["offset"] for block in stream.blocks if "offset" in block["frame"]
        ]
        assert offsets[0] == seen["frame"]["offset"] + 1
        assert offsets == sorted(set(offsets))


async def test_heartbeats_carry_the_position(gateway: Gateway, work: Work) -> None:
    async with listen(gateway, since="now") as stream:
        await stream.receive()
        await work.run()
        done = await stream.until("agent_completed")
        heartbeat = await stream.until("heartbeat")
        assert heartbeat["id"] == heartbeat["frame"]["position"] == done["id"]


async def test_another_users_events_do_not_come(gateway: Gateway, work: Work) -> None:
    async with listen(gateway, "bob") as stream:
        await stream.receive()
        await work.run("alice")
        await work.run("bob")
        await stream.until("agent_completed")
        users = {block["frame"]["user_id"] for block in stream.blocks}
        assert users == {"bob"}


async def test_large_events_come_in_parts_with_an_id_after_them(
    gateway: Gateway, work: Work
) -> None:
    async with listen(gateway) as stream:
        await stream.receive()
        run_id = await work.submit()
        text = "größer " * 100_000
        await work.carry_out(run_id, pieces=(text,))
        parts: list[str] = []
        while True:
            frame = (await stream.until("event_part"))["frame"]
            assert frame["index"] == len(parts)
            parts.append(frame["text"])
            if len(parts) == frame["total"]:
                event = json.loads("".join(parts))
                if event["type"] == "agent_completed":
                    break
                parts = []
        assert event["data"]["result"] == text
        heartbeat = await stream.until("heartbeat")
        assert heartbeat["id"].endswith(f":{event['offset']}")


async def test_each_event_is_counted_once_live_and_from_history(
    gateway: Gateway, work: Work
) -> None:
    async with listen(gateway) as stream:
        await stream.receive()
        await work.run()
        last = (await stream.until("agent_completed"))["id"]
        live = [block for block in stream.blocks if "offset" in block["frame"]]
        assert gateway.metrics.delivered_events == len(live) > 5
    async with listen(gateway, since="0") as stream:
        while (await stream.receive())["id"] != last:
            pass
        late = [block for block in stream.blocks if "offset" in block["frame"]]
        assert gateway.metrics.delivered_events == len(live) + len(late)


async def test_a_stream_without_a_token_is_refused(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        response = await client.get("/v1/events")
    assert response.status_code == 401
    assert response.json()["code"] == "invalid_token"


async def test_a_wrong_position_is_refused_with_guidance(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        response = await client.get("/v1/events", params={"since": "nonsense"}, headers=bearer())
    assert response.status_code == 422
    assert "epoch:offset" in response.json()["detail"]


async def test_a_listener_that_leaves_leaves_nothing_behind(gateway: Gateway) -> None:
    async with listen(gateway) as stream:
        await stream.receive()
        assert len(gateway.pool) == 1

    async def is_empty() -> bool:
        return len(gateway.pool) == 0

    await eventually(is_empty)


async def test_draining_tells_listeners_to_come_back(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(redis_url, key_prefix)
    async with running_gateway(settings) as gateway, listen(gateway) as stream:
        await stream.receive()
        stopping = asyncio.create_task(gateway.stop())
        await stream.until("reconnect")
        assert (await stream.until_closed())["code"] == 1012
        await stopping


async def test_stream_that_nobody_reads_leaves_no_socket(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.outbox.NO_PROGRESS_LIMIT_MS", 400)
    monkeypatch.setattr("gateway.direct.FLUSH_S", 0.4)
    settings = gateway_settings(redis_url, key_prefix, heartbeat_ms=200)
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4_096)
    raw.setblocking(False)
    async with running_gateway(settings) as gateway, Work(settings) as work:
        server = gateway._public
        assert server is not None
        loop = asyncio.get_running_loop()
        host, port = gateway.url.removeprefix("http://").split(":")
        await loop.sock_connect(raw, (host, int(port)))
        with raw:
            head = f"GET /v1/events HTTP/1.1\r\nHost: {host}\r\nAuthorization: "
            await loop.sock_sendall(raw, f"{head}{bearer()['Authorization']}\r\n\r\n".encode())
            for _ in range(80):
                await work.run(pieces=("x" * 20_000,))

            async def is_closed() -> bool:
                return gateway.metrics.closed["4410"] == 1

            async def is_gone() -> bool:
                return not server.server_state.connections and not server.server_state.tasks

            await eventually(is_closed)
            await eventually(is_gone)
