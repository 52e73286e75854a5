"""The connection to one gateway after the other: the shell around the client's decisions."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias
from urllib.parse import quote, urlencode, urlsplit

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.typing import Subprotocol

from relay.client.http import ask_for_ticket, problem_detail
from relay.client.state import (
    ClientState,
    Connected,
    ConnectionEnded,
    Disconnected,
    Reply,
    Retry,
    Stop,
    TokenExpiring,
    Update,
    after_close,
    after_refusal,
    backoff_ms,
)
from relay.config import is_loopback
from relay.errors import CloseCode, DecodingFailed

SUBPROTOCOL = Subprotocol("relay.v1")
OPEN_TIMEOUT_S = 10.0

_CLOSE_TIMEOUT_S = 1.0
_MAX_FRAME_BYTES = 64 * 1_048_576
_SETTLED_S = 1.0
# A gateway that missed two heartbeats and a half is gone, whatever TCP still believes.
_SILENT_HEARTBEATS = 2.5

TokenSource: TypeAlias = str | Callable[[], Awaitable[str]]


class _NoToken(Exception):
    """The application's function gave no token; ``__cause__`` is what it raised."""


class Link:
    """Keeps one connection open, at its position, until it is told to stay away.

    Attributes:
        established: Set while a connection is established.
        last_failure: Why the latest try failed, for people.
        state: The client's place.
        token_failure: What the token's function raised, where that is why the latest try failed.
    """

    def __init__(
        self,
        bases: Sequence[str],
        token: TokenSource,
        state: ClientState,
        client_id: str,
        take: Callable[[Update | Reply], Awaitable[None]],
    ) -> None:
        """Prepare it; nothing is opened yet.

        Args:
            bases: Addresses, each tried when the one before has failed.
            token: As in ``RelayClient``.
            state: The client's place, kept over all connections.
            client_id: Name of the device.
            take: Gets everything that arrives, in order; the socket is not read meanwhile.
        """
        self.established = asyncio.Event()
        self.last_failure = ""
        self.token_failure: BaseException | None = None
        self._bases = bases
        self._token = token
        self.state = state
        self._client_id = client_id
        self._take = take
        self._socket: ClientConnection | None = None
        self._failures = 0

    async def run(self) -> ConnectionEnded:
        """Connect again and again; return what ended it for good."""
        turn = 0
        while True:
            step, why = await self._connect_once(self._bases[turn % len(self._bases)])
            if isinstance(step, Stop):
                return step.error
            self.last_failure = why
            self._failures += 1
            turn += 1
            await self._take(Disconnected(why, step.delay_ms))
            await asyncio.sleep(step.delay_ms / 1_000)

    async def send(self, frame: bytes) -> None:
        """Send a frame, if a connection is established; it may still be lost with that."""
        if self.established.is_set() and self._socket is not None:
            with contextlib.suppress(ConnectionClosed):
                await self._socket.send(frame, text=True)

    def drop(self) -> None:
        """Break the connection without a closing handshake, as a lost network does."""
        if self._socket is not None:
            self._socket.transport.abort()

    async def _connect_once(self, base: str) -> tuple[Retry | Stop, str]:
        chance = random.random()  # noqa: S311 (spreads clients, protects nothing)
        self.token_failure = None
        try:
            token = await self._fresh_token()
        except _NoToken as failed:
            return self._after_no_token(failed, chance)
        self.state.opening()
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
                if self.state.heartbeat_ms is not None:
                    silence_s = max(1.0, self.state.heartbeat_ms / 1_000 * _SILENT_HEARTBEATS)
                async with asyncio.timeout(silence_s):
                    frame = await socket.recv()
                for item in self.state.receive(frame):
                    if isinstance(item, Connected):
                        self.established.set()
                    await self._take(item)
                    if isinstance(item, TokenExpiring):
                        await self._refresh_token()
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else None
            reason = closed.rcvd.reason if closed.rcvd else "the connection broke"
            self._judge(is_well=code == CloseCode.DRAIN or clock() - began > _SETTLED_S)
            step = after_close(
                code,
                reason,
                failures=self._failures,
                asked_ms=self.state.reconnect_after_ms,
                chance=chance,
                # As after a sleep in which the token expired. Whoever is out is refused with 401.
                renews_token=callable(self._token),
            )
            return step, reason or f"closed with {code}"
        except TimeoutError:
            self._judge(is_well=clock() - began > _SETTLED_S)
            return Retry(backoff_ms(self._failures, chance)), "the gateway fell silent"
        except asyncio.CancelledError:
            # Leaving is no failure: without this, websockets would close with 1011.
            await socket.close()
            raise
        except _NoToken as failed:
            # As at a reconnect: this connection would end with its token, and for good.
            self._judge(is_well=clock() - began > _SETTLED_S)
            return self._after_no_token(failed, chance)
        except DecodingFailed as error:
            return Stop(ConnectionEnded(f"Not a relay of this version: {error}.")), str(error)
        finally:
            self.established.clear()
            self._socket = None

    def _judge(self, *, is_well: bool) -> None:
        # Only a connection that lasted, or that was handed over, proves that things are well: a
        # gateway that accepts and closes at once must not be called without a growing pause.
        if is_well:
            self._failures = 0

    async def _refresh_token(self) -> None:
        if callable(self._token):
            token = await self._fresh_token()
            fresh = {"type": "refresh_token", "id": uuid.uuid4().hex, "token": token}
            await self.send(orjson.dumps(fresh))

    async def _fresh_token(self) -> str:
        if isinstance(self._token, str):
            return self._token
        try:
            return await self._token()
        except Exception as error:
            # Whatever it is, even a TimeoutError: it must not pass for the connection's own.
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise _NoToken(f"the token function failed: {said}") from error

    def _after_no_token(self, failed: _NoToken, chance: float) -> tuple[Retry | Stop, str]:
        error = failed.__cause__
        if isinstance(error, ConnectionEnded):
            return Stop(error), str(error)
        self.token_failure = error
        return Retry(backoff_ms(self._failures, chance)), str(failed)

    async def _ask_why(self, base: str, token: str, chance: float) -> Retry | Stop:
        """Ask over plain HTTP why a WebSocket could not be opened.

        A proxy may have swallowed the answer to the upgrade, as browsers always do.
        """
        answer = await asyncio.to_thread(ask_for_ticket, base, self._query(), token)
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
        return "ws" + base.removeprefix("http") + f"/v1/ws?{self._query()}"

    def _query(self) -> str:
        return urlencode({"since": self.state.since, "client_id": self._client_id}, quote_via=quote)
