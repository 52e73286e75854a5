"""Errors over HTTP: problem documents (RFC 9457), the same for every route."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from gateway.metrics import GatewayMetrics
from gateway.refusals import refusal_of, retry_after_s
from relay.errors import RelayError, RequestRefused

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:agent-relay:problem:"

_TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    422: "Not valid",
    426: "Upgrade required",
    429: "Too many requests",
    500: "Internal error",
    503: "Not available",
}
_CLIENT_CLOSED_REQUEST = 499


def json_response(
    body: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Give an answer that nobody may keep: it belongs to one user, at one moment."""
    return Response(
        orjson.dumps(body),
        status_code,
        {"Cache-Control": "no-store", **(headers or {})},
        "application/json",
    )


def problem(refused: RequestRefused, headers: Mapping[str, str] | None = None) -> Response:
    """Give the problem document of a refusal, with ``Retry-After`` where that makes sense."""
    status = refused.http_status
    more = {"Cache-Control": "no-store", **(headers or {})}
    wait_s = retry_after_s(refused)
    if wait_s is not None:
        more["Retry-After"] = str(wait_s)
    if status == 401:
        more["WWW-Authenticate"] = "Bearer"
    body = {
        "type": TYPE_PREFIX + refused.code,
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": refused.detail,
        "code": refused.code,
        "recovery_suggestions": refused.recovery_suggestions,
    }
    return Response(orjson.dumps(body), status, more, MEDIA_TYPE)


def last_answer(refused: RequestRefused, headers: Mapping[str, str] | None = None) -> bytes:
    """Give the problem document of a refusal as the whole answer that ends a connection.

    For what is refused where there is no application yet to answer (RFC 9112).
    """
    own = {"X-Content-Type-Options": "nosniff", "Connection": "close"}
    response = problem(refused, {**own, **(headers or {})})
    status = HTTPStatus(response.status_code)
    lines = [b"%b: %b\r\n" % header for header in response.raw_headers]
    head = b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, status.phrase.encode(), b"".join(lines))
    return head + bytes(response.body)


def exception_handlers(metrics: GatewayMetrics) -> Mapping[Any, Any]:
    """Make an application's answers to requests that ended with an exception.

    Args:
        metrics: Counts what is refused.
    """

    def refuse(refused: RequestRefused, headers: Mapping[str, str] | None = None) -> Response:
        metrics.requests_refused[refused.code] += 1
        return problem(refused, headers)

    async def on_relay_error(_: HTTPConnection, error: Exception) -> Response:
        return refuse(refusal_of(error))

    async def on_http_error(request: HTTPConnection, error: Exception) -> Response:
        # The router refused it.
        if not isinstance(error, HTTPException):
            raise TypeError(f"not an HTTP error: {error!r}")
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code)
        if code is None:
            return refuse(refusal_of(error))
        detail = f"There is nothing at {request.url.path[:200]}." if code == "not_found" else None
        return refuse(RequestRefused(code, detail), error.headers)

    async def on_client_gone(_: HTTPConnection, __: Exception) -> Response:
        # Nobody reads this answer: the client left while it was sending.
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    async def on_unexpected(_: Request, __: Exception) -> Response:
        # A defect; the server logs the exception.
        return refuse(RequestRefused("internal"))

    return {
        RelayError: on_relay_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_client_gone,
        Exception: on_unexpected,
    }
