"""The gateway over HTTP: runs, the page, health, and the internal listener."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.app import Gateway, running_gateway
from relay.errors import CloseCode
from tests.integration.gateway_support import (
    Work,
    bearer,
    eventually,
    gateway_settings,
    http,
    read_problem,
    tab,
    token,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_BODY = 16_384


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(
        redis_url,
        key_prefix,
        max_frame_bytes=MAX_BODY,
        max_content_chars=500,
        allowed_origins="https://chat.example.com",
    )
    async with running_gateway(settings) as running:
        yield running


@pytest.fixture
async def work(gateway: Gateway) -> AsyncIterator[Work]:
    async with Work(gateway.settings) as running:
        yield running


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    problem: dict[str, Any] = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "code", "recovery_suggestions"}
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:agent-relay:problem:{code}"
    assert problem["detail"]
    assert problem["recovery_suggestions"]
    return problem


# --- Runs ---


async def test_run_is_started_followed_and_found(gateway: Gateway, work: Work) -> None:
    async with http(gateway) as client, tab(gateway) as opened:
        body = {"thread_id": "t", "content": "hello", "metadata": {"a": 1}, "message_id": "m"}
        answer = await client.post("/v1/runs", json=body)
        assert answer.status_code == 202
        run_id = answer.json()["run_id"]
        assert answer.json() == {"run_id": run_id, "duplicate": False}
        assert answer.headers["Location"] == f"/v1/runs/{run_id}"
        assert (await client.post("/v1/runs", json=body)).json()["duplicate"] is True
        queued = await opened.until("agent_queued")
        assert queued["data"] == {"message_id": "m", "content": "hello", "metadata": {"a": 1}}
        [listed] = (await client.get("/v1/runs")).json()["runs"]
        assert (listed["run_id"], listed["status"]) == (run_id, "queued")
        await work.carry_out(run_id)
        found = (await client.get(f"/v1/runs/{run_id}")).json()
        assert (found["status"], found["result"]) == ("completed", "Hello")
        assert answer.headers["Cache-Control"] == "no-store"


async def test_run_without_a_message_id_is_always_a_new_one(gateway: Gateway, work: Work) -> None:
    async with http(gateway) as client:
        body = {"thread_id": "t", "content": "hello", "agent": "echo"}
        ids = {(await client.post("/v1/runs", json=body)).json()["run_id"] for _ in range(2)}
        assert len(ids) == 2


async def test_run_is_cancelled(gateway: Gateway, work: Work) -> None:
    async with http(gateway) as client:
        run_id = await work.submit()
        answer = await client.post(f"/v1/runs/{run_id}/cancel", json={"reason": "enough"})
        assert answer.status_code == 202
        assert answer.json() == {"run_id": run_id, "status": "cancelled"}
        again = await client.post(f"/v1/runs/{run_id}/cancel")
        assert (again.status_code, again.json()) == (202, answer.json())
        done = await work.run()
        check_problem(await client.post(f"/v1/runs/{done}/cancel"), 409, "run_ended")


async def test_question_is_answered_over_http(gateway: Gateway, work: Work) -> None:
    async with http(gateway) as client, http(gateway, "bob") as stranger:
        run_id = await work.submit()
        address = f"/v1/runs/{run_id}/inputs/{await work.question(run_id)}"
        check_problem(await stranger.post(address, json={"value": "x"}), 404, "unknown_run")
        check_problem(await client.post(address, json={}), 422, "invalid_frame")
        answer = await client.post(address, json={"denied": True})
        assert (answer.status_code, answer.json()) == (202, {"run_id": run_id, "request_id": "q1"})
        assert (await client.post(address, json={"denied": True})).status_code == 202
        check_problem(await client.post(address, json={"value": "x"}), 409, "unknown_request")


async def test_runs_of_others_do_not_exist(gateway: Gateway, work: Work) -> None:
    run_id = await work.submit("alice")
    async with http(gateway, "bob") as client:
        check_problem(await client.get(f"/v1/runs/{run_id}"), 404, "unknown_run")
        check_problem(await client.post(f"/v1/runs/{run_id}/cancel"), 404, "unknown_run")
        assert (await client.get("/v1/runs")).json() == {"runs": []}


async def test_bad_bodies_are_refused_and_the_next_good_one_works(
    gateway: Gateway, work: Work
) -> None:
    good = {"thread_id": "t", "content": "x"}
    cases: list[tuple[bytes, int, str, str]] = [
        (b"", 400, "invalid_json", "JSON"),
        (b"{", 400, "invalid_json", "JSON"),
        (b"\xff\xfe", 400, "invalid_json", "JSON"),
        (b"[]", 422, "invalid_frame", "object"),
        (b"{}", 422, "invalid_frame", "thread_id: the field is required"),
        (b'{"thread_id": "t", "content": ""}', 422, "invalid_frame", "content: must not be"),
        (b'{"thread_id": "t", "content": 1}', 422, "invalid_frame", "content: "),
        (b'{"thread_id": "t", "content": "x", "user_id": "bob"}', 422, "invalid_frame", "user_id"),
        (b'{"thread_id": "t", "content": "%s"}' % (b"x" * 501), 413, "payload_too_large", "501"),
        (b'{"pad": "%s"}' % (b"x" * MAX_BODY), 413, "frame_too_large", str(MAX_BODY)),
        (b'{"thread_id": "t", "content": "x", "agent": "no"}', 404, "unknown_agent", "echo"),
    ]
    async with http(gateway) as client:
        for body, status, code, words in cases:
            problem = check_problem(await client.post("/v1/runs", content=body), status, code)
            assert words in problem["detail"]
            assert (await client.post("/v1/runs", json=good)).status_code == 202


async def test_endless_body_is_not_read_to_its_end(gateway: Gateway) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 10_000

    async with http(gateway) as client:
        # The gateway may hang up before all has been sent.
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            check_problem(await client.post("/v1/runs", content=endless()), 413, "frame_too_large")
        assert (await client.get("/v1/runs")).status_code == 200


async def test_quota_is_told_with_retry_after(redis_url: str, key_prefix: str) -> None:
    settings = gateway_settings(
        redis_url, key_prefix, max_active_runs_per_user=1, max_queued_runs_per_user=0
    )
    async with running_gateway(settings) as gateway, Work(settings), http(gateway) as client:
        assert (
            await client.post("/v1/runs", json={"thread_id": "a", "content": "x"})
        ).status_code == 202
        answer = await client.post("/v1/runs", json={"thread_id": "b", "content": "x"})
        check_problem(answer, 429, "rate_limited")
        assert int(answer.headers["Retry-After"]) >= 1


async def test_wrong_addresses_and_methods(gateway: Gateway) -> None:
    async with http(gateway) as client:
        check_problem(await client.get("/v1/nothing"), 404, "not_found")
        answer = await client.delete("/v1/runs")
        check_problem(answer, 405, "method_not_allowed")
        assert "GET" in answer.headers["Allow"] or "POST" in answer.headers["Allow"]
        check_problem(await client.get("/metrics"), 404, "not_found")
        check_problem(await client.get("/v1/admin/stats"), 404, "not_found")


# --- Pages of other origins ---


async def test_allowed_origins_may_call_the_api_and_others_may_not(gateway: Gateway) -> None:
    async with http(gateway) as client:
        preflight = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        allowed = {"Origin": "https://chat.example.com"}
        answer = await client.options("/v1/tickets", headers={**allowed, **preflight})
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == allowed["Origin"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        answer = await client.post("/v1/tickets", headers=allowed)
        assert answer.status_code == 201
        assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After"
        evil = {"Origin": "https://evil.example"}
        answer = await client.options("/v1/tickets", headers={**evil, **preflight})
        assert answer.status_code == 400
        answer = await client.get("/v1/runs", headers=evil)
        assert "Access-Control-Allow-Origin" not in answer.headers


# --- The page ---


async def test_page_and_its_files_come_under_a_strict_policy(gateway: Gateway) -> None:
    async with http(gateway, None) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["Content-Type"].startswith("text/html")
        files = re.findall(r'(?:src|href)="(/?static/[^"]+)"', page.text)
        assert files
        script = await client.get("/static/relay-client.js")
        assert "javascript" in script.headers["Content-Type"]
        for answer in (page, script):
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-cache"
            again = await client.get(
                answer.url.path, headers={"If-None-Match": answer.headers["ETag"]}
            )
            assert again.status_code == 304
            assert again.headers["Content-Security-Policy"] == policy
        for name in files:
            assert (await client.get("/" + name.lstrip("/"))).status_code == 200, name


async def test_no_file_outside_the_folder_is_served(gateway: Gateway) -> None:
    async with http(gateway, None) as client:
        for path in (
            "/static/../app.py",
            "/static/%2e%2e/app.py",
            "/static/..%2fapp.py",
            "/static//etc/passwd",
            "/static/%00",
            "/static/",
            "/static/nothing.js",
        ):
            check_problem(await client.get(path), 404, "not_found")


# --- Health and operators ---


async def test_health_is_public_and_its_detail_internal(gateway: Gateway) -> None:
    async with http(gateway, None) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        answer = await client.get(gateway.admin_url + "/readyz")
        assert answer.status_code == 200
        checks = {check["name"]: check for check in answer.json()["checks"]}
        assert set(checks) == {"redis_round_trip", "subscription", "drain", "agents", "revocations"}
        assert all(check["ok"] for check in checks.values())
        assert "ms" in checks["redis_round_trip"]["detail"]
        assert (await client.get(gateway.admin_url + "/healthz")).status_code == 200


@pytest.mark.usefixtures("server")
async def test_metrics_count_what_happened(gateway: Gateway, work: Work) -> None:
    async with tab(gateway) as opened, http(gateway, None) as client:
        await work.run()
        await opened.until("agent_completed")
        await client.get("/v1/runs")
        text = (await client.get(gateway.admin_url + "/metrics")).text
        figures = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if not line.startswith("#")
        }
        assert figures["relay_connections"] == 1
        assert figures["relay_connections_opened_total"] == 1
        assert figures["relay_delivered_events_total"] == len(opened.events)
        assert figures["relay_sent_bytes_total"] > 500
        assert figures["relay_subscriber_connected"] == 1
        assert figures["relay_ready"] == 1
        assert 0 <= figures["relay_probe_age_seconds"] < 3
        for name in ("relay_catch_ups_total", "relay_resets_total", "relay_loop_lag_seconds"):
            assert name in figures


async def test_operators_need_the_scope(gateway: Gateway) -> None:
    async with http(gateway, None) as client:
        stats = gateway.admin_url + "/v1/admin/stats"
        check_problem(await client.get(stats), 401, "invalid_token")
        check_problem(await client.get(stats, headers=bearer()), 403, "forbidden")
        near_miss = bearer(scopes=["relay:administrator", "admin"])
        check_problem(await client.get(stats, headers=near_miss), 403, "forbidden")
        async with tab(gateway):
            answer = await client.get(stats, headers=bearer(scopes=["x", "relay:admin"]))
            assert answer.status_code == 200
            assert answer.json()["connections"] == 1
            assert answer.json()["node"] == gateway.node.node_id


@pytest.mark.usefixtures("server")
async def test_operator_disconnects_a_user_on_every_node(gateway: Gateway) -> None:
    odd = "a/b {x}"
    async with (
        running_gateway(gateway.settings) as second,
        tab(gateway, odd) as one,
        tab(second, odd) as two,
        tab(second, "bob") as other,
        http(gateway, None) as client,
    ):
        address = f"{gateway.admin_url}/v1/admin/users/a%2Fb%20%7Bx%7D/disconnect"
        check_problem(await client.post(address, headers=bearer()), 403, "forbidden")
        answer = await client.post(address, headers=bearer(scopes=["relay:admin"]))
        assert (answer.status_code, answer.json()) == (202, {"nodes": 2})
        assert (await one.closed())[0] == CloseCode.FORBIDDEN
        assert (await two.closed())[0] == CloseCode.FORBIDDEN
        assert await other.is_alive()


@pytest.mark.usefixtures("server")
async def test_tokens_never_reach_the_log(
    gateway: Gateway, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    for client_side in ("httpx", "httpcore", "websockets"):
        caplog.set_level("WARNING", logger=client_side)
    secret = token("alice")
    async with http(gateway, None) as client:
        await client.get("/v1/runs", params={"token": secret})
        await client.get("/v1/runs", headers={"Authorization": f"Bearer {secret}"})
    async with tab(gateway) as opened:
        await opened.ask(type="refresh_token", token=secret)
        await opened.ask(type="refresh_token", token=secret + "x")

    async def is_closed() -> bool:
        return not len(gateway.pool)

    await eventually(is_closed)
    written = capfd.readouterr()
    for text in (written.out, written.err, caplog.text):
        assert secret not in text
        assert secret.split(".")[2] not in text


async def test_body_that_is_malformed_after_the_refusal_is_hung_up_on(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    defects: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            f"POST /v1/runs HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"no chunk\r\n")
            await reader.read()
    finally:
        writer.close()
    assert head.startswith(b"HTTP/1.1 401 ")
    assert defects == []


async def exchange(gateway: Gateway, sent: bytes) -> bytes:
    """Give all that comes on a connection until it is closed."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


BROKEN_BODY = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n%b\r\nno chunk\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno header\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/runs" + BROKEN_BODY % b"",
        b"POST /v1/runs" + BROKEN_BODY % b"Authorization: VALID\r\n",
    ],
    ids=["TLS", "header", "no host", "body", "body that is waited for"],
)
async def test_what_is_no_http_is_answered_with_a_problem_and_no_defect(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    sent = sent.replace(b"VALID", bearer()["Authorization"].encode())
    _, problem = read_problem(await exchange(gateway, sent))
    assert (problem["status"], problem["code"]) == (400, "bad_request")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_what_is_no_http_behind_a_request_does_not_disturb_its_answer(
    gateway: Gateway,
) -> None:
    answers = await exchange(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n\0\r\n\r\n")
    first, status, rest = answers.partition(b"HTTP/1.1 400 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert first.endswith(b'{"status":"ok"}')
    assert read_problem(status + rest)[1]["code"] == "bad_request"


async def test_head_that_is_no_http_is_answered_without_a_body(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await exchange(gateway, b"HEAD /v1/runs" + BROKEN_BODY % b"")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
