"""``POST /v1/tickets``: a ticket for a WebSocket, or the reason why there would be none.

A browser hides the status of a refused upgrade. A page asks here instead: it gets the very
answer that its WebSocket would have got.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Authenticator
from gateway.connection_pool import WebSocketConnectionPool
from gateway.handshake import read_query
from gateway.http.problems import json_response
from gateway.tickets import TICKET_TTL_S, TicketOffice
from relay.tokens import Identity


def ticket_routes(
    identify: Callable[[Request], Awaitable[Identity]],
    authenticator: Authenticator,
    pool: WebSocketConnectionPool,
    tickets: TicketOffice,
    check_open: Callable[[], None],
) -> list[Route]:
    """Make the route of tickets.

    Args:
        identify: Gives the identity behind a request, or refuses it.
        authenticator: Knows the allowed origins.
        pool: Knows whether there is room.
        tickets: Issues them.
        check_open: Refuses while this gateway takes no connections.
    """

    async def issue(request: Request) -> Response:
        authenticator.check_origin(request.headers)
        identity = await identify(request)
        check_open()
        _, client_id = read_query(request.query_params)
        await pool.check_room(identity.user_id, client_id)
        ticket = await tickets.issue(identity)
        return json_response({"ticket": ticket, "expires_in_s": TICKET_TTL_S}, 201)

    return [Route("/v1/tickets", issue, methods=["POST"])]
