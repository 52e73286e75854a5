"""``/v1/runs``: the same commands as on a WebSocket, for programs that do not listen."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.commands import RunCommands
from gateway.http.bodies import read_fields
from gateway.http.problems import json_response
from gateway.requests import CancelBody, InputBody, RunBody
from relay.tokens import Identity

Identify = Callable[[Request], Awaitable[Identity]]


def run_routes(identify: Identify, commands: RunCommands, max_body_bytes: int) -> list[Route]:
    """Make the routes of runs.

    Args:
        identify: Gives the identity behind a request, or refuses it.
        commands: What can be done with runs.
        max_body_bytes: Largest body taken.
    """

    async def submit(request: Request) -> Response:
        identity = await identify(request)
        body = await read_fields(request, RunBody, max_body_bytes)
        message_id = body.message_id or secrets.token_hex(16)
        submitted = await commands.submit(identity.user_id, body, message_id)
        return json_response(
            {"run_id": submitted.run_id, "duplicate": submitted.duplicate},
            202,
            {"Location": f"/v1/runs/{submitted.run_id}"},
        )

    async def list_runs(request: Request) -> Response:
        identity = await identify(request)
        runs = await commands.registry.list_runs(identity.user_id)
        return json_response({"runs": [run.as_json() for run in runs]})

    async def get(request: Request) -> Response:
        identity = await identify(request)
        detail = await commands.get(identity.user_id, request.path_params["run_id"])
        return json_response(detail.as_json())

    async def cancel(request: Request) -> Response:
        identity = await identify(request)
        body = await read_fields(request, CancelBody, max_body_bytes, is_optional=True)
        run_id = request.path_params["run_id"]
        outcome = await commands.cancel(identity.user_id, run_id, body.reason)
        return json_response({"run_id": outcome.run_id, "status": outcome.status}, 202)

    async def answer_input(request: Request) -> Response:
        identity = await identify(request)
        body = await read_fields(request, InputBody, max_body_bytes)
        run_id, request_id = request.path_params["run_id"], request.path_params["request_id"]
        await commands.answer_input(identity.user_id, run_id, request_id, body)
        return json_response({"run_id": run_id, "request_id": request_id}, 202)

    async def collection(request: Request) -> Response:
        # One route: two for one address would each name only their own method in ``Allow``.
        return await (submit if request.method == "POST" else list_runs)(request)

    return [
        Route("/v1/runs", collection, methods=["GET", "POST"]),
        Route("/v1/runs/{run_id}", get, methods=["GET"]),
        Route("/v1/runs/{run_id}/cancel", cancel, methods=["POST"]),
        Route("/v1/runs/{run_id}/inputs/{request_id}", answer_input, methods=["POST"]),
    ]
