"""What the Python client says over plain HTTP, and the addresses that it understands."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import ProxyHandler, Request, build_opener

import orjson

from relay.client.state import ConnectionEnded
from relay.config import is_loopback

_TIMEOUT_S = 10.0
_MAX_DETAIL_BYTES = 16_384


def http_address(url: str) -> str:
    """Give the relay's base address from whatever form of it people have at hand.

    Raises:
        ConnectionEnded: It is not an address.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    schemes = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
    if parts.scheme not in schemes or not parts.hostname:
        raise ConnectionEnded(
            f"{url!r} is not the address of a relay; it looks like http://127.0.0.1:8080."
        )
    path = parts.path.removesuffix("/v1/ws").rstrip("/")
    return urlunsplit((schemes[parts.scheme], parts.netloc, path, "", ""))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the gateway, or a proxy before it, said to a plain HTTP request."""

    status: int
    detail: str
    retry_after: str | None


def ask_for_ticket(base: str, query: str, token: str) -> Answer | None:
    """Ask ``POST /v1/tickets``, which refuses for the same reasons as the WebSocket does.

    Blocks for up to ten seconds.

    Args:
        base: As ``http_address`` gives it.
        query: The WebSocket's: without it the device's own place would count against it.
        token: The user's token.

    Returns:
        None where there was no HTTP answer at all.
    """
    request = Request(  # noqa: S310 (http_address lets http and https through only)
        f"{base}/v1/tickets?{query}", method="POST", headers={"Authorization": f"Bearer {token}"}
    )
    handlers = [ProxyHandler({})] if is_loopback(urlsplit(base).hostname or "") else []
    try:
        with build_opener(*handlers).open(request, timeout=_TIMEOUT_S) as response:
            return Answer(response.status, "", None)
    except HTTPError as refused:
        with refused:
            detail = problem_detail(bytes(refused.read(_MAX_DETAIL_BYTES)))
            return Answer(refused.code, detail, refused.headers.get("Retry-After"))
    except (URLError, OSError):
        return None


def problem_detail(body: bytes) -> str:
    """Give the sentence of a problem document (RFC 9457), or nothing."""
    try:
        problem = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    if not isinstance(problem, dict):
        return ""
    return str(problem.get("detail") or problem.get("title") or "")
