"""Reading request bodies, bounded."""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request as HttpRequest

from gateway.requests import Request, check_fields, parse_json_object
from relay.errors import RequestRefused

R = TypeVar("R", bound=Request)


async def read_body(request: HttpRequest, limit_bytes: int) -> bytes:
    """Read a body, but never more of it than may be.

    Raises:
        RequestRefused: ``frame_too_large``.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise RequestRefused(
                "frame_too_large",
                f"The request's body is larger than the {limit_bytes} bytes that are accepted.",
            )
    return bytes(body)


async def read_fields(
    request: HttpRequest, model: type[R], limit_bytes: int, *, is_optional: bool = False
) -> R:
    """Read a body as JSON of a known form.

    Raises:
        RequestRefused: ``frame_too_large``, ``invalid_json``, ``invalid_frame``.
    """
    body = await read_body(request, limit_bytes)
    fields = {} if is_optional and not body.strip() else parse_json_object(body)
    return check_fields(model, fields)
