"""The connection that stays: requests and their answers, reconnects, the socket."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias
from urllib.parse import quote, urlencode, urlsplit

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.typing import Subprotocol

from relay.client.http import ask_for_ticket, http_address, problem_detail
from relay.client.mailbox import Mailbox
from relay.client.state import (
    ClientState,
    Connected,
    ConnectionEnded,
    Disconnected,
    Event,
    EventsMissing,
    Fields,
    Reply,
    Retry,
    SequenceHole,
    Stop,
    TokenExpiring,
    Update,
    after_close,
    after_refusal,
    backoff_ms,
)
from relay.config import is_loopback
from relay.errors import CloseCode, DecodingFailed, RelayError

SUBPROTOCOL = Subprotocol("relay.v1")
OPEN_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0

_CLOSE_TIMEOUT_S = 1.0
_MAX_FRAME_BYTES = 64 * 1_048_576
_SETTLED_S = 2.0
# A gateway that missed two heartbeats and a half is gone, whatever TCP still believes.
_SILENT_HEARTBEATS = 2.5

TokenSource: TypeAlias = str | Callable[[], Awaitable[str]]


class RequestFailed(RelayError):
    """The gateway refused a request, or did not answer it in time.

    Attributes:
        code: Error code of the wire; ``no_answer`` where none came.
        retryable: Whether the same request may succeed later.
        recovery_suggestions: What can be done, most useful first.
    """

    def __init__(
        self, code: str, message: str, *, retryable: bool, recovery_suggestions: Sequence[str] = ()
    ) -> None:
        self.code = code
        self.retryable = retryable
        self.recovery_suggestions = tuple(recovery_suggestions)
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class RunAccepted:
    """A message was accepted: its run exists and will end in one terminal event.

    Attributes:
        duplicate: The same message id had been accepted before; this is that run.
    """

    run_id: str
    duplicate: bool


@dataclass(slots=True)
class _PendingRequest:
    frame: bytes
    answer: asyncio.Future[Fields]


class RelayClient:
    """A user's connection that stays: it resumes at its position after every loss.

    An async context manager; entering returns when the first connection is established.
    Iterate over it for events, or over ``updates()`` for everything. Reading the socket pauses
    while about a thousand updates wait to be taken, and requests are not answered then either:
    a client that sends must also iterate.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        token: TokenSource,
        *,
        since: str = "active",
        client_id: str | None = None,
        connect_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """Prepare a client; nothing is opened yet.

        Args:
            url: The relay's address (http, https, ws or wss), or several gateways'; the next one
                is tried when one fails.
            token: The user's token, or a function that gets a fresh one: it is asked before
                every connection and when the gateway says that the token is about to expire.
            since: Where to begin: ``active``, ``now``, ``0`` or a position.
            client_id: Name of this device; a reconnect takes over its place.
            connect_timeout_s: How long entering tries to establish the first connection.

        Raises:
            ConnectionEnded: ``url`` is not an address.
        """
        urls = [url] if isinstance(url, str) else list(url)
        self._bases = [http_address(each) for each in urls]
        self._token = token
        self._client_id = client_id or uuid.uuid4().hex
        self._connect_timeout_s = connect_timeout_s
        self._state = ClientState(since)
        self._failures = 0
        self._turn = 0
        self._requests: dict[str, _PendingRequest] = {}
        self._mailbox = Mailbox()
        self._socket: ClientConnection | None = None
        self._established = asyncio.Event()
        self._latest: Connected | None = None
        self._last_failure = ""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="relay-client")
        try:
            await self._wait_until_established(self._task)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def _wait_until_established(self, running: asyncio.Task[None]) -> None:
        established = asyncio.create_task(self._established.wait())
        try:
            await asyncio.wait(
                {running, established},
                timeout=self._connect_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            established.cancel()
        if self._mailbox.error is not None:
            raise self._mailbox.error
        if self._latest is None:
            raise ConnectionEnded(
                f"No gateway could be reached at {' or '.join(self._bases)} within "
                f"{self._connect_timeout_s:.0f} s ({self._last_failure or 'no answer'})."
            )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection for good. Requests that wait for an answer fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    @property
    def position(self) -> str | None:
        """Where the next event follows: give it as ``since`` to resume later."""
        return self._state.position

    @property
    def connection(self) -> Connected | None:
        """What the gateway said when the latest connection was established."""
        return self._latest

    @property
    def is_connected(self) -> bool:
        """Whether a connection is established right now."""
        return self._established.is_set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Give the user's events, in order, each once.

        Raises:
            EventsMissing: A run's ``seq`` has a hole.
            ConnectionEnded: The gateway does not want this client back as it is.
        """
        async for update in self.updates():
            if isinstance(update, Event):
                yield update
            elif isinstance(update, SequenceHole):
                raise EventsMissing(
                    f"run {update.run_id}: event {update.seen} came where {update.expected} "
                    "was expected"
                )

    async def updates(self) -> AsyncIterator[Update]:
        """Give everything that happens: events, resets, lost and new connections.

        Raises:
            ConnectionEnded: The gateway does not want this client back as it is.
        """
        if self._task is None:
            raise RuntimeError("enter the client first: async with RelayClient(...)")
        while (update := await self._mailbox.take()) is not None:
            yield update

    async def send_message(
        self,
        content: str,
        *,
        thread_id: str,
        agent: str | None = None,
        metadata: Fields | None = None,
        message_id: str | None = None,
    ) -> RunAccepted:
        """Ask an agent. Safe over a lost connection: the same message makes one run.

        Raises:
            RequestFailed: The gateway refused it, or no answer came in time.
        """
        fields: dict[str, Any] = {"thread_id": thread_id, "content": content}
        if agent is not None:
            fields["agent"] = agent
        if metadata is not None:
            fields["metadata"] = metadata
        answer = await self._request("user_message", fields, message_id)
        return RunAccepted(answer["run_id"], bool(answer.get("duplicate")))

    async def cancel(self, run_id: str, reason: str | None = None) -> str:
        """Ask for a run's end; give its status.

        Raises:
            RequestFailed: There is no such run, it has ended, or no answer came in time.
        """
        fields = {"run_id": run_id} | ({"reason": reason} if reason else {})
        answer = await self._request("cancel", fields)
        return str(answer.get("status", ""))

    async def respond(self, run_id: str, request_id: str, value: object) -> None:
        """Answer an input request.

        Raises:
            RequestFailed: It is not open any more, or no answer came in time.
        """
        fields = {"run_id": run_id, "request_id": request_id, "value": value}
        await self._request("input_response", fields)

    async def deny(self, run_id: str, request_id: str) -> None:
        """Decline an input request.

        Raises:
            RequestFailed: It is not open any more, or no answer came in time.
        """
        fields = {"run_id": run_id, "request_id": request_id, "denied": True}
        await self._request("input_response", fields)

    async def ping(self) -> str:
        """Make the way to the gateway and back; give the connection's position.

        Raises:
            RequestFailed: No answer came in time.
        """
        answer = await self._request("ping", {})
        return str(answer["position"])

    async def _request(self, kind: str, fields: Fields, request_id: str | None = None) -> Fields:
        request_id = request_id or uuid.uuid4().hex
        frame = orjson.dumps({"type": kind, "id": request_id, **fields})
        future: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._requests[request_id] = _PendingRequest(frame, future)
        try:
            # Before the connection is established, and after it was lost, _serve sends it.
            if self._established.is_set() and self._socket is not None:
                with contextlib.suppress(ConnectionClosed):
                    await self._socket.send(frame, text=True)
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                answer = await future
        except TimeoutError:
            raise RequestFailed(
                "no_answer",
                f"The gateway did not answer a {kind} within {REQUEST_TIMEOUT_S:.0f} s.",
                retryable=True,
            ) from None
        finally:
            self._requests.pop(request_id, None)
        if answer["type"] == "error":
            raise RequestFailed(
                answer["code"],
                answer.get("message", answer["code"]),
                retryable=bool(answer.get("retryable")),
                recovery_suggestions=answer.get("recovery_suggestions", ()),
            )
        return answer

    async def _run(self) -> None:
        """Connect again and again, until told to stop."""
        error: Exception | None = None
        try:
            while True:
                step, why = await self._connect_once()
                if isinstance(step, Stop):
                    error = step.error
                    return
                self._last_failure = why
                self._failures += 1
                self._turn += 1
                await self._mailbox.put(Disconnected(why, step.delay_ms))
                await asyncio.sleep(step.delay_ms / 1_000)
        except Exception as failure:  # noqa: BLE001 (it is handed on)
            # Whoever iterates gets it; nobody awaits this task while the connection lives.
            error = failure
        finally:
            self._fail_requests(error or ConnectionEnded("The client was closed."))
            await self._mailbox.close(error)

    def _fail_requests(self, error: Exception) -> None:
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(error)
                # Whoever waits for it gets it; where nobody does any more, it needs no warning.
                request.answer.exception()

    async def _connect_once(self) -> tuple[Retry | Stop, str]:
        base = self._bases[self._turn % len(self._bases)]
        token = self._token if isinstance(self._token, str) else await self._token()
        self._state.opening()
        chance = random.random()  # noqa: S311 (spreads clients, protects nothing)
        try:
            async with connect(
                self._socket_address(base),
                additional_headers={"Authorization": f"Bearer {token}"},
                subprotocols=[SUBPROTOCOL],
                compression=None,
                proxy=None if is_loopback(urlsplit(base).hostname or "") else True,
                open_timeout=OPEN_TIMEOUT_S,
                close_timeout=_CLOSE_TIMEOUT_S,
                # The gateway's heartbeats are what tells the dead from the living here.
                ping_interval=None,
                max_size=_MAX_FRAME_BYTES,
            ) as socket:
                return await self._serve(socket, chance)
        except InvalidStatus as refused:
            detail = problem_detail(bytes(refused.response.body or b""))
            status = refused.response.status_code
            retry_after = refused.response.headers.get("Retry-After")
            step = after_refusal(
                status, detail, retry_after, failures=self._failures, chance=chance
            )
            return step, f"HTTP {status}: {detail}"
        except InvalidURI as error:
            return Stop(ConnectionEnded(f"{base} is not the address of a relay.")), str(error)
        except OSError as error:
            return Retry(backoff_ms(self._failures, chance)), str(error) or "no answer"
        except WebSocketException as error:
            return await self._ask_why(base, token, chance), str(error)

    async def _serve(self, socket: ClientConnection, chance: float) -> tuple[Retry | Stop, str]:
        """Read one connection until it ends."""
        self._socket = socket
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            while True:
                silence_s = OPEN_TIMEOUT_S
                if self._state.heartbeat_ms is not None:
                    silence_s = max(1.0, self._state.heartbeat_ms / 1_000 * _SILENT_HEARTBEATS)
                async with asyncio.timeout(silence_s):
                    frame = await socket.recv()
                for item in self._state.receive(frame):
                    await self._take(item, socket)
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else None
            reason = closed.rcvd.reason if closed.rcvd else "the connection broke"
            # Only a connection that lasted proves that things are well: a gateway that accepts
            # and closes at once must not be called again and again without a growing pause.
            if code == CloseCode.DRAIN or clock() - began > _SETTLED_S:
                self._failures = 0
            step = after_close(
                code,
                reason,
                failures=self._failures,
                asked_ms=self._state.reconnect_after_ms,
                chance=chance,
            )
            return step, reason or f"closed with {code}"
        except TimeoutError:
            return Retry(backoff_ms(self._failures, chance)), "the gateway fell silent"
        except asyncio.CancelledError:
            # Leaving is no failure: without this, websockets would close with 1011.
            await socket.close()
            raise
        except DecodingFailed as error:
            return Stop(ConnectionEnded(f"Not a relay of this version: {error}.")), str(error)
        finally:
            self._established.clear()
            self._socket = None

    async def _take(self, item: Update | Reply, socket: ClientConnection) -> None:
        if isinstance(item, Reply):
            request = self._requests.get(item.id)
            if request is not None and not request.answer.done():
                request.answer.set_result(item.frame)
            return
        if isinstance(item, Connected):
            self._latest = item
            self._established.set()
            # Requests are repeatable by their id: what was not answered is sent again.
            for request in list(self._requests.values()):
                await socket.send(request.frame, text=True)
        if isinstance(item, TokenExpiring) and callable(self._token):
            fresh = {"type": "refresh_token", "id": uuid.uuid4().hex, "token": await self._token()}
            await socket.send(orjson.dumps(fresh), text=True)
        await self._mailbox.put(item)

    async def _ask_why(self, base: str, token: str, chance: float) -> Retry | Stop:
        """Ask over plain HTTP why a WebSocket could not be opened.

        A proxy may have swallowed the answer to the upgrade, as browsers always do.
        """
        answer = await asyncio.to_thread(ask_for_ticket, base, token)
        if answer is None or answer.status < 400:
            return Retry(backoff_ms(self._failures, chance))
        return after_refusal(
            answer.status,
            answer.detail,
            answer.retry_after,
            failures=self._failures,
            chance=chance,
        )

    def _socket_address(self, base: str) -> str:
        query = urlencode(
            {"since": self._state.since, "client_id": self._client_id}, quote_via=quote
        )
        return "ws" + base.removeprefix("http") + f"/v1/ws?{query}"
