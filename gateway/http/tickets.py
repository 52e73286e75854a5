"""``POST /v1/tickets``: a ticket for a WebSocket, or the reason why there would be none.

A browser hides the status of a refused upgrade. A page asks here instead: it gets the very
answer that its WebSocket would have got.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.handshake import check_served, read_query
from gateway.http.problems import json_response
from gateway.protocol import ConnectionServices
from gateway.tickets import TICKET_TTL_S, TicketOffice


def ticket_routes(
    services: ConnectionServices, tickets: TicketOffice, check_open: Callable[[], None]
) -> list[Route]:
    """Make the route of tickets.

    Args:
        services: What connections share.
        tickets: Issues them.
        check_open: Refuses while this gateway takes no connections.
    """

    async def issue(request: Request) -> Response:
        # In the order of gateway.handshake.admit: where two reasons hold, both give the same one.
        check_open()
        services.authenticator.check_origin(request.headers)
        identity = await services.authenticator.identify_peer(request)
        _, client_id = read_query(request.query_params)
        check_served(services)
        await services.pool.check_room(identity.user_id, client_id)
        ticket = await tickets.issue(identity)
        return json_response({"ticket": ticket, "expires_in_s": TICKET_TTL_S}, 201)

    return [Route("/v1/tickets", issue, methods=["POST"])]
