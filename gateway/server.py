"""Listening: sockets with clear errors, and uvicorn servers that hand over before they close."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway import direct, websocket
from gateway.clock import steady_ms
from gateway.doorkeeper import Lobby
from gateway.http.problems import last_answer
from gateway.metrics import GatewayMetrics
from gateway.outbox import Backlog
from gateway.refusals import UNAVAILABLE_RETRY_MS
from gateway.server_config import ServerConfig
from gateway.websocket import RelayWebSocketProtocol
from relay.cancellation import end_tasks
from relay.errors import ConfigurationError, RequestRefused

BACKLOG = 2048
UNSENT_BYTES = 128 * 1024
"""What the kernel may hold of a connection beyond what the peer's window takes.

It would take megabytes, up to ``tcp_wmem``. On a slow line a heartbeat then waits behind them for
half a minute, although the outbox is nearly empty, and the client takes us for dead.
"""

GRACE_S = 5
"""What requests under way get to finish when the server stops."""

REQUEST_S = 15.0
"""A request, headers and body, is here by then, or its connection is closed."""

# Both are written under attack: they are made once.
NO_REQUEST = last_answer(RequestRefused("bad_request"))
TURNED_AWAY = last_answer(
    RequestRefused(
        "unavailable",
        "This connection had sent no whole request, and made room for a newer one.",
        suggestions=("Connect again, and send the whole request at once.",),
        retry_after_ms=UNAVAILABLE_RETRY_MS,
    )
)

FRAME_HEADROOM = 4
"""uvicorn's own limit lies this much above ours: up to it, a client is told instead of closed."""


def bind(host: str, port: int, *, host_variable: str, port_variable: str) -> socket.socket:
    """Give a listening socket.

    Args:
        host: Name or address.
        port: 0 takes a free one.
        host_variable: Setting to name if the host is wrong.
        port_variable: Setting to name if the port is.

    Raises:
        ConfigurationError: One sentence with what is wrong and what to do.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigurationError(
            f"{host!r} is not a host that can be listened on ({error.strerror or error}). "
            f"Set {host_variable} to a name or address of this machine."
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux and macOS; connections inherit it.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            _explain(error, host, port, host_variable, port_variable)
        ) from error
    listener.setblocking(False)
    return listener


def _explain(error: OSError, host: str, port: int, host_variable: str, port_variable: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"Port {port} on {host} is in use by another program. "
                f"Stop that program, or set {port_variable} to another port."
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"Port {port} on {host} may not be used by this account. "
                f"Set {port_variable} to a port above 1023."
            )
        case errno.EADDRNOTAVAIL:
            return (
                f"{host} is no address of this machine. Set {host_variable} to one that is, "
                "or to 0.0.0.0 for all."
            )
    return f"Cannot listen on {host}, port {port}: {error.strerror or error}."


def url_of(listener: socket.socket) -> str:
    """Give the address of a listening socket, as a client on this machine would use it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 -- compared, not bound
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


