"""The HTTP side held to its own description: ``GET /openapi.json`` against a running gateway."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.routing import BaseRoute, Mount, Route

from gateway.app import Gateway, running_gateway
from gateway.http.openapi import openapi_document
from tests.integration.gateway_support import Work, bearer, gateway_settings, http, tab
from tests.support.stack import Stack

# Streams do not end, and upgrades are no HTTP: both have tests of their own.
NOT_FUZZED = ("/v1/events", "/v1/ws")
DOCUMENT = openapi_document()


def served(routes: list[BaseRoute]) -> set[tuple[str, str]]:
    found = set()
    for route in routes:
        if isinstance(route, Mount):
            found.add(("get", f"{route.path}/{{path}}"))
        elif isinstance(route, Route):
            found |= {(method.lower(), route.path) for method in route.methods or ()}
    return {(method, path) for method, path in found if method != "head"}


async def test_document_has_every_public_route_and_no_other(
    redis_url: str, key_prefix: str
) -> None:
    gateway = Gateway(gateway_settings(redis_url, key_prefix))
    try:
        described = {
            (method, path) for path, methods in DOCUMENT["paths"].items() for method in methods
        }
        assert described == served(gateway.public_routes())
    finally:
        await gateway.link.aclose()


def test_document_is_whole() -> None:
    text = json.dumps(DOCUMENT)
    schemas = DOCUMENT["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [
        operation for methods in DOCUMENT["paths"].values() for operation in methods.values()
    ]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for operation in operations:
        assert operation["summary"]
        statuses = set(operation["responses"])
        # Whoever may be refused for the token may be so for the origin, and while Redis is away.
        assert ("security" in operation) == ("401" in statuses)
        if "security" in operation:
            assert {"401", "403", "500", "503"} <= statuses


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**DOCUMENT, "$ref": f"#/components/schemas/{name}"})


async def test_events_have_the_schema_of_their_type(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(redis_url, key_prefix)
    async with running_gateway(settings) as gateway, Work(settings) as work:
        async with tab(gateway) as opened:
            await work.run()
            await opened.until("agent_completed")
            asking = await work.submit()
            await work.question(asking)
            await opened.until("input_requested")
            for frame in opened.events:
                validator(frame["type"]).validate(frame["data"])
            assert len({frame["type"] for frame in opened.events}) >= 7
        async with http(gateway) as client:
            document = (await client.get("/openapi.json")).json()
            assert document == json.loads(json.dumps(DOCUMENT))
            item = (await client.get(f"/v1/runs/{asking}")).json()
            assert item["open_inputs"][0]["request_id"] == "q1"
            validator("RunDetailItem").validate(item)


async def test_streams_are_answered_as_described(redis_url: str, key_prefix: str) -> None:
    described = DOCUMENT["paths"]["/v1/events"]["get"]["responses"]
    settings = gateway_settings(redis_url, key_prefix)
    async with (
        running_gateway(settings) as gateway,
        httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client,
    ):
        queries: list[tuple[dict[str, str], dict[str, str], int]] = [
            ({}, {}, 401),
            (bearer(), {"since": "x"}, 422),
            (bearer(), {"client_id": ""}, 422),
            ({**bearer(), "Origin": "https://evil.example"}, {}, 403),
        ]
        for headers, query, status in queries:
            answer = await client.get("/v1/events", headers=headers, params=query)
            assert answer.status_code == status
            [media_type] = described[str(status)]["content"]
            assert answer.headers["Content-Type"] == media_type
        # What asks for the headers gets them, takes no place, and leaves the line free.
        for _ in range(3):
            answer = await client.head("/v1/events", headers=bearer())
            assert answer.status_code == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert len(gateway.pool) == 0
        async with client.stream("GET", "/v1/events", headers=bearer()) as stream:
            assert stream.status_code == 200
            assert stream.headers["Content-Type"].startswith("text/event-stream")
        answer = await client.get("/v1/ws", headers=bearer())
        assert answer.status_code == 426
        assert "426" in DOCUMENT["paths"]["/v1/ws"]["get"]["responses"]


async def fuzz(stack: Stack, *, examples: int, phases: str, deadline_s: float) -> str:
    """Let schemathesis hold a gateway to its document, with all of its checks; give its report."""
    gateway = await stack.start_gateway()
    await stack.start_worker("echo_agent:worker", Path(__file__).parent)
    options = {
        "--checks": "all",
        "--phases": phases,
        "--max-examples": str(examples),
        "--request-timeout": "10",
        "--exclude-path-regex": f"^({'|'.join(NOT_FUZZED)})$",
        "--header": f"Authorization: Bearer {stack.token('alice')}",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{gateway.url}/openapi.json"),
        *("--no-color", "--continue-on-failure"),
        *(part for option in options.items() for part in option),
        env={**os.environ, "NO_PROXY": "*"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(deadline_s):
            report = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    print(report)
    assert process.returncode == 0
    assert gateway.is_running
    stack.assert_no_defects()
    return report


def generated(report: str) -> int:
    found: Any = re.search(r"(\d+) generated", report)
    return int(found[1])


async def test_gateway_answers_as_its_document_says(
    tmp_path: Path, redis_url: str, key_prefix: str
) -> None:
    async with Stack(tmp_path, redis_url, key_prefix=key_prefix) as stack:
        report = await fuzz(stack, examples=2, phases="examples,coverage,fuzzing", deadline_s=90)
    assert generated(report) > 200


@pytest.mark.faults_full
async def test_gateway_answers_thousands_of_requests_as_its_document_says(
    tmp_path: Path, redis_url: str, key_prefix: str
) -> None:
    phases = "examples,coverage,fuzzing,stateful"
    async with Stack(tmp_path, redis_url, key_prefix=key_prefix) as stack:
        report = await fuzz(stack, examples=300, phases=phases, deadline_s=1_500)
    assert generated(report) > 3_000
