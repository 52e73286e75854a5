"""Input that nobody should send: a clear error at the right place, and the next request works.

What a gateway alone answers is in ``tests/integration/test_gateway_*.py``; this is what needs
workers, processes, and their exit codes. ``tests/README.md`` has the whole list.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgpack
import pytest
import redis.asyncio

from relay.client import Event, RelayClient
from relay.keys import Keys
from relay.tasks import TASK_FIELD
from tests.conftest import OwnRedis
from tests.e2e.agents.marked_agents import mark
from tests.integration.gateway_support import Tab, raw_tab
from tests.support.stack import Stack
from tests.support.stack_process import run_relay

ROOT = Path(__file__).parents[2]
AGENT = "quick"
MAX_CONTENT = 1_000


@pytest.fixture(scope="module")
def stack(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway and a worker, shared: nothing that these tests send may harm the next one."""
    stack = Stack(
        tmp_path_factory.mktemp("bad-input"),
        redis_url,
        key_prefix=f"t{uuid.uuid4().hex[:12]}",
        settings={"MAX_CONTENT_CHARS": MAX_CONTENT},
    )

    async def start() -> None:
        await stack.__aenter__()
        await asyncio.gather(
            stack.start_gateway(), stack.start_worker("tests.e2e.agents.marked_agents:worker", ROOT)
        )

    try:
        asyncio.run(start())
        yield stack
    finally:
        for process in [*stack.gateways, *stack.workers]:
            process.end_blocking()


def headers(stack: Stack, user_id: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.token(user_id)}"}


async def carry_out(stack: Stack, user_id: str, content: str = "hello") -> list[Event]:
    """Ask, and give all events of the run; fail if it does not complete."""
    async with RelayClient(stack.urls, stack.token(user_id), since="now") as client:
        accepted = await client.send_message(content, thread_id="t1", agent=AGENT)
        events = []
        async with asyncio.timeout(20):
            async for event in client:
                events.append(event)
                if event.run_id == accepted.run_id and event.is_terminal:
                    assert event.type == "agent_completed", event
                    break
    assert {event.run_id for event in events} == {accepted.run_id}
    return events


async def assert_refused(tab: Tab, code: str, words: str, **frame: Any) -> None:
    answer = await tab.ask(**frame)
    assert (answer["type"], answer["code"]) == ("error", code), answer
    assert words in answer["message"]
    assert answer["recovery_suggestions"]


# --- Requests ---


async def test_connection_that_sends_everything_wrong_carries_out_the_next_request(
    stack: Stack,
) -> None:
    message = {"type": "user_message", "thread_id": "t1"}
    async with raw_tab(stack.urls[0], headers=headers(stack, "clumsy")) as tab:
        assert (await tab.receive())["type"] == "connection_established"
        await tab.socket.send('{"type": "user_message", "id": ')
        assert (await tab.until("error"))["code"] == "invalid_json"
        await tab.socket.send(b"\x00\x01")
        assert (await tab.until("error"))["code"] == "binary_not_supported"
        await assert_refused(tab, "unknown_type", "launch", type="launch")
        await assert_refused(tab, "invalid_frame", "content", **message, agent=AGENT)
        await assert_refused(tab, "invalid_frame", "empty", **message, agent=AGENT, content="")
        await assert_refused(
            tab,
            "payload_too_large",
            str(MAX_CONTENT),
            **message,
            agent=AGENT,
            content="x" * (MAX_CONTENT + 1),
        )
        await assert_refused(tab, "unknown_agent", AGENT, **message, agent="nobody", content="x")
        await assert_refused(tab, "unknown_run", "no run", type="cancel", run_id="run_x")
        accepted = await tab.ask(**message, agent=AGENT, content="x" * MAX_CONTENT)
        completed = await tab.until("agent_completed", run_id=accepted["run_id"])
        assert mark("clumsy", "x" * MAX_CONTENT) in completed["data"]["result"]
        # Nothing of what was refused became a run.
        assert {event["run_id"] for event in tab.events} == {accepted["run_id"]}


async def test_bad_requests_over_http_are_problems_and_the_next_one_is_carried_out(
    stack: Stack,
) -> None:
    good = {"thread_id": "t1", "agent": AGENT, "content": "hello"}
    bad = {
        "empty": ({**good, "content": ""}, 422, "content"),
        "too long": ({**good, "content": "x" * (MAX_CONTENT + 1)}, 413, str(MAX_CONTENT)),
        "agent": ({**good, "agent": "nobody"}, 404, AGENT),
        "type": ({**good, "content": 5}, 422, "content"),
        "missing": ({"content": "x"}, 422, "thread_id"),
        "list": ([], 422, ""),
    }
    async with httpx.AsyncClient(
        base_url=stack.urls[0], headers=headers(stack, "clumsy"), trust_env=False
    ) as client:
        for name, (body, status, words) in bad.items():
            answer = await client.post("/v1/runs", json=body)
            problem = answer.json()
            assert answer.status_code == status, (name, problem)
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert words in problem["detail"], (name, problem)
            assert problem["recovery_suggestions"]
        answer = await client.post("/v1/runs", content=b'{"thread_id": \xff')
        assert answer.status_code in (400, 422)
        answer = await client.post("/v1/runs", json=good)
        assert answer.status_code == 202
        run_id = answer.json()["run_id"]
        async with asyncio.timeout(20):
            while (run := (await client.get(f"/v1/runs/{run_id}")).json())["status"] != "completed":
                await asyncio.sleep(0.05)
        assert mark("clumsy", "hello") in run["result"]


# --- User ids ---

