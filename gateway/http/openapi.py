"""``GET /openapi.json``: the public HTTP side, described from the models that serve it.

The request models are those that bodies are checked with. A test holds this list to the routes of
the application, and another one holds a running gateway to the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.http.answers import (
    Alive,
    AnswerAccepted,
    CancelAccepted,
    Problem,
    Ready,
    RunAccepted,
    RunDetailItem,
    RunList,
    TicketIssued,
)
from gateway.requests import CancelBody, InputBody, Request, RunBody
from relay import __version__
from relay.errors import WIRE_ERRORS
from relay.events import DATA_MODELS

PATH = "/openapi.json"

_INFO = """\
The HTTP side of a gateway: start, follow, answer and cancel runs. Events come over the WebSocket
at `/v1/ws` (subprotocol `relay.v1`) or, the same frames, as server-sent events from `/v1/events`.
The data of each type of event is a schema below, named after the type. Every error is a problem
document with `recovery_suggestions`. See docs/protocol.md."""

_REF = "#/components/schemas/{model}"
_AUTHENTICATED = ("invalid_token", "forbidden", "rate_limited", "unavailable", "internal")
_BODY = ("invalid_json", "invalid_frame", "frame_too_large")


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer other than a problem: its model, or what else it is."""

    description: str
    model: type[BaseModel] | None = None
    media_type: str = "application/json"
    headers: Sequence[str] = ()
    leads_to: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Operation:
    method: str
    path: str
    name: str
    summary: str
    answers: dict[int, _Answer]
    problems: Sequence[str] = ()
    body: type[Request] | None = None
    is_body_optional: bool = False
    parameters: Sequence[dict[str, Any]] = field(default_factory=tuple)
    needs_token: bool = True


_RUN_ID = {
    "name": "run_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
}
_REQUEST_ID = {**_RUN_ID, "name": "request_id"}
_POSITION = "(active|now|0|[A-Za-z0-9]{1,64}:[0-9]{1,16})"
_SINCE = {
    "name": "since",
    "in": "query",
    "description": "Where to begin: a position, `active` (the default), `now` or `0`.",
    "schema": {"type": "string", "pattern": f"^{_POSITION}$"},
}
_CLIENT_ID = {
    "name": "client_id",
    "in": "query",
    "description": "Names the device: a reconnect takes over its place in the connection limit.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The `id` of the last block: what `since` says, and it wins over it.",
    "schema": {"type": "string", "pattern": f"^{_POSITION}?$"},
}

_OPERATIONS: Sequence[_Operation] = (
    _Operation(
        "post",
        "/v1/runs",
        "start_run",
        "Start a run",
        {
            202: _Answer(
                "Accepted",
                RunAccepted,
                headers=("Location",),
                leads_to=("get_run", "cancel_run", "answer_input"),
            )
        },
        (
            *_AUTHENTICATED,
            *_BODY,
            "payload_too_large",
            "unknown_agent",
            "thread_busy",
        ),
        RunBody,
    ),
    _Operation(
        "get",
        "/v1/runs",
        "list_runs",
        "List the runs that are active or have just ended",
        {200: _Answer("The runs", RunList)},
        _AUTHENTICATED,
    ),
    _Operation(
        "get",
        "/v1/runs/{run_id}",
        "get_run",
        "Look up a run and its result",
        {200: _Answer("The run", RunDetailItem)},
        (*_AUTHENTICATED, "unknown_run", "not_found"),
        parameters=(_RUN_ID,),
    ),
    _Operation(
        "post",
        "/v1/runs/{run_id}/cancel",
        "cancel_run",
        "Ask a run to stop",
        {202: _Answer("Asked", CancelAccepted)},
        (*_AUTHENTICATED, *_BODY, "unknown_run", "not_found", "run_ended"),
        CancelBody,
        is_body_optional=True,
        parameters=(_RUN_ID,),
    ),
    _Operation(
        "post",
        "/v1/runs/{run_id}/inputs/{request_id}",
        "answer_input",
        "Answer an agent's question",
        {202: _Answer("Accepted", AnswerAccepted)},
        (*_AUTHENTICATED, *_BODY, "unknown_run", "not_found", "run_ended", "unknown_request"),
        InputBody,
        parameters=(_RUN_ID, _REQUEST_ID),
    ),
    _Operation(
        "get",
        "/v1/events",
        "listen",
        "Listen: the frames of a connection as server-sent events",
        {
            200: _Answer(
                "Blocks of `id` (the position to resume from) and `data` (a frame), until either "
                "side ends the stream; the gateway's last block has `event: close`",
                media_type="text/event-stream",
            )
        },
        (*_AUTHENTICATED, "invalid_frame"),
        parameters=(_SINCE, _CLIENT_ID, _LAST_EVENT_ID),
    ),
    _Operation(
        "post",
        "/v1/tickets",
        "issue_ticket",
        "Get a ticket for one WebSocket, or the reason why it would be refused",
        {201: _Answer("The ticket", TicketIssued)},
        (*_AUTHENTICATED, "invalid_frame"),
        parameters=(_SINCE, _CLIENT_ID),
    ),
    _Operation(
        "get",
        "/v1/ws",
        "connect",
        "Open a WebSocket; see docs/protocol.md",
        {101: _Answer("The connection is a WebSocket from here on", media_type="")},
        (*_AUTHENTICATED, "invalid_frame", "upgrade_required"),
        parameters=(_SINCE, _CLIENT_ID),
    ),
    _Operation(
        "get",
        "/healthz",
        "healthz",
        "Whether the process answers",
        {200: _Answer("It does", Alive)},
        needs_token=False,
    ),
    _Operation(
        "get",
        "/readyz",
        "readyz",
        "Whether events come through",
        {200: _Answer("They do", Ready), 503: _Answer("They do not", Ready)},
        needs_token=False,
    ),
    _Operation(
        "get",
        PATH,
        "openapi",
        "This document",
        {200: _Answer("OpenAPI 3.1")},
        needs_token=False,
    ),
    _Operation(
        "get",
        "/",
        "page",
        "The page",
        {200: _Answer("HTML", media_type="text/html; charset=utf-8")},
        needs_token=False,
    ),
    _Operation(
        "get",
        "/static/{path}",
        "page_file",
        "A file of the page",
        {
            200: _Answer("The file", media_type="*/*"),
            304: _Answer("It is as `If-None-Match` says", media_type=""),
        },
        ("not_found",),
        parameters=({**_RUN_ID, "name": "path", "example": "relay-client.js"},),
        needs_token=False,
    ),
)


