"""uvicorn's WebSocket protocol for the handshake, and the way out of it for what follows.

What is decided here, because it happens below ASGI: a handshake that cannot be read is refused, and
once it is done the application may take the socket over, see ``gateway.direct``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import h11
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.exceptions import (
    InvalidHandshake,
    InvalidMessage,
    InvalidUpgrade,
    SecurityError,
)
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from gateway.direct import DirectTransport, Receiver, TickWriter
from gateway.http.problems import last_answer
from gateway.server_config import ServerConfig
from relay.errors import RequestRefused

DIRECT_TRANSPORT = "relay.transport"
"""Key of the ASGI scope's extensions under which an application finds its ``TakeOver``."""

MAX_EARLY_BYTES = 64 * 1024
"""A client may send before it has our answer; so much of it waits in memory."""

MAX_HEADERS = 128
MAX_LINE_BYTES = 8_000
"""Below the websockets library's limits: what is above is for it to refuse, or to accept."""

SPOKEN = {"Sec-WebSocket-Version": "13"}

_BODY_HEADERS = (b"content-length", b"transfer-encoding")
# RFC 9110, section 5.5: h11 lets control characters through. What lies beyond ASCII is legal, but
# versions of the websockets library differ in how they decode it, and uvicorn undoes what its does.
_HEADER_VALUE = re.compile(rb"[\x09\x20-\x7e]*")

TakeOver = Callable[[Receiver, TickWriter, int], DirectTransport | None]
"""Gives the accepted connection's socket to a receiver; ``send`` and ``receive`` end with it.

Arguments: the receiver; what gathers its writes; above how many bytes there is no room. None:
the client has gone meanwhile.
"""


def can_read(request: h11.Request) -> bool:
    """Whether a request may be taken as h11 read it; others go through every check again."""
    if request.method != b"GET" or request.http_version != b"1.1":
        return False
    headers = list(request.headers)
    if len(headers) > MAX_HEADERS or len(request.target) > MAX_LINE_BYTES:
        return False
    return all(
        name not in _BODY_HEADERS
        and len(name) + len(value) <= MAX_LINE_BYTES
        and _HEADER_VALUE.fullmatch(value) is not None
        for name, value in headers
    )


class RelayWebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection's socket, until its handshake is over."""

    _early: bytearray | None = None
    _has_begun_here = False
    _is_taken_over = False

    def begin(self, request: h11.Request) -> None:
        """Take a request for which ``can_read`` holds."""
        self._has_begun_here = True
        headers = Headers()
        for name, value in request.headers:
            headers[name.decode("ascii")] = value.decode("ascii")
        self.handle_connect(Request(request.target.decode("ascii"), headers))

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer."""
        if self.handshake_initiated and self._early is not None:
            self._early += data
            if len(self._early) > MAX_EARLY_BYTES:
                self.transport.pause_reading()
            return
        super().data_received(data)
        # uvicorn does not look at this: the peer would wait for an answer for ever, and nobody
        # would ever close its socket.
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self._refuse_handshake(self.conn.handshake_exc)

    def handle_connect(self, event: Request) -> None:
        """Begin the handshake; what comes behind it waits for whoever takes the socket over."""
        self._early = bytearray()
        try:
            # uvicorn would answer in plain text, and nobody would learn of it. Asking first costs
            # a few microseconds.
            self.conn.process_request(event)
        except InvalidHandshake as error:
            # What comes behind it is no second handshake.
            self.handshake_initiated = True
            self._refuse_handshake(error)
        else:
            super().handle_connect(event)

    def _refuse_handshake(self, error: Exception) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.handshake_complete = self.close_sent = self.disconnected = True
        refused, headers = _refusal(error)
        if isinstance(self.config, ServerConfig) and self.config.metrics is not None:
            self.config.metrics.refused[refused.code] += 1
        self.transport.write(last_answer(refused, headers))
        self.transport.close()

    async def run_asgi(self) -> None:
        """Run the application, offering it the socket."""
        extensions = cast("dict[str, Any]", self.scope["extensions"])
        extensions[DIRECT_TRANSPORT] = self.take_over
        try:
            await self.app(self.scope, self.receive, self.send)
        except ClientDisconnected:
            pass
        except BaseException:
            self.logger.exception("Exception in ASGI application\n")
            self.send_500_response()
        else:
            if not (self.handshake_complete or self.disconnected or self.transport.is_closing()):
                self.logger.error("ASGI callable returned without completing handshake.")
                self.send_500_response()
        if not self._is_taken_over and self.close_timer is None:
            self.transport.close()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """Forget the application's task, and with the socket given away everything else."""
        super().on_task_complete(task)
        if self._is_taken_over:
            # The objects of a handshake, some sixty, refer to each other in circles. Left to the
            # collector they stay for long, and those of a storm hold the loop up when it comes.
            self.conn.parser.close()
            vars(self.conn).clear()
            vars(self).clear()

    async def receive(self) -> ASGIReceiveEvent:
        """Give the application the next event, where it goes on through ASGI."""
        if self.handshake_complete and self._early is not None:
            early, self._early = bytes(self._early), None
            # A client that has left, or was refused, completes the handshake too: then nobody
            # reads what it sent behind it.
            if self.conn.state is State.OPEN:
                if self._has_begun_here:
                    # This one has not seen the request, and would wait for it.
                    self.conn = ServerProtocol(
                        state=State.OPEN, max_size=self.config.ws_max_size, logger=self.logger
                    )
                self.transport.resume_reading()
                if early:
                    self.data_received(early)
        return await super().receive()

    async def send(self, message: ASGISendEvent) -> None:
        """Pass a message on to the peer."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            # A refusal completes the handshake too. uvicorn would log it as our error.
            self.handshake_complete = True

    def take_over(
        self, receiver: Receiver, ticks: TickWriter, budget_bytes: int
    ) -> DirectTransport | None:
        """Give the socket away (``TakeOver``); nothing of the handshake is kept."""
        if self.disconnected or self.transport.is_closing() or not self.handshake_complete:
            return None
        self._is_taken_over = True
        self.stop_keepalive()
        self.connections.discard(self)
        direct = DirectTransport(
            self.transport,
            receiver,
            ticks,
            self.connections,
            max_bytes=self.config.ws_max_size,
            budget_bytes=budget_bytes,
        )
        direct.begin(bytes(self._early or b""), is_clogged=not self.writable.is_set())
        return direct


def _refusal(error: Exception) -> tuple[RequestRefused, Mapping[str, str]]:
    """Give what is told of a handshake that cannot be done, and in which headers."""
    if isinstance(error, SecurityError):
        refused = RequestRefused(
            "frame_too_large",
            f"The handshake is larger than this gateway accepts: {error}.",
            suggestions=(
                "Send fewer and shorter headers, and a shorter query.",
                "Where the token is what is long, get a ticket with POST /v1/tickets.",
            ),
        )
        return refused, {}
    if isinstance(error, InvalidUpgrade):
        # RFC 9110, section 15.5.22.
        headers = {"Upgrade": "websocket", "Connection": "Upgrade, close"}
        return RequestRefused("upgrade_required"), headers
    suggestions = ("See RFC 6455, section 4.1, for what a handshake looks like.",)
    if isinstance(error, InvalidHandshake) and not isinstance(error, InvalidMessage):
        detail = f"This is not a WebSocket handshake: {str(error)[:200]}."
        # RFC 6455, section 4.2.2: the version may be what is wrong.
        return RequestRefused("bad_request", detail, suggestions=suggestions), SPOKEN
    detail = "This is not a WebSocket handshake: it has a body, or a header that is malformed."
    return RequestRefused("invalid_frame", detail, suggestions=suggestions), {}
