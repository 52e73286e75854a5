"""What the gateway's tests share: a gateway, clients on real sockets, and a worker's side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_socket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response
from websockets.typing import Subprotocol

from gateway.app import Gateway
from relay.config import Settings, load_settings
from relay.events import EventType
from relay.keys import Keys
from relay.publisher import Publisher
from relay.run_model import AgentInfo, Claim, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import RedisLink
from relay.testing import streams
from relay.tokens import mint_token
from tests.support.acl import as_owner, as_user
from tests.support.secrets_watch import remember

SECRET = remember("the secret of the tests: it is long enough", "the secret of the tests")
DEADLINE_S = 10.0


def gateway_settings(redis_url: str, key_prefix: str, **overrides: object) -> Settings:
    return load_settings(
        env_file=None,
        **{
            "redis_url": as_user(redis_url, "gateway"),
            "key_prefix": key_prefix,
            "port": 0,
            "admin_port": 0,
            "jwt_secret": SECRET,
            **overrides,
        },
    )


SERVERS = {"direct": None, "asgi": WebSocketsSansIOProtocol}
"""WebSocket classes below the gateway: its own, and one of a server that knows nothing of it."""


def use_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gateways of this test run on one of ``SERVERS``."""
    protocol = SERVERS[name]
    if protocol is not None:
        monkeypatch.setattr("gateway.server.RelayWebSocketProtocol", protocol)


direct_only = pytest.mark.parametrize("server", ["direct"], indirect=True)
"""Leaves out the other kinds of server, for what is a property of our own protocol class."""


def token(user_id: str = "alice", ttl_s: float = 600, **claims: Any) -> str:
    return mint_token(claims.pop("secret", SECRET), user_id, ttl_s, **claims)


def bearer(user_id: str = "alice", **claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user_id, **claims)}"}


async def eventually(
    condition: Callable[[], Awaitable[Any]], deadline_s: float = DEADLINE_S
) -> Any:
    """Give the first true value of ``condition``."""
    end_s = time.monotonic() + deadline_s
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < end_s, "it did not happen in time"
        await asyncio.sleep(0.01)


class Tab:
    """A client that keeps every frame it has seen."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.frames: list[dict[str, Any]] = []
        streams.record("tab", None, lambda: self.frames)

    async def receive(self, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        async with asyncio.timeout(deadline_s):
            frame: dict[str, Any] = json.loads(await self.socket.recv())
        self.frames.append(frame)
        return frame

    async def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Give the next frame of a type, and with these values."""
        while True:
            frame = await self.receive()
            if frame["type"] == kind and fields.items() <= frame.items():
                return frame

    async def send(self, **frame: Any) -> None:
        await self.socket.send(json.dumps(frame))

    async def ask(self, **frame: Any) -> dict[str, Any]:
        """Send a request and give its answer."""
        frame.setdefault("id", uuid.uuid4().hex)
        await self.send(**frame)
        while True:
            answer = await self.receive()
            if answer.get("id") == frame["id"]:
                return answer

    async def error(self) -> dict[str, Any]:
        frame = await self.until("error")
        assert frame["message"]
        assert frame["recovery_suggestions"]
        return frame

    async def is_alive(self) -> bool:
        """Whether the next valid request works."""
        return (await self.ask(type="ping"))["type"] == "pong"

    async def closed(self, deadline_s: float = DEADLINE_S) -> tuple[int | None, str]:
        """Give code and reason of the close, once it has come."""
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    self.frames.append(json.loads(await self.socket.recv()))
        except ConnectionClosed:
            return self.socket.close_code, self.socket.close_reason or ""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if "offset" in frame]


@contextlib.asynccontextmanager
async def raw_tab(
    gateway: Gateway | str,
    *,
    query: str = "",
    headers: dict[str, str] | None = None,
    subprotocols: list[str] | None = None,
    **options: Any,
) -> AsyncIterator[Tab]:
    url = gateway if isinstance(gateway, str) else gateway.url
    # A tab reads all the time, unless a test says otherwise.
    options.setdefault("max_queue", None)
    socket = await open_socket(
        f"{url.replace('http', 'ws', 1)}/v1/ws{query}",
        additional_headers=headers or {},
        subprotocols=[Subprotocol(name) for name in subprotocols] if subprotocols else None,
        proxy=None,
        max_size=None,
        compression=None,
        **options,
    )
    try:
        yield Tab(socket)
    finally:
        await socket.close()


@contextlib.asynccontextmanager
async def tab(
    gateway: Gateway | str, user_id: str = "alice", *, query: str = "", **claims: Any
) -> AsyncIterator[Tab]:
    """A connection that has been established."""
    async with raw_tab(gateway, query=query, headers=bearer(user_id, **claims)) as opened:
        frame = await opened.receive()
        assert frame["type"] == "connection_established"
        yield opened


