"""The Python client over real sockets: gateways that drain, break, refuse, fall silent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import InvalidURI

from agent_worker import Run, Worker
from gateway.app import Gateway, running_gateway
from relay.client import (
    Connected,
    ConnectionEnded,
    Disconnected,
    Event,
    RelayClient,
    RequestFailed,
    TokenExpiring,
    Update,
)
from relay.errors import DecodingFailed
from relay.revocations import revocation_of
from tests.integration.gateway_support import gateway_settings, tab, token
from tests.support.acl import settings_as

DEADLINE_S = 15.0


def make_worker() -> Worker:
    worker = Worker(name="test")

    @worker.agent("count")
    async def count(run: Run) -> str:
        for number in range(int(run.request.content)):
            await run.thinking(f"{number}")
            await run.delta(f"{number} ")
            await asyncio.sleep(0.01)
        return run.text

    @worker.agent("wait")
    async def wait(run: Run) -> str:
        await run.thinking("waiting")
        await asyncio.Event().wait()
        return ""

    return worker


@asynccontextmanager
async def stack(
    redis_url: str, key_prefix: str, gateways: int = 1, **overrides: object
) -> AsyncIterator[list[Gateway]]:
    """Run gateways and a worker inside the test."""
    settings = gateway_settings(redis_url, key_prefix, **overrides)
    async with (
        make_worker().running(settings_as(settings, "worker")),
        running_gateway(settings) as first,
    ):
        if gateways == 1:
            yield [first]
        else:
            async with running_gateway(settings) as second:
                yield [first, second]


async def until(client: RelayClient, run_id: str) -> list[Event]:
    """Read a run to its end; fail on a hole in its events."""
    events = []
    async with asyncio.timeout(DEADLINE_S):
        async for event in client:
            if event.run_id == run_id:
                events.append(event)
                if event.is_terminal:
                    break
    return events


async def update_of(client: RelayClient, kind: type[Update]) -> Update:
    async with asyncio.timeout(DEADLINE_S):
        async for update in client.updates():
            if isinstance(update, kind):
                return update
    raise AssertionError("the client ended")


def assert_whole(events: list[Event]) -> None:
    offsets = [event.offset for event in events]
    assert offsets == sorted(set(offsets))
    seqs = [event.seq for event in events if event.seq is not None]
    assert seqs == list(range(1, len(seqs) + 1))


def joined_text(events: list[Event]) -> str:
    texts: dict[str, str] = {}
    for event in events:
        if event.type == "text_delta":
            known = texts.get(event.data["message_id"], "")
            position = event.data["position"]
            assert position <= len(known), "a hole in the text"
            texts[event.data["message_id"]] = known[:position] + event.data["text"]
    return "".join(texts.values())


async def test_run_arrives_whole_and_in_order(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(gateway.url, token()) as client,
    ):
        accepted = await client.send_message("3", thread_id="t", agent="count", message_id="m1")
        assert not accepted.duplicate
        events = await until(client, accepted.run_id)
        assert_whole(events)
        assert events[0].type == "agent_queued"
        assert events[-1].data["result"] == "0 1 2 "
        assert joined_text(events) == "0 1 2 "
        again = await client.send_message("3", thread_id="t", agent="count", message_id="m1")
        assert again.run_id == accepted.run_id
        assert again.duplicate
        assert client.position is not None
        assert (await client.ping()).partition(":")[0] == client.position.partition(":")[0]


async def test_broken_connections_lose_and_double_nothing(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(gateway.url, token()) as client,
    ):
        accepted = await client.send_message("60", thread_id="t", agent="count")
        events: list[Event] = []
        lost = 0
        async with asyncio.timeout(DEADLINE_S):
            async for update in client.updates():
                if isinstance(update, Event):
                    events.append(update)
                    if update.is_terminal:
                        break
                    if update.seq in (10, 25, 40):
                        assert client._link._socket is not None
                        client._link._socket.transport.abort()
                lost += isinstance(update, Disconnected)
        assert lost >= 1
        assert {event.run_id for event in events} == {accepted.run_id}
        assert_whole(events)
        assert joined_text(events) == events[-1].data["result"]


@pytest.mark.usefixtures("server")
async def test_drained_gateway_hands_over_to_the_next(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix, gateways=2) as [first, second],
        RelayClient([first.url, second.url], token()) as client,
    ):
        accepted = await client.send_message("40", thread_id="t", agent="count")
        await update_of(client, Event)
        stopping = asyncio.create_task(first.stop())
        gone = await update_of(client, Disconnected)
        assert isinstance(gone, Disconnected)
        back = await update_of(client, Connected)
        assert isinstance(back, Connected)
        assert back.node == second.node.node_id
        events = await until(client, accepted.run_id)
        assert events[-1].type == "agent_completed"
        await stopping


async def test_request_made_while_away_is_sent_after_the_return(
    redis_url: str, key_prefix: str
) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(gateway.url, token()) as client,
    ):
        assert client._link._socket is not None
        client._link._socket.transport.abort()
        accepted = await client.send_message("1", thread_id="t", agent="count")
        assert_whole(await until(client, accepted.run_id))


async def test_cancel_ends_the_run(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(gateway.url, token()) as client,
    ):
        accepted = await client.send_message("x", thread_id="t", agent="wait")
        async with asyncio.timeout(DEADLINE_S):
            async for event in client:
                if event.type == "agent_thinking":
                    break
        await client.cancel(accepted.run_id, "enough")
        events = await until(client, accepted.run_id)
        assert events[-1].type == "agent_cancelled"
        assert await client.cancel(accepted.run_id, "enough") == "cancelled"
        done = await client.send_message("1", thread_id="t", agent="count")
        await until(client, done.run_id)
        with pytest.raises(RequestFailed) as caught:
            await client.cancel(done.run_id)
        assert caught.value.code == "run_ended"


async def test_refused_request_says_why_and_the_next_one_works(
    redis_url: str, key_prefix: str
) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(gateway.url, token()) as client,
    ):
        with pytest.raises(RequestFailed) as caught:
            await client.send_message("x", thread_id="t", agent="nobody")
        assert caught.value.code == "unknown_agent"
        assert caught.value.recovery_suggestions
        await client.ping()


# --- Refused and lost ---


@pytest.mark.parametrize("made", ["rubbish", token(ttl_s=-100), token(secret="another" * 8)])
async def test_token_that_is_not_valid_ends_at_once(
    redis_url: str, key_prefix: str, made: str
) -> None:
    async with stack(redis_url, key_prefix) as [gateway]:
        with pytest.raises(ConnectionEnded, match="did not accept the token") as caught:
            await RelayClient(gateway.url, made).__aenter__()
        assert caught.value.code == 401
        assert made not in str(caught.value)


async def test_address_of_something_else_ends_at_once() -> None:
    async with http_server(b"404 Not Found", b"") as url:
        with pytest.raises(ConnectionEnded, match="No relay at this address"):
            await RelayClient(url, token()).__aenter__()


async def test_nobody_at_the_address_is_told_in_time() -> None:
    client = RelayClient("http://127.0.0.1:1", token(), connect_timeout_s=0.5)
    with pytest.raises(ConnectionEnded, match="No gateway could be reached"):
        await client.__aenter__()


async def test_gateway_that_is_gone_is_passed_over(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(["http://127.0.0.1:1", gateway.url], token()) as client,
    ):
        assert client.is_connected


async def test_expired_token_ends_the_iteration(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix) as [gateway],
        RelayClient(gateway.url, token(ttl_s=1)) as client,
    ):
        with pytest.raises(ConnectionEnded, match="expired") as caught:
            await until(client, "no run")
        assert caught.value.code == 4401
        with pytest.raises(ConnectionEnded):
            await update_of(client, Connected)


async def test_fresh_token_is_given_before_the_old_one_expires(
    redis_url: str, key_prefix: str
) -> None:
    made: list[str] = []

    async def fresh() -> str:
        made.append(token(ttl_s=600 if made else 2))
        return made[-1]

    async with stack(redis_url, key_prefix) as [gateway], RelayClient(gateway.url, fresh) as client:
        first = client.connection
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.5):
                await update_of(client, Disconnected)
        assert len(made) == 2
        assert client.connection is first
        await client.ping()


async def test_limit_on_connections_is_named(redis_url: str, key_prefix: str) -> None:
    async with (
        stack(redis_url, key_prefix, max_connections_per_user=1) as [gateway],
        RelayClient(gateway.url, token()),
    ):
        with pytest.raises(ConnectionEnded, match="HTTP 429"):
            await RelayClient(gateway.url, token(), connect_timeout_s=0.5).__aenter__()


# --- Gateways that misbehave ---


@asynccontextmanager
async def server_of(*connections: list[dict[str, Any]]) -> AsyncIterator[tuple[str, list[str]]]:
    """Serve WebSockets that send these frames and then nothing; give address and paths asked."""
    asked: list[str] = []

    async def handle(socket: ServerConnection) -> None:
        assert socket.request is not None
        asked.append(socket.request.path)
        for frame in connections[min(len(asked), len(connections)) - 1]:
            await socket.send(json.dumps(frame))
        await socket.wait_closed()

    async with serve_websocket(handle, "127.0.0.1", 0, subprotocols=["relay.v1"]) as server:  # type: ignore[list-item]
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", asked


ESTABLISHED = {
    "type": "connection_established",
    "connection_id": "c",
    "user_id": "alice",
    "node": "n",
    "position": "e:4",
    "recovered": True,
    "runs": [],
    "heartbeat_ms": 100,
}


async def test_silent_gateway_is_left_and_the_position_kept() -> None:
    event = {"type": "custom", "offset": 7, "run_id": "r", "seq": 3, "data": {}}
    async with (
        server_of([ESTABLISHED, event], [ESTABLISHED | {"position": "e:7"}]) as (url, asked),
        RelayClient(url, token(), client_id="me") as client,
    ):
        gone = await update_of(client, Disconnected)
        assert isinstance(gone, Disconnected)
        assert "silent" in gone.reason
        assert gone.retry_in_ms <= 300
        await update_of(client, Connected)
    assert asked[0] == "/v1/ws?since=active&client_id=me"
    assert asked[1] == "/v1/ws?since=e%3A7&client_id=me"


async def test_frame_that_is_no_frame_ends_the_client() -> None:
    async with (
        server_of([ESTABLISHED, {"no": "type"}]) as (url, _),
        RelayClient(url, token()) as client,
    ):
        with pytest.raises(ConnectionEnded, match="without a type"):
            await update_of(client, Disconnected)


@asynccontextmanager
async def http_server(status: bytes, body: bytes, *, only_for: bytes = b"") -> AsyncIterator[str]:
    """Answer each request like this; close without an answer where it is not ``only_for``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(only_for):
            length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            writer.write(b"HTTP/1.1 " + status + b"\r\n" + length + body)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_swallowed_refusal_is_asked_for() -> None:
    """A proxy that drops the answer to the upgrade hides a 401, as browsers do."""
    body = b'{"detail": "The token has expired."}'
    async with http_server(b"401 Unauthorized", body, only_for=b"POST /v1/tickets") as url:
        with pytest.raises(ConnectionEnded, match=r"The token has expired\.") as caught:
            await RelayClient(url, token()).__aenter__()
    assert caught.value.code == 401


