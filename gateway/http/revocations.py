"""Revoking tokens: one by its id, or all that a user has been issued so far."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Literal

import structlog
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import ADMIN_SCOPE, require_scope
from gateway.http.bodies import read_fields
from gateway.http.problems import json_response
from gateway.requests import Request
from relay.events import format_timestamp
from relay.revocations import RevocationLog, revocation_of
from relay.tokens import LATEST_EXPIRY_S, Identity

MAX_BODY_BYTES = 4_096

log = structlog.stdlib.get_logger(__name__)


class RevocationBody(Request):
    """Body of a revocation; it may be left out.

    Attributes:
        exp: The token's own claim, or the latest of the user's tokens: kept until then only.
    """

    exp: float | None = Field(default=None, ge=0, le=LATEST_EXPIRY_S, allow_inf_nan=False)


def revocation_routes(
    identify: Callable[[HttpRequest], Awaitable[Identity]], revocations: RevocationLog
) -> list[Route]:
    """Make what revokes tokens on every gateway; needs a token with the scope ``relay:admin``.

    Args:
        identify: Gives the identity behind a request, or refuses it.
        revocations: Where they are kept, for all gateways.
    """

    async def revoke(request: HttpRequest, kind: Literal["token", "user"], name: str) -> Response:
        operator = await identify(request)
        require_scope(operator, ADMIN_SCOPE)
        subject = request.path_params[name]
        body = await read_fields(request, RevocationBody, MAX_BODY_BYTES, is_optional=True)
        revocation = revocation_of(kind, subject, time.time_ns() // 1_000_000, body.exp)
        await revocations.add(revocation)
        log.info("revoked", kind=kind, subject=subject, by=operator.user_id)
        return json_response(
            {
                name: subject,
                "revoked_at": format_timestamp(revocation.at_ms),
                "kept_until": format_timestamp(revocation.until_ms),
            },
            202,
        )

    async def token(request: HttpRequest) -> Response:
        return await revoke(request, "token", "jti")

    async def user(request: HttpRequest) -> Response:
        return await revoke(request, "user", "user_id")

    return [
        # Both may hold a slash, which arrives decoded.
        Route("/v1/admin/tokens/{jti:path}/revoke", token, methods=["POST"]),
        Route("/v1/admin/users/{user_id:path}/revoke", user, methods=["POST"]),
    ]
