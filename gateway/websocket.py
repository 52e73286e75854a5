"""uvicorn's WebSocket protocol with the close codes and the last resort that ``relay.v1`` needs.

What is decided here, because it happens below ASGI: a handshake that cannot be read is refused, a
text frame that is not UTF-8 closes with 1007, a message above ``ws_max_size`` with 1009, a broken
frame with 1002.
"""

from __future__ import annotations

from typing import Any, cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import SecurityError

from gateway.http.problems import problem
from relay.errors import CloseCode, RequestRefused

FORCE_CLOSE = "relay.force_close"
"""Key of the ASGI scope's extensions under which an application finds ``force_close``."""

FLUSH_S = 5.0
"""A peer that does not even take the close frame within this time is cut off."""

PING_INTERVAL_S = 20.0
PING_TIMEOUT_S = 20.0


class RelayWebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection's socket."""

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer."""
        super().data_received(data)
        # uvicorn does not look at this: the peer would wait for an answer for ever, and nobody
        # would ever close its socket.
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self._refuse_handshake(self.conn.handshake_exc)

    def _refuse_handshake(self, error: Exception) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.handshake_complete = self.close_sent = self.disconnected = True
        response = problem(_unreadable(error))
        lines = [b"%b: %b\r\n" % header for header in response.raw_headers]
        status = b"HTTP/1.1 %d Refused\r\n" % response.status_code
        self.transport.write(
            b"".join([status, *lines, b"connection: close\r\n\r\n", bytes(response.body)])
        )
        self.transport.close()

    def send_receive_event_to_app(self) -> None:
        """Pass a message on to the application, or close where it is not text as it claims."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                # uvicorn closes as well, but logs each of them as an error with a stack.
                self.frames = []
                self.conn.send_close(1007)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    async def run_asgi(self) -> None:
        """Run the application, giving it a way to close a socket that takes nothing."""
        extensions = cast("dict[str, Any]", self.scope["extensions"])
        extensions[FORCE_CLOSE] = self.force_close
        await super().run_asgi()

    async def send(self, message: ASGISendEvent) -> None:
        """Pass a message on to the peer."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            # A refusal completes the handshake too. uvicorn would log it as our error.
            self.handshake_complete = True

    def force_close(self, code: int, reason: str) -> None:
        """Close without waiting for what is buffered; the connection is gone in ``FLUSH_S``.

        An ASGI send would wait for the very socket that does not become writable.
        """
        if self.disconnected or self.transport.is_closing():
            return
        if not self.close_sent and self.handshake_complete:
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
        self._give_up(code, reason)

    def keepalive_timeout(self) -> None:
        """Close with 4408 when no pong came, unless the peer is merely slow to read."""
        self.pong_timer = None
        self.pending_ping_payload = None
        if self.close_sent or self.transport.is_closing():
            return
        if not self.writable.is_set():
            # Our ping may still wait behind what the peer has not read. Whether such a peer is
            # too slow is for the outbox to say (4410).
            self.schedule_ping()
            return
        self.conn.fail(CloseCode.NO_PONG, "no pong")
        self.transport.write(b"".join(self.conn.data_to_send()))
        self._give_up(CloseCode.NO_PONG, "no pong")

    def handle_parser_exception(self) -> None:
        """Let the application know at once that nothing can be sent any more."""
        super().handle_parser_exception()
        self.disconnected = True

    def _give_up(self, code: int, reason: str) -> None:
        self.stop_keepalive()
        self.close_sent = True
        self.disconnected = True
        self.writable.set()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.close()
        # close() waits for the buffer to drain, which a dead peer's never does.
        self.loop.call_later(FLUSH_S, self.transport.abort)


def _unreadable(error: Exception) -> RequestRefused:
    if isinstance(error, SecurityError):
        return RequestRefused(
            "frame_too_large",
            f"The handshake is larger than this gateway accepts: {error}.",
            suggestions=(
                "Send fewer and shorter headers, and a shorter query.",
                "Where the token is what is long, get a ticket with POST /v1/tickets.",
            ),
        )
    return RequestRefused(
        "invalid_frame",
        "This is not a WebSocket handshake: it has a body, or a header that is malformed.",
        suggestions=("See RFC 6455, section 4.1, for what a handshake looks like.",),
    )