def openapi_document() -> dict[str, Any]:
    """Give the document."""
    models: set[type[BaseModel]] = {Problem}
    for operation in _OPERATIONS:
        models |= {answer.model for answer in operation.answers.values() if answer.model}
        models |= {operation.body} if operation.body else set()
    _, definitions = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template=_REF,
    )
    schemas = definitions["$defs"]
    for event_type, data in DATA_MODELS.items():
        schemas[f"{event_type}"] = data.model_json_schema(ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Agent Relay", "version": __version__, "description": _INFO},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            },
        },
    }


def openapi_routes() -> list[BaseRoute]:
    """Make the route of the document."""
    body = orjson.dumps(openapi_document())

    async def document(_: HttpRequest) -> Response:
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-cache"})

    return [Route(PATH, document, methods=["GET"])]


def _describe(operation: _Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            **{str(status): _describe_answer(it) for status, it in operation.answers.items()},
            **_describe_problems(operation.problems),
        },
    }
    if operation.needs_token:
        described["security"] = [{"bearer": []}]
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.body is not None:
        described["requestBody"] = {
            "required": not operation.is_body_optional,
            "content": {"application/json": {"schema": _ref(operation.body)}},
        }
    return described


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _describe_answer(answer: _Answer) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.description}
    if answer.headers:
        described["headers"] = {
            name: {"required": True, "schema": {"type": "string"}} for name in answer.headers
        }
    if answer.leads_to:
        run_id = {"run_id": "$response.body#/run_id"}
        described["links"] = {
            name: {"operationId": name, "parameters": run_id} for name in answer.leads_to
        }
    if answer.media_type:
        schema: dict[str, Any] = {}
        if answer.model is not None:
            schema = dict(_ref(answer.model))
        elif answer.media_type.startswith("text/"):
            schema = {"type": "string"}
        described["content"] = {answer.media_type: {"schema": schema}}
    return described


def _describe_problems(codes: Sequence[str]) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(WIRE_ERRORS[code].http_status, []).append(code)
    return {
        str(status): {
            "description": " ".join(f"`{code}`: {WIRE_ERRORS[code].message}" for code in same),
            "headers": _headers_of(status),
            "content": {"application/problem+json": {"schema": _ref(Problem)}},
        }
        for status, same in sorted(by_status.items())
    }


def _headers_of(status: int) -> dict[str, Any]:
    if status in (429, 503):
        seconds = {"type": "integer", "minimum": 1}
        return {"Retry-After": {"required": True, "description": "Seconds.", "schema": seconds}}
    if status == 401:
        return {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}}
    return {}
