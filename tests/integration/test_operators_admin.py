"""What operators ask of a gateway's internal listener, on real sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from agent_worker import Run, Worker
from gateway.app import Gateway, running_gateway
from relay.codec import Task, encode_task
from relay.keys import Keys
from relay.run_model import AgentInfo
from relay.runs import RunRegistry
from relay.tasks import bury
from tests.conftest import OwnRedis
from tests.integration.gateway_support import bearer, eventually, gateway_settings, http, tab
from tests.support.acl import settings_as

LETTERS = "/v1/admin/dead-letters"


@pytest_asyncio.fixture
async def gateway(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as started:
        yield started


def admin(gateway: Gateway, **claims: Any) -> httpx.AsyncClient:
    claims.setdefault("scopes", ["relay:admin"])
    headers = bearer("operator", **claims)
    return httpx.AsyncClient(base_url=gateway.admin_url, headers=headers, trust_env=False)


async def bury_some(gateway: Gateway, *payloads: bytes) -> None:
    keys = Keys(gateway.settings.key_prefix)
    await RunRegistry(gateway.link, keys).register_agents([AgentInfo("echo")])
    for payload in payloads:
        await bury(gateway.link, keys, "echo", payload, "it was broken")


async def test_stats_show_workers_what_they_run_and_what_waits(gateway: Gateway) -> None:
    worker, done = Worker("research"), asyncio.Event()

    @worker.agent("hold")
    async def hold(_: Run) -> str:
        await done.wait()
        return "done"

    settings = gateway.settings.model_copy(update={"worker_concurrency": 1})
    settings = settings_as(settings, "worker")
    async with (
        tab(gateway),
        worker.running(settings) as running,
        admin(gateway) as operator,
        http(gateway) as user,
    ):
        await bury_some(gateway, b"nonsense")
        run_ids = []
        for number in range(3):
            body = {"thread_id": f"t{number}", "agent": "hold", "content": "go"}
            run_ids.append((await user.post("/v1/runs", json=body)).json()["run_id"])

        async def busy() -> dict[str, Any] | None:
            answer = await operator.get("/v1/admin/stats")
            assert answer.status_code == 200
            figures: dict[str, Any] = answer.json()
            return figures if any(each["active"] for each in figures["workers"]) else None

        figures = await eventually(busy)
        assert (figures["connections"], figures["users"]) == (1, 1)
        assert figures["dead_letters"] == 1
        [shown] = figures["workers"]
        assert shown["worker_id"] == running.worker_id
        assert (shown["name"], shown["agents"], shown["active"]) == ("research", ["hold"], 1)
        [run] = shown["runs"]
        assert (run["run_id"], run["user_id"], run["agent"]) == (run_ids[0], "alice", "hold")
        queues = {queue["agent"]: queue for queue in figures["queues"]}
        assert queues["hold"]["in_hand"]["count"] == 1
        assert queues["hold"]["waiting"]["count"] == 2
        assert queues["hold"]["waiting"]["oldest_age_ms"] >= 0
        assert queues["echo"]["waiting"] == {"count": 0, "oldest_age_ms": None}
        done.set()


async def test_stats_of_the_gateway_do_not_need_redis(
    own_redis: OwnRedis, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    server = await own_redis()
    async with (
        running_gateway(gateway_settings(server.url, key_prefix)) as gateway,
        admin(gateway) as operator,
    ):
        assert (await operator.get("/v1/admin/stats")).json()["workers"] == []
        await server.stop()
        figures = (await operator.get("/v1/admin/stats")).json()
        assert figures["node"] == gateway.node.node_id
        assert figures["workers"] is figures["queues"] is figures["dead_letters"] is None
        answer = await operator.get(LETTERS)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        await server.start()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/admin/stats"),
        ("GET", LETTERS),
        ("GET", f"{LETTERS}/1-1"),
        ("POST", f"{LETTERS}/1-1/requeue"),
        ("DELETE", f"{LETTERS}/1-1"),
    ],
)
async def test_only_operators_may_and_only_on_the_internal_listener(
    gateway: Gateway, method: str, path: str
) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        inside, outside = gateway.admin_url + path, gateway.url + path
        assert (await client.request(method, inside)).status_code == 401
        assert (await client.request(method, inside, headers=bearer())).status_code == 403
        scoped = bearer(scopes=["relay:admin"])
        assert (await client.request(method, inside, headers=scoped)).status_code in (200, 404)
        assert (await client.request(method, outside, headers=scoped)).status_code == 404


async def test_dead_letters_are_listed_in_pages(gateway: Gateway) -> None:
    await bury_some(gateway, *(b"nonsense %d" % number for number in range(3)))
    async with admin(gateway) as operator:
        first = (await operator.get(LETTERS, params={"limit": 2})).json()
        assert first["count"] == 3
        assert len(first["dead_letters"]) == 2
        rest = (await operator.get(LETTERS, params={"before": first["before"]})).json()
        assert len(rest["dead_letters"]) == 1
        assert rest["before"] is None
        letter = first["dead_letters"][0]
        assert (letter["reason"], letter["agent"], letter["run_id"]) == (
            "it was broken",
            "echo",
            None,
        )
        assert (await operator.get(f"{LETTERS}/{letter['id']}")).json() == letter


@pytest.mark.parametrize(
    "params", [{"limit": "0"}, {"limit": "201"}, {"limit": "many"}, {"before": "x"}]
)
async def test_pages_that_cannot_be_are_refused(gateway: Gateway, params: dict[str, str]) -> None:
    async with admin(gateway) as operator:
        answer = await operator.get(LETTERS, params=params)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_frame")
        assert answer.json()["recovery_suggestions"]


async def test_dead_letter_is_requeued_or_dropped_once(gateway: Gateway) -> None:
    gone = encode_task(Task("alice", "run_gone", "echo"))
    await bury_some(gateway, b"nonsense", gone)
    async with admin(gateway) as operator:
        lost, nonsense = (await operator.get(LETTERS)).json()["dead_letters"]
        assert (lost["run_id"], lost["payload"]) == ("run_gone", None)

        refused = await operator.post(f"{LETTERS}/{lost['id']}/requeue")
        assert (refused.status_code, refused.json()["code"]) == (404, "unknown_run")
        assert (await operator.delete(f"{LETTERS}/{lost['id']}")).status_code == 204
        assert (await operator.delete(f"{LETTERS}/{lost['id']}")).status_code == 404

        requeued = await operator.post(f"{LETTERS}/{nonsense['id']}/requeue")
        assert requeued.status_code == 202
        assert requeued.json() == {
            "how": "task",
            "agent": "echo",
            "run_id": None,
            "duplicate": False,
        }
        again = await operator.post(f"{LETTERS}/{nonsense['id']}/requeue")
        assert (again.status_code, again.json()["code"]) == (404, "not_found")
        assert (await operator.get(LETTERS)).json()["count"] == 0