@contextlib.asynccontextmanager
async def upgrade_by_hand(
    url: str, authorization: str, *, query: str = "", line: bytes = b"", behind: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """An upgrade that no client library would write: another line in its head, bytes behind it."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = (
            f"GET /v1/ws{query} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Authorization: {authorization}\r\n"
        ).encode()
        writer.write(head + (line + b"\r\n" if line else b"") + b"\r\n" + behind)
        yield reader, writer
    finally:
        writer.close()


def read_problem(answer: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Give the headers and the problem document of an answer that ends its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert headers["content-type"] == "application/problem+json"
    assert headers["content-length"] == str(len(body))
    assert "close" in headers["connection"].split(", ")
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    problem = json.loads(body)
    assert status.startswith(f"HTTP/1.1 {problem['status']} ")
    assert problem["type"] == f"urn:agent-relay:problem:{problem['code']}"
    assert problem["title"]
    assert problem["detail"]
    assert problem["recovery_suggestions"]
    return headers, problem


async def refusal(gateway: Gateway, **options: Any) -> tuple[Response, dict[str, Any]]:
    """Give the answer to an upgrade that is refused, and its problem document."""
    try:
        async with raw_tab(gateway, **options):
            raise AssertionError("the upgrade was not refused")
    except InvalidStatus as error:
        response = error.response
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = json.loads(response.body or b"")
    assert problem["status"] == response.status_code
    assert problem["detail"]
    assert problem["recovery_suggestions"]
    return response, problem


def http(gateway: Gateway, user_id: str | None = "alice", **claims: Any) -> httpx.AsyncClient:
    headers = {} if user_id is None else bearer(user_id, **claims)
    return httpx.AsyncClient(base_url=gateway.url, headers=headers, trust_env=False)


class Work:
    """A worker's side of runs, through the same publisher that workers use."""

    def __init__(self, settings: Settings) -> None:
        self.keys = Keys(settings.key_prefix)
        self.link = RedisLink(as_owner(settings.redis_url))
        self.registry = RunRegistry(self.link, self.keys)
        self.publisher = Publisher(self.link, self.keys)

    async def __aenter__(self) -> Work:
        await self.registry.register_agents([AgentInfo("echo", "Says what you said.")])
        await self.publisher.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.publisher.__aexit__(*error)
        await self.link.aclose()

    async def submit(self, user_id: str = "alice", content: str = "hello") -> str:
        request = SubmitRequest(user_id, uuid.uuid4().hex, "echo", content, uuid.uuid4().hex)
        return (await self.registry.submit(request)).run_id

    async def carry_out(
        self, run_id: str, user_id: str = "alice", *, pieces: tuple[str, ...] = ("Hel", "lo")
    ) -> None:
        """Do a whole run: every kind of event that a plain agent publishes."""
        claim = await self.registry.claim(user_id, run_id, "worker", 15_000)
        assert isinstance(claim, Claim)
        stream = self.publisher.open(claim, on_refused=lambda _: None)
        await stream.publish(EventType.AGENT_STARTED, {})
        await stream.publish(EventType.AGENT_THINKING, {"thought": "hm"})
        call = {"tool_call_id": "c1", "tool_name": "look"}
        await stream.publish(EventType.TOOL_EXECUTING, {**call, "parameters": {}})
        await stream.publish(
            EventType.TOOL_COMPLETED, {**call, "status": "ok", "result": 1, "duration_ms": 1}
        )
        for piece in pieces:
            await stream.delta(piece)
        await stream.finish(
            EventType.AGENT_COMPLETED, {"result": "".join(pieces), "duration_ms": 1}
        )

    async def question(self, run_id: str, user_id: str = "alice") -> str:
        """Let a run ask its user something, and wait for the answer."""
        claim = await self.registry.claim(user_id, run_id, "worker", 15_000)
        assert isinstance(claim, Claim)
        stream = self.publisher.open(claim, on_refused=lambda _: None)
        await stream.publish(EventType.AGENT_STARTED, {})
        asked = {
            "prompt": "Which colour?",
            "kind": "text",
            "expires_at": "2099-01-01T00:00:00.000Z",
        }
        await stream.publish(EventType.INPUT_REQUESTED, {"request_id": "q1", **asked})
        await stream.flush()
        return "q1"

    async def run(self, user_id: str = "alice", **options: Any) -> str:
        run_id = await self.submit(user_id)
        await self.carry_out(run_id, user_id, **options)
        return run_id
