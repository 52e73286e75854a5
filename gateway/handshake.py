"""``/v1/ws``: who may open a connection. Every refusal comes before the upgrade."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway.auth import BEARER_SUBPROTOCOL, SUBPROTOCOL
from gateway.feed import parse_since
from gateway.http.problems import problem
from gateway.protocol import Connection, ConnectionServices
from gateway.refusals import UNAVAILABLE_RETRY_MS, refusal_of
from gateway.transport import AsgiTransport
from gateway.websocket import DIRECT_TRANSPORT, TakeOver
from relay.errors import CloseCode, DecodingFailed, RequestRefused
from relay.recovery import Since
from relay.tokens import Identity

PATH = "/v1/ws"
MAX_CLIENT_ID_CHARS = 128

_DENIAL = "websocket.http.response"
"""The ASGI extension by which an upgrade is refused with a response of ours."""


Connect = Callable[[WebSocket], Awaitable[None]]
"""Answers an upgrade request."""


def connector(services: ConnectionServices, check_open: Callable[[], None]) -> Connect:
    """Make the WebSocket's endpoint.

    Args:
        services: What connections share.
        check_open: Refuses while this gateway takes no connections.
    """

    async def connect(websocket: WebSocket) -> None:
        try:
            connection = await admit(websocket, services, check_open)
        except Exception as error:  # noqa: BLE001 -- every failure is told before the upgrade
            await _deny(websocket, services, refusal_of(error))
            return
        # A browser closes a connection whose subprotocol it did not offer.
        offered = SUBPROTOCOL in websocket.scope["subprotocols"]
        try:
            await websocket.accept(SUBPROTOCOL if offered else None)
        except BaseException:
            connection.ended(1006, "upgrade not completed")
            raise
        await _serve(websocket, services, connection)

    return connect


class StraightToSocket:
    """Passes upgrades at ``/v1/ws`` past what is there for requests (ASGI middleware).

    Middleware and routes do nothing for them but cost: each wait of a handshake goes through all.
    """

    def __init__(self, app: ASGIApp, *, connect: Connect) -> None:
        self._app = app
        self._connect = connect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upgrade, or anything else, on."""
        if scope["type"] == "websocket" and scope["path"] == PATH:
            await self._connect(WebSocket(scope, receive, send))
        else:
            await self._app(scope, receive, send)


def websocket_routes(services: ConnectionServices, connect: Connect) -> list[BaseRoute]:
    """Make the WebSocket's route, and an answer for upgrades at any other address."""

    async def without_upgrade(_: Request) -> Response:
        # RFC 9110 section 15.5.22; the option in Connection belongs to it (section 7.8).
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        services.metrics.requests_refused["upgrade_required"] += 1
        return problem(RequestRefused("upgrade_required"), headers)

    async def nothing_here(websocket: WebSocket) -> None:
        await _deny(websocket, services, RequestRefused("not_found"))

    return [
        WebSocketRoute(PATH, connect),
        Route(PATH, without_upgrade, methods=["GET"]),
        WebSocketRoute("/{path:path}", nothing_here),
    ]


async def admit(
    websocket: WebSocket, services: ConnectionServices, check_open: Callable[[], None]
) -> Connection:
    """Register a client's connection, if it may connect.

    Raises:
        RequestRefused, TokenRejected, RedisUnavailable: It may not, or not now.
    """
    check_open()
    check_subprotocols(websocket.scope["subprotocols"])
    authenticator = services.authenticator
    authenticator.check_origin(websocket.headers)
    identity = await authenticator.identify_peer(websocket, allow_ticket=True)
    since, client_id = read_query(websocket.query_params)
    check_served(services)
    return await register(services, check_open, identity, since, client_id)


def check_served(services: ConnectionServices) -> None:
    """Refuse clients while nothing that is published arrives here.

    Raises:
        RequestRefused: ``unavailable``.
    """
    if not services.hub.subscriber.is_connected:
        raise RequestRefused("unavailable", retry_after_ms=UNAVAILABLE_RETRY_MS)


async def register(
    services: ConnectionServices,
    check_open: Callable[[], None],
    identity: Identity,
    since: Since,
    client_id: str | None,
) -> Connection:
    """Take a place for a connection, and register it there; its transport is to follow at once.

    Raises:
        RequestRefused, TokenRejected, RedisUnavailable: It cannot be served, or not any more.
    """
    # The client gets this list; and a gateway that cannot read it has no Redis to serve from.
    agents = await services.commands.agents()
    place = await services.pool.take_place(identity.user_id, client_id)
    try:
        # Time has passed. From here to the registration nothing waits any more.
        check_open()
        services.authenticator.check_not_revoked(identity)
    except BaseException:
        services.pool.give_up(place)
        raise
    connection = Connection(services, identity, since=since, place=place, agents=agents)
    services.pool.register(connection)
    return connection


def check_subprotocols(offered: Sequence[str]) -> None:
    """Refuse a client that speaks something else: it would not understand our frames.

    Raises:
        RequestRefused: ``invalid_frame``.
    """
    spoken = [name for name in offered if not name.startswith(BEARER_SUBPROTOCOL)]
    if spoken and SUBPROTOCOL not in spoken:
        raise RequestRefused(
            "invalid_frame",
            f"None of the subprotocols offered is spoken here: {', '.join(spoken)[:200]}.",
            suggestions=(f"Offer {SUBPROTOCOL}, alone or beside others.",),
        )


def read_query(query: Mapping[str, str]) -> tuple[Since, str | None]:
    """Read what a client asks for in the URL.

    Raises:
        RequestRefused: ``invalid_frame``, naming the parameter.
    """
    try:
        since = parse_since(query.get("since", "active"))
    except DecodingFailed as error:
        raise RequestRefused("invalid_frame", f"{error}.") from None
    client_id = query.get("client_id")
    if client_id is not None and not 0 < len(client_id) <= MAX_CLIENT_ID_CHARS:
        raise RequestRefused(
            "invalid_frame", f"client_id: has 1 to {MAX_CLIENT_ID_CHARS} characters."
        )
    return since, client_id


async def _serve(
    websocket: WebSocket, services: ConnectionServices, connection: Connection
) -> None:
    """Give the connection its transport: with the direct one, this returns at once."""
    take_over: TakeOver | None = _extensions(websocket).get(DIRECT_TRANSPORT)
    if take_over is not None:
        direct = take_over(connection, services.ticks, services.outbox_bytes)
        if direct is None:
            connection.ended(1006, "lost")
        else:
            connection.open(direct)
        return
    transport = AsgiTransport(
        websocket.send, websocket.receive, connection, services.metrics, services.outbox_bytes
    )
    connection.open(transport)
    await transport.run()


async def _deny(
    websocket: WebSocket, services: ConnectionServices, refused: RequestRefused
) -> None:
    services.metrics.refused[refused.code] += 1
    if _DENIAL in _extensions(websocket):
        await websocket.send_denial_response(problem(refused))
    else:
        # Such a server answers 403, and cannot say why.
        await websocket.close(CloseCode.POLICY, refused.detail)


def _extensions(websocket: WebSocket) -> Mapping[str, Any]:
    # A server that has none need not say so (ASGI specification, "Extensions").
    return websocket.scope.get("extensions") or {}
