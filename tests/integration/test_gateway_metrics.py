"""What a gateway counts: each event that is delivered, and each refusal, once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from gateway.app import Gateway, running_gateway
from relay.keys import LARGE_TEXT_BYTES
from tests.integration.gateway_support import (
    Tab,
    Work,
    bearer,
    direct_only,
    gateway_settings,
    http,
    raw_tab,
    read_problem,
    refusal,
    tab,
    token,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_FRAME = 16_384


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(
        redis_url, key_prefix, max_frame_bytes=MAX_FRAME, max_content_chars=500
    )
    async with running_gateway(settings) as running:
        yield running


@pytest.fixture
async def work(gateway: Gateway) -> AsyncIterator[Work]:
    async with Work(gateway.settings) as running:
        yield running


async def delivered_to(opened: Tab, last: int) -> int:
    """Give how many events a tab has got, once it has the last one."""
    while opened.frames[-1].get("offset") != last or is_unfinished(opened.frames[-1]):
        await opened.receive()
    return len({frame["offset"] for frame in opened.events})


def is_unfinished(frame: dict[str, object]) -> bool:
    return frame["type"] == "event_part" and frame["index"] != int(str(frame["total"])) - 1


async def test_each_event_is_counted_once_whichever_way_it_goes_out(
    gateway: Gateway, work: Work
) -> None:
    async with tab(gateway) as live:
        await work.run()
        last = (await live.until("agent_completed"))["offset"]
        seen = await delivered_to(live, last)
        assert gateway.metrics.delivered_events == seen > 5
        # From history, in one page.
        async with raw_tab(gateway, query="?since=0", headers=bearer()) as late:
            await late.receive()
            seen += await delivered_to(late, last)
            assert gateway.metrics.delivered_events == seen
    before = gateway.metrics.delivered_events
    async with tab(gateway, query="?since=now") as live:
        # In parts.
        await work.run(pieces=("x" * (LARGE_TEXT_BYTES + 1),))
        seen = await delivered_to(live, 2 * last)
        assert [frame["type"] for frame in live.frames].count("event_part") > 2
        assert gateway.metrics.delivered_events == before + seen


async def test_each_refusal_of_a_frame_is_counted_once(gateway: Gateway, work: Work) -> None:
    refused = gateway.metrics.requests_refused
    message = {"type": "user_message", "id": "1", "thread_id": "t", "agent": "echo", "content": "x"}
    frames: dict[str, str | bytes] = {
        "invalid_json": "{",
        "invalid_frame": "{}",
        "unknown_type": '{"type": "subscribe", "id": "1"}',
        "frame_too_large": " " * (MAX_FRAME + 1),
        "binary_not_supported": b"{}",
        "payload_too_large": json.dumps({**message, "content": "x" * 501}),
        # Carried out aside.
        "unknown_agent": json.dumps({**message, "agent": "nobody"}),
        "unknown_run": '{"type": "cancel", "id": "1", "run_id": "run_x"}',
        "invalid_token": json.dumps({"type": "refresh_token", "id": "1", "token": token("bob")}),
    }
    async with tab(gateway) as opened:
        for number, (code, frame) in enumerate(frames.items(), 1):
            await opened.socket.send(frame)
            assert (await opened.error())["code"] == code
            assert (refused[code], refused.total()) == (1, number)
        assert (await opened.ask(**message))["type"] == "ack"
    async with tab(gateway, "bob") as opened:
        for _ in range(40):
            await opened.send(type="ping", id="1")
        answers = [await opened.receive() for _ in range(40)]
    errors = [answer["code"] for answer in answers if answer["type"] == "error"]
    assert set(errors) == {"rate_limited"}
    assert refused["rate_limited"] == len(errors)
    assert gateway.metrics.refused == {}


@direct_only
async def test_each_refusal_over_http_is_counted_once(gateway: Gateway) -> None:
    requests = [
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("DELETE", "/v1/runs", "", 405, "method_not_allowed"),
        ("GET", "/v1/ws", "", 426, "upgrade_required"),
        ("POST", "/v1/runs", "{", 400, "invalid_json"),
        ("POST", "/v1/runs", "{}", 422, "invalid_frame"),
        ("POST", "/v1/runs", " " * (MAX_FRAME + 1), 413, "frame_too_large"),
        ("GET", "/v1/runs/run_x", "", 404, "unknown_run"),
        ("GET", "/v1/events?since=nonsense", "", 422, "invalid_frame"),
        ("GET", f"{gateway.admin_url}/v1/admin/stats", "", 403, "forbidden"),
    ]
    counted: Counter[str] = Counter()
    async with http(gateway) as client:
        for method, address, body, status, code in requests:
            answer = await client.request(method, address, content=body)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            counted[code] += 1
            assert gateway.metrics.requests_refused == counted
    async with http(gateway, None) as stranger:
        for address in ("/v1/events", "/v1/runs"):
            assert (await stranger.get(address)).status_code == 401
            counted["invalid_token"] += 1
            assert gateway.metrics.requests_refused == counted
        assert (await stranger.get("/healthz")).status_code == 200
    for url in (gateway.url, gateway.admin_url):
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"no request\r\n\r\n")
        assert read_problem(await reader.read())[1]["code"] == "bad_request"
        writer.close()
        counted["bad_request"] += 1
    assert gateway.metrics.requests_refused == counted
    assert gateway.metrics.refused == {}


async def test_refused_upgrade_is_counted_as_one_and_as_no_request(gateway: Gateway) -> None:
    await refusal(gateway)
    assert gateway.metrics.refused == {"invalid_token": 1}
    assert gateway.metrics.requests_refused == {}