@asynccontextmanager
async def losing_the_first_upgrade(gateway: Gateway) -> AsyncIterator[str]:
    """Pass requests on to a gateway, except for the first upgrade: that gets no answer."""
    host, port = gateway.url.removeprefix("http://").split(":")
    upgrades = 0

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal upgrades
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/ws"):
            upgrades += 1
            if upgrades == 1:
                writer.close()
                return
        from_gateway, to_gateway = await asyncio.open_connection(host, int(port))
        to_gateway.write(head)
        await asyncio.gather(copy(reader, to_gateway), copy(from_gateway, writer))

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_device_whose_upgrade_was_lost_does_not_wait_for_the_place_that_it_holds(
    redis_url: str, key_prefix: str
) -> None:
    async with (
        stack(redis_url, key_prefix, max_connections_per_user=1) as [gateway],
        tab(gateway, query="?client_id=my%20phone") as old,
        losing_the_first_upgrade(gateway) as url,
        RelayClient(url, token(), client_id="my phone") as client,
    ):
        lost = await update_of(client, Disconnected)
        assert isinstance(lost, Disconnected)
        assert lost.retry_in_ms <= 300
        assert (await old.closed())[0] == 4429


async def test_question_why_an_upgrade_failed_is_that_of_the_upgrade() -> None:
    """A wrong ``since`` is told as such, and not tried for ever."""
    body = b'{"detail": "since is active, now, 0 or a position."}'
    wrong = b"POST /v1/tickets?since=yesterday&client_id=me "
    async with http_server(b"422 Unprocessable Content", body, only_for=wrong) as url:
        with pytest.raises(ConnectionEnded, match="since is active") as caught:
            await RelayClient(url, token(), since="yesterday", client_id="me").__aenter__()
    assert caught.value.code == 422


