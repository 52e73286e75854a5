"""``/v1/admin/dead-letters``: tasks that were given up, for operators to requeue or drop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.http.problems import json_response
from relay.dead_letters import MAX_PAGE, DeadLetters
from relay.errors import RequestRefused
from relay.tokens import Identity

DEFAULT_PAGE = 50

log = structlog.stdlib.get_logger(__name__)


def dead_letter_routes(
    authorize: Callable[[Request], Awaitable[Identity]], letters: DeadLetters
) -> list[Route]:
    """Make the routes of dead letters.

    Args:
        authorize: Gives the operator behind a request, or refuses it.
        letters: The dead letters.
    """

    async def list_letters(request: Request) -> Response:
        await authorize(request)
        limit = read_limit(request.query_params.get("limit"))
        page = await letters.page(before=request.query_params.get("before"), limit=limit)
        return json_response(
            {
                "dead_letters": [letter.as_json() for letter in page.letters],
                "before": page.before,
                "count": await letters.count(),
            }
        )

    async def get(request: Request) -> Response:
        await authorize(request)
        letter = await letters.get(request.path_params["letter_id"])
        return json_response(letter.as_json())

    async def requeue(request: Request) -> Response:
        operator = await authorize(request)
        letter_id = request.path_params["letter_id"]
        requeued = await letters.requeue(letter_id)
        log.info(
            "dead letter requeued",
            letter_id=letter_id,
            operator=operator.user_id,
            how=requeued.how,
            run_id=requeued.run_id,
        )
        return json_response(requeued.as_json(), 202)

    async def drop(request: Request) -> Response:
        operator = await authorize(request)
        letter_id = request.path_params["letter_id"]
        await letters.drop(letter_id)
        log.info("dead letter dropped", letter_id=letter_id, operator=operator.user_id)
        return Response(status_code=204, headers={"Cache-Control": "no-store"})

    base = "/v1/admin/dead-letters"
    return [
        Route(base, list_letters, methods=["GET"]),
        Route(base + "/{letter_id}", get, methods=["GET"]),
        Route(base + "/{letter_id}", drop, methods=["DELETE"]),
        Route(base + "/{letter_id}/requeue", requeue, methods=["POST"]),
    ]


def read_limit(text: str | None) -> int:
    """Read how many letters a page may have.

    Raises:
        RequestRefused: ``invalid_frame``.
    """
    if text is None:
        return DEFAULT_PAGE
    if text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MAX_PAGE:
        return int(text)
    raise RequestRefused(
        "invalid_frame",
        f"limit is a whole number from 1 to {MAX_PAGE}, not {text[:64]!r}.",
        suggestions=("Leave it out, and follow before for more.",),
    )
