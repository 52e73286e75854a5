"""The page and its files, under a policy that lets nothing else in."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent.parent / "static"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    # File names carry no digest: keep them, but ask each time whether they are current (ETag).
    "Cache-Control": "no-cache",
}


def page_routes(folder: Path = FOLDER) -> list[BaseRoute]:
    """Make the routes of the page and its files."""
    files = _PageFiles(directory=folder)

    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    return [Route("/", index, methods=["GET"]), Mount("/static", files)]


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            response = await super().get_response(path, scope)
        except ValueError:
            # A path with a zero byte, which no file system knows.
            raise HTTPException(404) from None
        response.headers.update(PAGE_HEADERS)
        return response
