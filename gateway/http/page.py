"""The page and its files, under a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent.parent / "static"

PAGE = "index.html"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE_HEADERS = {
    "Referrer-Policy": "no-referrer",
    # File names carry no digest: keep them, but ask each time whether they are current (ETag).
    "Cache-Control": "no-cache",
}


def page_routes(folder: Path = FOLDER) -> list[BaseRoute]:
    """Make the routes of the page and its files."""
    files = _PageFiles(folder)

    async def index(request: Request) -> Response:
        return await files.get_response(PAGE, request.scope)

    return [Route("/", index, methods=["GET"]), Mount("/static", files)]


def content_security_policy(page: str) -> str:
    """Give the policy under which a page runs the scripts within it, and the files beside it."""
    digests = (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in re.findall("<script>(.*?)</script>", page, re.DOTALL)
    )
    return CONTENT_SECURITY_POLICY.format(
        scripts="".join(f" 'sha256-{digest}'" for digest in digests)
    )


class _PageFiles(StaticFiles):
    def __init__(self, folder: Path) -> None:
        super().__init__(directory=folder)
        policy = content_security_policy((folder / PAGE).read_text("utf-8"))
        self._headers = {"Content-Security-Policy": policy, **PAGE_HEADERS}

    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            response = await super().get_response(path, scope)
        except ValueError:
            # A path with a zero byte, which no file system knows.
            raise HTTPException(404) from None
        response.headers.update(self._headers)
        return response
