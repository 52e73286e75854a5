"""What every layer of the tests shares: one real Redis, a key prefix each, and no leaks.

``RELAY_TEST_REDIS`` chooses the Redis of the session:

* unset: a container (testcontainers) where a Docker engine answers, else a process;
* ``docker``: a container, and it is an error when no engine answers (CI);
* ``process``: a ``redis-server`` process, and no test that needs Docker.

The fixtures of the plugin ``relay`` (``relay.testing``) are there as they are for anybody else.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil
import pytest
import pytest_asyncio
import redis
import redis.asyncio

from relay.testing import plugin
from relay.testing.redis_source import running_redis
from tests.support.acl import as_user, install_users
from tests.support.balancer import find_haproxy
from tests.support.browser import NO_BROWSER, NO_FIREFOX, find_browser, find_firefox
from tests.support.redis_server import RedisServer, has_tls
from tests.support.secrets_watch import SecretsWatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from relay.testing.redis_source import SharedRedis
    from relay.testing.streams import StreamWatch

LEAK_DEADLINE_S = 5.0

REMEDIES = {
    "needs_docker": "No Docker engine answers. Start one.",
    "needs_node": "There is no node on PATH. Install it, for example: apt-get install nodejs.",
    "needs_npm": "There is no node or no npm on PATH. Install both: apt-get install nodejs npm.",
    "needs_browser": NO_BROWSER,
    "needs_haproxy": "There is no haproxy on PATH. Install it: apt-get install haproxy.",
    "needs_firefox": NO_FIREFOX,
    "needs_redis_tls": "There is no redis-server with TLS on PATH: apt-get install redis-server.",
}

# --- The choice of Redis, and what this machine can run ---


def pytest_configure(config: pytest.Config) -> None:
    """Decide once which Redis the session uses; refuse a choice that cannot be met."""
    if not config.pluginmanager.has_plugin("relay"):
        # Not every environment has this project installed with its entry points.
        config.pluginmanager.register(plugin, "relay")
    plugin.redis_source(config)
    config.pluginmanager.register(SecretsWatch(config), "secrets-watch")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which Redis is used."""
    return [f"redis: {plugin.redis_source(config).description}"]


def _rank(path: Path) -> int:
    slowest_first = ("e2e", "faults")
    return slowest_first.index(path.parent.name) if path.parent.name in slowest_first else 2


# Last: a tool is not missing where -m or -k has left its tests out already.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out the tests whose tool is missing; where CI is set nothing may be missing."""
    present = {
        "needs_docker": plugin.redis_source(config).kind == "container",
        "needs_node": shutil.which("node") is not None,
        "needs_npm": all(map(shutil.which, ("node", "npm"))),
        "needs_browser": find_browser() is not None,
        "needs_haproxy": find_haproxy() is not None,
        "needs_firefox": find_firefox() is not None,
        "needs_redis_tls": has_tls(),
    }
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    missing_tools: set[str] = set()
    for item in items:
        missing = {
            name
            for name, is_there in present.items()
            if not is_there and item.get_closest_marker(name)
        }
        missing_tools |= missing
        (left_out if missing else kept).append(item)
    if missing_tools and (os.environ.get("CI") or os.environ.get("RELAY_TEST_REDIS") == "docker"):
        raise pytest.UsageError(
            "CI is set, or RELAY_TEST_REDIS is docker, so that no test may be left out. Missing: "
            + " ".join(f"{name}: {REMEDIES[name]}" for name in sorted(missing_tools))
        )
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        config.get_terminal_writer().line(
            f"left out for want of a tool ({', '.join(sorted(missing_tools))}): "
            f"{len(left_out)} tests"
        )
        items[:] = kept
    # Side by side, the files that take longest begin first, so that none is left for the end.
    items.sort(key=lambda item: _rank(item.path))
    for item in kept:
        # Set up right after no_leaks, so that both are torn down after the test's own fixtures; not
        # autouse, because a test without an event loop should not be given one.
        names: list[str] = getattr(item, "fixturenames", [])
        if pytest_asyncio.is_async_test(item) and "no_leaked_tasks" not in names:
            names.insert(names.index("no_leaks") + 1, "no_leaked_tasks")


# --- Redis ---


