"""docker-compose.yml: the same product behind a load balancer, and it outlives a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from tests.support.redis_server import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parents[2]
READY_DEADLINE_S = 90.0
RUN_DEADLINE_S = 30.0
TERMINAL = {"agent_completed", "agent_error", "agent_cancelled"}
SECRETS = ("RELAY_JWT_SECRET", "REDIS_GATEWAY_PASSWORD", "REDIS_WORKER_PASSWORD")
QUESTION = "How does a client resume after a lost connection?"

pytestmark = pytest.mark.needs_docker


def compose_program() -> list[str]:
    """Give the command for Compose: v2 where the plugin is there, else v1."""
    plugin = subprocess.run(
        ["docker", "compose", "version"], capture_output=True, timeout=30, check=False
    )
    if plugin.returncode == 0:
        return ["docker", "compose"]
    standalone = shutil.which("docker-compose")
    assert standalone, "Docker answers, but neither the compose plugin nor docker-compose is there"
    return [standalone]


@dataclass(frozen=True)
class Stack:
    """One started copy of the Compose file."""

    project: str
    port: int
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def compose(self, *words: str, timeout_s: float = 120) -> str:
        done = subprocess.run(
            [*compose_program(), "--project-name", self.project, *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(f"compose {' '.join(words)}: {done.stdout}\n{done.stderr}")
        return done.stdout

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def await_status(self, path: str, wanted: int) -> None:
        deadline = time.monotonic() + READY_DEADLINE_S
        while (status := self.status(path)) != wanted:
            if time.monotonic() > deadline:
                logs = self.compose("logs", "--no-color", "--tail", "40")
                raise AssertionError(f"{path} answers {status}, not {wanted}:\n{logs}")
            time.sleep(0.2)

    def token(self, user_id: str) -> str:
        """Take a token out of the link that the documented command prints."""
        output = self.compose(
            "exec", "-T", "gateway-1", "relay", "token", "--user", user_id, "--url", self.url
        )
        link = next(word for word in output.split() if word.startswith(self.url))
        return parse_qs(urlsplit(link).fragment)["token"][0]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    subprocess.run(
        [ROOT / ".ci/make-images"], env={**os.environ, "PYTHON": sys.executable}, check=True
    )
    project = f"agent-relay-test-{secrets.token_hex(4)}"
    port = free_port()
    started = Stack(
        project,
        port,
        {
            **os.environ,
            **{name: secrets.token_hex(32) for name in SECRETS},
            "PUBLISHED_PORT": str(port),
            "AGENT_RELAY_IMAGE": f"{project}:latest",
        },
    )
    try:
        # One image for all services, built once: they also share one state of the sources.
        started.compose("build", "gateway-1", timeout_s=400)
        started.compose("up", "--no-build", "--detach")
        started.await_status("/readyz", 200)
        yield started
    finally:
        started.compose("down", "--volumes", "--remove-orphans", "--rmi", "local")
        for words in (
            ["rm", "--force", f"{project}:latest"],
            ["prune", "--force", "--filter", "label=agent-relay.stage"],
        ):
            subprocess.run(["docker", "image", *words], capture_output=True, timeout=60, check=True)


@asynccontextmanager
async def awaiting(what: str) -> AsyncIterator[None]:
    """Bound a wait, and say in the failure what it was for."""
    try:
        async with asyncio.timeout(RUN_DEADLINE_S):
            yield
    except TimeoutError:
        raise AssertionError(f"no {what} within {RUN_DEADLINE_S:.0f} s") from None


async def open_connection(stack: Stack, token: str, since: str = "now") -> ClientConnection:
    return await connect(
        f"ws://localhost:{stack.port}/v1/ws?since={since}",
        additional_headers={"Authorization": f"Bearer {token}"},
        origin=Origin(stack.url),
        subprotocols=[Subprotocol("relay.v1")],
        open_timeout=10,
    )


async def receive(connection: ClientConnection, kind: str) -> dict[str, Any]:
    """Give the next frame of a kind."""
    async with awaiting(kind):
        while True:
            frame: dict[str, Any] = json.loads(await connection.recv())
            if frame["type"] == kind:
                return frame


async def receive_run(connection: ClientConnection) -> list[dict[str, Any]]:
    """Give all lifecycle events up to the first terminal one."""
    events: list[dict[str, Any]] = []
    async with awaiting("terminal event"):
        while not events or events[-1]["type"] not in TERMINAL:
            frame = json.loads(await connection.recv())
            assert frame["type"] != "error", frame
            if "seq" in frame:
                events.append(frame)
    return events


async def ask(connection: ClientConnection, content: str) -> None:
    frame = {
        "type": "user_message",
        "id": secrets.token_hex(8),
        "thread_id": "t1",
        "agent": "docs",
        "content": content,
    }
    await connection.send(json.dumps(frame))


def assert_complete(events: list[dict[str, Any]], user_id: str) -> None:
    assert events[0]["type"] == "agent_queued"
    assert events[-1]["type"] == "agent_completed", events[-1]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {event["user_id"] for event in events} == {user_id}
    assert events[-1]["data"]["result"]


@pytest.mark.parametrize("missing", SECRETS)
def test_missing_secret_is_named_before_anything_starts(tmp_path: Path, missing: str) -> None:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    environment = {**os.environ, **dict.fromkeys(SECRETS, "x" * 32)}
    del environment[missing]
    done = subprocess.run(
        [*compose_program(), "config"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert missing in done.stderr


@pytest.mark.timeout(600)
async def test_page_and_runs_through_the_balancer_also_without_one_gateway(stack: Stack) -> None:
    with await asyncio.to_thread(urllib.request.urlopen, f"{stack.url}/", timeout=10) as page:
        assert page.headers["Content-Type"].startswith("text/html")
        assert "default-src" in page.headers["Content-Security-Policy"]
    assert await asyncio.to_thread(stack.status, "/metrics") == 404

    token = await asyncio.to_thread(stack.token, "alice")
    await agent_is_there(stack, token, "docs")
    async with await open_connection(stack, token) as first:
        node = (await receive(first, "connection_established"))["node"]
        # Least connections: the second one goes to the other gateway, sooner or later.
        second, other = await connect_to_another(stack, token, node)
        async with second:
            await ask(first, QUESTION)
            seen_here, seen_there = await asyncio.gather(receive_run(first), receive_run(second))
            assert_complete(seen_here, "alice")
            assert seen_here == seen_there
            assert node != other

            await asyncio.to_thread(stack.compose, "kill", "gateway-1")
            lost = await lost_connection(first, second)
            left = second if lost is first else first
            await ask(left, QUESTION)
            assert_complete(await receive_run(left), "alice")

    await asyncio.to_thread(stack.await_status, "/readyz", 200)
    # Whoever lost the connection comes back with its position and has missed nothing.
    position = str(seen_here[-1]["offset"])
    async with await open_connection(stack, token) as again:
        epoch = (await receive(again, "connection_established"))["position"].split(":")[0]
    async with await open_connection(stack, token, since=f"{epoch}:{position}") as resumed:
        assert (await receive(resumed, "connection_established"))["recovered"] is True
        assert_complete(await receive_run(resumed), "alice")


async def agent_is_there(stack: Stack, token: str, agent: str) -> None:
    """Connect until a worker has announced the agent: gateways are ready without any worker."""
    async with awaiting(f"worker with the agent {agent}"):
        while True:
            async with await open_connection(stack, token) as connection:
                established = await receive(connection, "connection_established")
            if agent in {known["name"] for known in established["agents"]}:
                return
            await asyncio.sleep(0.1)


async def connect_to_another(stack: Stack, token: str, node: str) -> tuple[ClientConnection, str]:
    """Connect until another gateway than ``node`` answers."""
    async with awaiting("connection to another gateway"):
        while True:
            connection = await open_connection(stack, token)
            other: str = (await receive(connection, "connection_established"))["node"]
            if other != node:
                return connection, other
            await connection.close()


async def lost_connection(first: ClientConnection, second: ClientConnection) -> ClientConnection:
    """Give the one of two connections that breaks, which is the one of the killed gateway."""

    async def broken(connection: ClientConnection) -> ClientConnection:
        try:
            while True:
                await connection.recv()
        except ConnectionClosed:
            return connection

    waiting = [asyncio.create_task(broken(connection)) for connection in (first, second)]
    done, pending = await asyncio.wait(
        waiting, timeout=RUN_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
    )
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    assert done, "no connection broke although its gateway was killed"
    return done.pop().result()