ODD_USERS = [
    "{victim}",
    "victim}:live",
    "{victim}:live*",
    "*",
    "vic?im",
    "victim\n",
    "\r\nvictim\r\n",
    "%7Bvictim%7D",
    "a:b{c}d:*\x00\t",
    "ünï/çødé\u2028🦊",
    "x" * 256,
]


async def test_odd_user_ids_are_users_like_any_other_through_the_whole_path(stack: Stack) -> None:
    async with raw_tab(stack.urls[0], headers=headers(stack, "victim")) as victim:
        assert (await victim.receive())["type"] == "connection_established"
        stories = await asyncio.gather(*(carry_out(stack, user_id) for user_id in ODD_USERS))
        for user_id, events in zip(ODD_USERS, stories, strict=True):
            assert {event.raw["user_id"] for event in events} == {user_id}
            assert [event.seq for event in events if event.seq] == list(range(1, 7))
            # Offsets from 1: each of them has a channel of its own.
            assert events[0].raw["offset"] == 1
            assert mark(user_id, "hello") in events[-1].data["result"]
            async with httpx.AsyncClient(
                base_url=stack.urls[0], headers=headers(stack, user_id), trust_env=False
            ) as client:
                runs = (await client.get("/v1/runs")).json()["runs"]
            assert [run["run_id"] for run in runs] == [events[0].run_id]
        assert (await victim.ask(type="ping"))["type"] == "pong"
        assert victim.events == []


@pytest.mark.parametrize("user_id", ["", "x" * 257])
async def test_user_ids_that_cannot_be_one_are_refused_at_the_door(
    stack: Stack, user_id: str
) -> None:
    async with httpx.AsyncClient(base_url=stack.urls[0], trust_env=False) as client:
        # Signed by the right key, as by a backend that does not look at its user ids.
        token = jwt.encode({"sub": user_id, "exp": 4_000_000_000}, stack.secret, "HS256")
        answer = await client.post("/v1/tickets", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 401
        assert "sub" in answer.json()["detail"]
    await carry_out(stack, "after")


# --- Tasks ---


def packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


POISON: dict[str, dict[str, bytes]] = {
    "no msgpack": {TASK_FIELD: b"\xc1\xff"},
    "not a task": {TASK_FIELD: packed([1, 2, 3])},
    # A newer version is no poison: it waits for newer workers (test_rolling_upgrade).
    "a version that never was": {
        TASK_FIELD: packed({"v": "one", "user_id": "a", "run_id": "run_x", "agent": AGENT})
    },
    "wrong types": {TASK_FIELD: packed({"v": 1, "user_id": 5, "run_id": None, "agent": []})},
    "no such field": {"other": b"x"},
    "endless": {TASK_FIELD: b"\x91" * 10_000},
}


async def test_tasks_that_no_worker_can_decode_are_parked_and_the_next_one_is_carried_out(
    stack: Stack, redis: redis.asyncio.Redis
) -> None:
    keys = Keys(stack.key_prefix)
    parked = await redis.xlen(keys.dead_letters)
    for fields in POISON.values():
        await redis.xadd(keys.tasks(AGENT), fields)  # type: ignore[arg-type]
    events = await carry_out(stack, "patient")
    assert events[-1].type == "agent_completed"
    async with asyncio.timeout(20):
        while await redis.xlen(keys.dead_letters) < parked + len(POISON):
            await asyncio.sleep(0.05)
        while await redis.xlen(keys.tasks(AGENT)):
            await asyncio.sleep(0.05)
    letters: list[tuple[bytes, dict[bytes, bytes]]] = await redis.xrange(keys.dead_letters)  # type: ignore[assignment]
    for _, letter in letters:
        assert letter[b"agent"] == AGENT.encode()
        assert letter[b"reason"]
    worker = stack.workers[0]
    assert worker.is_running
    assert worker.log.count("task_dead_lettered") == len(POISON)
    stack.assert_no_defects(except_for="task_dead_lettered")


# --- Starting without the Redis that is needed ---


def process_arguments(process: str) -> list[str]:
    """Give the command line that starts a process on free ports."""
    return {
        "gateway": ["gateway", "--port", "0", "--admin-port", "0"],
        "worker": ["worker", "quickstart:worker", "--app-dir", str(ROOT / "examples")],
        "up": ["up", "--port", "0"],
    }[process]


def assert_one_sentence(process: str, url: str, folder: Path, *words: str) -> str:
    """Fail unless a process ends at once with exit code 1 and one line that says why; give it."""
    done = run_relay(
        *process_arguments(process),
        "--redis-url",
        url,
        folder=folder,
        RELAY_JWT_SECRET="s" * 32,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.mark.parametrize("process", ["gateway", "worker", "up"])
def test_redis_that_is_away_at_the_start_is_one_sentence(process: str, tmp_path: Path) -> None:
    url = "redis://127.0.0.1:1/0"
    assert_one_sentence(process, url, tmp_path, url, "does not answer", "RELAY_REDIS_URL")


@pytest.mark.parametrize("process", ["gateway", "worker", "up"])
def test_wrong_scheme_is_one_sentence(process: str, tmp_path: Path) -> None:
    url = "http://127.0.0.1:6379/0"
    assert_one_sentence(process, url, tmp_path, f"RELAY_REDIS_URL='{url}'", "redis://, rediss://")


@pytest.mark.parametrize("process", ["gateway", "worker", "up"])
async def test_wrong_password_and_database_are_one_sentence(
    process: str, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis(password="right password")
    wrong = server.url.replace("right", "wrong")
    line = assert_one_sentence(
        process, wrong, tmp_path, "refuses us", "password in RELAY_REDIS_URL"
    )
    assert "wrong" not in line
    line = assert_one_sentence(process, f"{server.url}99", tmp_path, "refuses us", "DB index")
    assert "right" not in line
