"""``GET /v1/events``: the same frames as on a WebSocket, as server-sent events.

For programs and proxies that do not speak WebSocket. It only listens; requests go to ``/v1/runs``.
Format: WHATWG HTML, section 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from gateway.auth import find_credential
from gateway.handshake import read_query
from gateway.protocol import Connection, ConnectionServices
from gateway.refusals import UNAVAILABLE_RETRY_MS
from gateway.transport import FrameSource
from relay.errors import RequestRefused

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


class EventStream:
    """A transport whose frames are taken by the response's body.

    Args:
        source: Where the frames are.
    """

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self._has_work = asyncio.Event()
        self._closing: tuple[int, str] | None = None
        self._is_cut_off = False
        self.ended = asyncio.Event()

    def wake(self) -> None:
        """Let the body take what waits."""
        self._has_work.set()

    def close(self, code: int, reason: str) -> None:
        """End the body behind the frames that wait, with a block that says why."""
        self._closing = (code, reason)
        self._has_work.set()

    def force_close(self, code: int, reason: str) -> None:
        """End the body now."""
        self._is_cut_off = True
        self.close(code, reason)
        self.ended.set()

    async def body(self) -> AsyncIterator[bytes]:
        """Give the response's body until the stream is closed."""
        try:
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                for frame in self._source.take_frames():
                    if self._is_cut_off:
                        break
                    yield frame
                    self._source.frame_written(len(frame))
                is_last = self._is_cut_off or not self._has_work.is_set()
                if self._closing is not None and is_last:
                    code, reason = self._closing
                    closed = orjson.dumps({"code": code, "reason": reason})
                    yield b"event: close\ndata: %s\n\n" % closed
                    return
        finally:
            self.ended.set()


def event_routes(services: ConnectionServices, check_open: Callable[[], None]) -> Sequence[Route]:
    """Make the route of the event stream.

    Args:
        services: What connections share.
        check_open: Refuses while this gateway takes no connections.
    """

    async def listen(request: Request) -> Response:
        check_open()
        services.authenticator.check_origin(request.headers)
        identity = await services.authenticator.identify(
            find_credential(request.headers, request.query_params)
        )
        query = dict(request.query_params)
        resume = request.headers.get("last-event-id")
        if resume:
            query["since"] = resume
        since, client_id = read_query(query)
        if not services.hub.subscriber.is_connected:
            raise RequestRefused("unavailable", retry_after_ms=UNAVAILABLE_RETRY_MS)
        if request.method == "HEAD":
            # It asks for the headers. A stream would take a place, and never end.
            return Response(media_type="text/event-stream", headers=HEADERS)
        agents = await services.commands.agents()
        place = await services.pool.take_place(identity.user_id, client_id)
        try:
            check_open()
            services.authenticator.check_not_revoked(identity)
        except BaseException:
            services.pool.give_up(place)
            raise
        made: list[EventStream] = []

        def make_transport(connection: Connection) -> EventStream:
            made.append(EventStream(connection))
            return made[0]

        connection = Connection(
            services,
            identity,
            since=since,
            place=place,
            agents=agents,
            make_transport=make_transport,
            framing=sse_block,
        )
        services.pool.register(connection)
        return EventResponse(services, connection, made[0])

    return [Route("/v1/events", listen, methods=["GET"])]


class EventResponse(StreamingResponse):
    """The response that serves a connection, and leaves nothing of it behind."""

    def __init__(
        self, services: ConnectionServices, connection: Connection, stream: EventStream
    ) -> None:
        super().__init__(
            _serve(connection, stream), media_type="text/event-stream", headers=HEADERS
        )
        self._services = services
        self._connection = connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve until either side ends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A client may leave before the body has begun, and with it the connection's own end.
            self._services.pool.remove(self._connection, 1006, "the response was cut off")


async def _serve(connection: Connection, stream: EventStream) -> AsyncIterator[bytes]:
    """Run the connection for as long as somebody takes the body."""

    async def receive() -> Message:
        # Nothing is ever received: the end of the body is the end of the connection.
        await stream.ended.wait()
        return {"type": "websocket.disconnect", "code": 1005, "reason": "closed by the client"}

    running = asyncio.create_task(connection.run(receive), name="event-stream")
    try:
        async for block in stream.body():
            yield block
    finally:
        stream.ended.set()
        await running