# --- A function that gives the token ---

EXPIRING = {"type": "token_expiring", "expires_at": "2099-01-01T00:00:00.000Z"}
AWAY = "the issuer is away"


class Issuer:
    """A token function that fails at these calls, counted from 1."""

    def __init__(self, error: BaseException, *failing: int) -> None:
        self.calls = 0
        self._error = error
        self._failing = failing

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls in self._failing:
            raise self._error
        return token()


@pytest.mark.parametrize("moment", ["reconnect", "expiring"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(AWAY),
        # These have a meaning of their own where a connection fails.
        ConnectionRefusedError(AWAY),
        TimeoutError(AWAY),
        InvalidURI("x", AWAY),
        DecodingFailed(AWAY),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_token_function_that_fails_is_asked_again(
    error: Exception, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)  # by chance, no try waits
    issuer = Issuer(error, 2, 3)
    first = [ESTABLISHED, EXPIRING] if moment == "expiring" else [ESTABLISHED]
    async with (
        server_of(first, [ESTABLISHED]) as (url, asked),
        RelayClient(url, issuer) as client,
    ):
        await update_of(client, Connected)
        if moment == "reconnect":
            client._link.drop()
            await update_of(client, Disconnected)
        for _ in range(2):
            gone = await update_of(client, Disconnected)
            assert isinstance(gone, Disconnected)
            assert gone.reason == client.last_failure
            assert type(error).__name__ in gone.reason
            assert AWAY in gone.reason
        await update_of(client, Connected)
    assert issuer.calls == 4
    assert len(asked) == 2


async def test_token_function_that_fails_at_first_delays_the_first_connection() -> None:
    issuer = Issuer(RuntimeError(AWAY), 1)
    async with server_of([ESTABLISHED]) as (url, _), RelayClient(url, issuer) as client:
        assert client.is_connected
    assert issuer.calls == 2


async def test_token_function_that_always_fails_is_named_when_the_time_is_up() -> None:
    error = RuntimeError(AWAY)
    issuer = Issuer(error, *range(1, 1_000))
    async with server_of([ESTABLISHED]) as (url, asked):
        with pytest.raises(ConnectionEnded, match=f"RuntimeError: {AWAY}") as caught:
            await RelayClient(url, issuer, connect_timeout_s=0.3).__aenter__()
    assert caught.value.__cause__ is error
    assert issuer.calls >= 1
    assert asked == []


@pytest.mark.parametrize("moment", ["first", "reconnect", "expiring"])
async def test_token_function_ends_the_client_where_it_says_so(moment: str) -> None:
    ended = ConnectionEnded("Alice has signed out.")
    issuer = Issuer(ended, 1 if moment == "first" else 2)
    first = [ESTABLISHED, EXPIRING] if moment == "expiring" else [ESTABLISHED]
    async with server_of(first) as (url, asked):
        client = RelayClient(url, issuer)
        if moment == "first":
            with pytest.raises(ConnectionEnded) as caught:
                await client.__aenter__()
        else:
            async with client:
                await update_of(client, Connected)
                if moment == "reconnect":
                    client._link.drop()
                with pytest.raises(ConnectionEnded) as caught:
                    await until(client, "no run")
    assert caught.value is ended
    assert len(asked) == (0 if moment == "first" else 1)


async def revoke(gateway: Gateway, made: str) -> None:
    jti = jwt.decode(made, options={"verify_signature": False})["jti"]
    await gateway._revocation_log.add(revocation_of("token", jti, time.time_ns() // 1_000_000))


async def test_client_whose_token_was_revoked_comes_back_with_another_one(
    redis_url: str, key_prefix: str
) -> None:
    made: list[str] = []

    async def fresh() -> str:
        made.append(token())
        return made[-1]

    async with stack(redis_url, key_prefix) as [gateway], RelayClient(gateway.url, fresh) as client:
        await revoke(gateway, made[0])
        gone = await update_of(client, Disconnected)
        assert isinstance(gone, Disconnected)
        assert "revoked" in gone.reason
        await update_of(client, Connected)
        assert len(made) == 2


async def test_client_whose_new_token_is_the_revoked_one_ends(
    redis_url: str, key_prefix: str
) -> None:
    same = token()

    async def fresh() -> str:
        return same

    async with stack(redis_url, key_prefix) as [gateway], RelayClient(gateway.url, fresh) as client:
        await revoke(gateway, same)
        with pytest.raises(ConnectionEnded, match="did not accept the token") as caught:
            await until(client, "no run")
        assert caught.value.code == 401


@pytest.mark.parametrize("moment", ["first", "expiring"])
async def test_closed_client_cancels_its_token_function(moment: str) -> None:
    is_asked, is_cancelled = asyncio.Event(), asyncio.Event()

    async def waits() -> str:
        if moment == "expiring" and not is_asked.is_set():
            is_asked.set()
            return token()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            is_cancelled.set()
            raise
        return ""

    async with server_of([ESTABLISHED, EXPIRING]) as (url, _):
        client = RelayClient(url, waits, connect_timeout_s=0.3)
        if moment == "first":
            with pytest.raises(ConnectionEnded):
                await client.__aenter__()
        else:
            async with client:
                await update_of(client, TokenExpiring)
    assert is_cancelled.is_set()