class RelayHttpProtocol(H11Protocol):
    """uvicorn's HTTP, with limits for how long a client may take to send and to read.

    Without them, connections that send nothing, or half a request, stay for ever: no token is
    needed to take all sockets that a gateway has. So do those that read nothing of their answer,
    with what waits for them.
    """

    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time."""
        super().connection_made(transport)
        self._give_time()
        self._enter_lobby()

    def data_received(self, data: bytes) -> None:
        """Take bytes; more time is given to the next request only, not for each piece."""
        super().data_received(data)
        is_ours = self.transport.get_protocol() is self
        if is_ours and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._give_time()
            self._enter_lobby()
        else:
            # The request is here, or a WebSocket session took over, with deadlines of its own.
            self._stop_timer()
            self._leave_lobby()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request; where the answer has begun or been sent, only hang up."""
        is_awaited = self.conn.our_state is h11.SEND_RESPONSE
        if self.cycle is not None and not self.cycle.response_complete:
            # Its request broke off in this: there is nothing that its answer could be sent to.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_awaited or self.conn.our_state is h11.IDLE:
            # RFC 9110, section 9.3.2: what is more would be taken for the next answer.
            is_head = is_awaited and self.scope["method"] == "HEAD"
            end = NO_REQUEST.index(b"\r\n\r\n") + 4 if is_head else None
            self.transport.write(NO_REQUEST[:end])
            if isinstance(self.config, ServerConfig) and self.config.metrics is not None:
                self.config.metrics.requests_refused["bad_request"] += 1
        # Else a body turned out to be malformed after its request had been answered.
        self.transport.close()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Let the WebSocket protocol go on, also with what came behind the request."""
        self._stop_looking()
        early, _ = self.conn.trailing_data
        if self.ws_protocol_class is websocket.RelayWebSocketProtocol and websocket.can_read(event):
            # h11 has read the request, as strictly; uvicorn would write and read it again.
            self.connections.discard(self)
            begun = websocket.RelayWebSocketProtocol(
                self.config, self.server_state, self.app_state, self.loop
            )
            begun.connection_made(self.transport)
            self.transport.set_protocol(begun)
            begun.begin(event)
        else:
            super().handle_websocket_upgrade(event)
        protocol: Any = self.transport.get_protocol()
        if early and protocol is not self:
            protocol.data_received(early)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        self._stop_looking()
        self._leave_lobby()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to watch a peer that does not take what it is sent."""
        super().pause_writing()
        if self._look is None:
            left_bytes = self.transport.get_write_buffer_size()
            self._look_later(Backlog(left_bytes, steady_ms()))

    def resume_writing(self) -> None:
        """Leave the peer alone: it has taken what waited."""
        self._stop_looking()
        super().resume_writing()

    def _look_later(self, backlog: Backlog) -> None:
        # An event stream is closed with 4410 before, by the same measure. That is told behind what
        # the peer does not take; the socket would stay, and nobody would count it any more.
        left_s = (backlog.stuck_at_ms - steady_ms()) / 1000 + direct.FLUSH_S
        self._look = self.loop.call_later(left_s, self._look_at, backlog)

    def _look_at(self, backlog: Backlog) -> None:
        now_ms = steady_ms()
        backlog.look(self.transport.get_write_buffer_size(), now_ms)
        if backlog.is_stuck(now_ms):
            self.transport.abort()
        else:
            self._look_later(backlog)

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def turn_away(self) -> None:
        """Close this connection, which has sent no whole request, to make room for another."""
        self.transport.write(TURNED_AWAY)
        self.transport.close()

    def _enter_lobby(self) -> None:
        if isinstance(self.config, ServerConfig) and self.config.lobby is not None:
            self.config.lobby.enter(self, self.client[0] if self.client else None)

    def _leave_lobby(self) -> None:
        if isinstance(self.config, ServerConfig) and self.config.lobby is not None:
            self.config.lobby.leave(self)

    def _give_time(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        self.transport.close()


def server_config(
    app: ASGIApp,
    *,
    max_frame_bytes: int,
    lobby: Lobby | None = None,
    metrics: GatewayMetrics | None = None,
) -> uvicorn.Config:
    """Configure uvicorn. Its own log lines name URLs, so only its warnings are let through.

    Args:
        app: What is served.
        max_frame_bytes: Longest frame that a client may send.
        lobby: Bounds the sockets without a whole request.
        metrics: Counts what is refused before ``app`` hears of it.
    """
    config = ServerConfig(
        app,
        http=RelayHttpProtocol,
        ws=RelayWebSocketProtocol,
        ws_max_size=max_frame_bytes * FRAME_HEADROOM,
        # The connections ping, all on one wheel, and close with a code of ours.
        ws_ping_interval=None,
        # Compression costs each connection its own window, and each event its own pass.
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_S,
        # It would believe X-Forwarded-For from this machine, and take over the scheme from it. Whom
        # we believe is configured, and for limits only.
        proxy_headers=False,
    )
    config.lobby = lobby
    config.metrics = metrics
    return config


class Listener(uvicorn.Server):
    """A uvicorn server that is started and stopped by its gateway, not by signals.

    Args:
        config: How to serve.
        listening: The socket; it belongs to this object from now on.
        hand_over: Awaited when the server stops, after it has stopped accepting and before it
            closes any connection. uvicorn closes all sockets before the lifespan's shutdown
            runs, so no other place is early enough.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listening: socket.socket,
        hand_over: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(config)
        self.url = url_of(listening)
        self._listening = listening
        self._hand_over = hand_over
        self._is_serving = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when connections are accepted."""
        self._task = asyncio.create_task(
            self.serve(sockets=[self._listening]), name=f"listener {self.url}"
        )
        waiting = asyncio.create_task(self._is_serving.wait())
        await asyncio.wait([self._task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """Stop accepting, hand over, close; return when all is done."""
        self.should_exit = True
        self._stop_asked.set()
        if self._task is not None:
            await self._task
        self._listening.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving."""
        await super().startup(sockets)
        self._is_serving.set()

    async def main_loop(self) -> None:
        """Return as soon as somebody asked to stop; uvicorn's own looks ten times a second."""
        ticking = asyncio.create_task(super().main_loop())
        asked = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait([ticking, asked], return_when=asyncio.FIRST_COMPLETED)
            if ticking.done():
                await ticking
        finally:
            await end_tasks([ticking, asked])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving, gently."""
        for server in self.servers:
            server.close()
        if self._hand_over is not None:
            await self._hand_over()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to whoever runs the gateway."""
        yield
