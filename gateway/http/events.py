"""``GET /v1/events``: the same frames as on a WebSocket, as server-sent events.

For programs and proxies that do not speak WebSocket. It only listens; requests go to ``/v1/runs``.
Format: WHATWG HTML, section 9.2 (server-sent events).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.handshake import check_served, read_query, register
from gateway.metrics import GatewayMetrics
from gateway.protocol import Connection, ConnectionServices
from gateway.transport import OutboxTransport
from relay.codec import Publication

HEADERS = {
    "Cache-Control": "no-store",
    # nginx would hold events back until its buffer is full.
    "X-Accel-Buffering": "no",
}


def sse_block(frame: bytes, position: str) -> bytes:
    """Put a frame into an event-stream block; its id is the position to resume from after it."""
    if position:
        return b"id: %s\ndata: %s\n\n" % (position.encode(), frame)
    return b"data: %s\n\n" % frame


class EventStream(OutboxTransport):
    """A transport whose frames are taken by the response's body.

    Args:
        connection: Where the frames come from.
        metrics: Counts what was sent.
        budget_bytes: Above this there is no room for further events.
    """

    def __init__(self, connection: Connection, metrics: GatewayMetrics, budget_bytes: int) -> None:
        super().__init__(connection, metrics, budget_bytes)
        self._connection = connection
        self._is_cut_off = False

    def _block_of(self, publication: Publication) -> bytes:
        """Give an event with the position after it."""
        return sse_block(publication.frame, self._connection.position_after(publication))

    def send(self, payload: bytes, position: str) -> None:
        """Send another frame."""
        self._add(sse_block(payload, position))

    def force_close(self, code: int, reason: str) -> None:
        """End the body now, or when its socket takes or gives up what it was given last."""
        self._is_cut_off = True
        self.close(code, reason)
        self._connection.ended(code, reason)

    async def body(self) -> AsyncIterator[bytes]:
        """Give the response's body until the stream is closed."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            for frame in self._outbox.take():
                if self._is_cut_off:
                    break
                yield frame
                self._note_written(len(frame))
            is_last = self._is_cut_off or not self._has_work.is_set()
            if self._closing is not None and is_last:
                code, reason = self._closing
                closed = orjson.dumps({"code": code, "reason": reason})
                yield b"event: close\ndata: %s\n\n" % closed
                return


def event_routes(services: ConnectionServices, check_open: Callable[[], None]) -> Sequence[Route]:
    """Make the route of the event stream.

    Args:
        services: What connections share.
        check_open: Refuses while this gateway takes no connections.
    """

    async def listen(request: Request) -> Response:
        check_open()
        services.authenticator.check_origin(request.headers)
        identity = await services.authenticator.identify_peer(request)
        query = dict(request.query_params)
        resume = request.headers.get("last-event-id")
        if resume:
            query["since"] = resume
        since, client_id = read_query(query)
        check_served(services)
        if request.method == "HEAD":
            # It asks for the headers. A stream would take a place, and never end.
            return Response(media_type="text/event-stream", headers=HEADERS)
        connection = await register(services, check_open, identity, since, client_id)
        return EventResponse(services, connection)

    return [Route("/v1/events", listen, methods=["GET"])]


class EventResponse(StreamingResponse):
    """The response that serves a connection, and leaves nothing of it behind."""

    def __init__(self, services: ConnectionServices, connection: Connection) -> None:
        super().__init__(
            _serve(services, connection), media_type="text/event-stream", headers=HEADERS
        )
        self._connection = connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve until either side ends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A client may leave before the body has begun, and with it the connection's own end.
            self._connection.ended(1006, "the response was cut off")


async def _serve(services: ConnectionServices, connection: Connection) -> AsyncIterator[bytes]:
    """Serve the connection for as long as somebody takes the body."""
    stream = EventStream(connection, services.metrics, services.outbox_bytes)
    try:
        connection.open(stream)
        async for block in stream.body():
            yield block
    finally:
        connection.ended(1005, "closed by the client")
        connection.gone()