@pytest.fixture(scope="session")
def relay_redis(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedRedis]:
    """The session's real Redis, with the users of ``deploy/acl``."""
    source = plugin.redis_source(pytestconfig)
    with running_redis(source, tmp_path_factory.mktemp("redis")) as server:
        with redis.Redis.from_url(server.url) as client:
            install_users(client)
        yield server


@pytest.fixture(scope="session")
def relay_redis_login() -> Callable[[str, str], str]:
    """Let the gateways and workers of ``relay_stack`` log in as they do in production."""
    return as_user


@pytest.fixture(scope="session")
def redis_url(relay_redis: SharedRedis) -> str:
    """The address of the session's real Redis, shared by all tests: use ``key_prefix`` on it."""
    return relay_redis.url


@pytest.fixture
def key_prefix() -> str:
    """A value for RELAY_KEY_PREFIX that no other test uses."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest_asyncio.fixture(name="redis")
async def redis_client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """An asyncio client of the session's Redis, closed after the test. Answers are bytes."""
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


class OwnRedis(Protocol):
    """Starts a Redis for this test alone; see ``RedisServer`` for the arguments."""

    async def __call__(
        self,
        *,
        append_only: bool = False,
        password: str | None = None,
        options: Mapping[str, str] | None = None,
        binary: str | None = None,
    ) -> RedisServer:
        """Give the server, started."""
        ...


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A factory of private Redis processes that a test may kill, pause and restart."""
    servers: list[RedisServer] = []

    async def start(
        *,
        append_only: bool = False,
        password: str | None = None,
        options: Mapping[str, str] | None = None,
        binary: str | None = None,
    ) -> RedisServer:
        server = RedisServer(
            tmp_path / f"redis-{len(servers)}",
            append_only=append_only,
            password=password,
            options=options,
            binary=binary,
        )
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        server.kill_blocking()


# --- Streams ---


@pytest.fixture(autouse=True)
def all_streams_are_legal(relay_streams: StreamWatch) -> None:
    """Hold every stream that a test's clients received against the grammar, at the test's end."""


# --- Leaks ---


def open_sockets() -> dict[str, str]:
    """Give this process's sockets: inode link → a description for the failure message."""
    links: dict[str, int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue  # The descriptor that lists the folder, or one closed meanwhile.
        if target.startswith("socket:"):
            links[target] = int(entry.name)
    return {link: describe_socket(fd) for link, fd in links.items()}


def describe_socket(fd: int) -> str:
    """Give what a person needs to recognise the socket behind a descriptor."""
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            try:
                peer = copy.getpeername()
            except OSError:
                peer = "nobody"
            return f"{copy.family.name} {copy.getsockname()} to {peer}"
    except OSError:
        return "a socket that has just been closed"


def child_processes() -> dict[int, str]:
    """Give the direct children of this process, ended but unreaped ones too."""
    children: dict[int, str] = {}
    for child in psutil.Process().children():
        try:
            command = " ".join(child.cmdline()) or f"{child.name()} (ended, not reaped)"
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            command = "ended, not reaped"
        # Python starts it once for a process that uses multiprocessing, and keeps it.
        if "multiprocessing.resource_tracker" not in command:
            children[child.pid] = command
    return children


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves asyncio tasks, sockets or child processes behind.

    Fixtures of a wider scope are set up before this one, so what they hold is not counted.
    """
    sockets, children = open_sockets(), child_processes()
    yield
    deadline = time.monotonic() + LEAK_DEADLINE_S
    while True:
        left = [f"socket: {text}" for key, text in open_sockets().items() if key not in sockets]
        left += [
            f"process {pid}: {text}"
            for pid, text in child_processes().items()
            if pid not in children
        ]
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail("The test left behind\n  " + "\n  ".join(left), pytrace=False)
        time.sleep(0.02)


@pytest_asyncio.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fail a test whose event loop still has tasks when its fixtures are gone."""
    yield
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if not tasks:
        return
    _, pending = await asyncio.wait(tasks, timeout=LEAK_DEADLINE_S)
    if pending:
        names = "\n  ".join(repr(task) for task in pending)
        pytest.fail(f"The test left asyncio tasks behind\n  {names}", pytrace=False)
