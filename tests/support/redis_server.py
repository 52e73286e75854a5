"""The Redis processes of the project's own tests: they have the users of ``deploy/acl``."""

from __future__ import annotations

from pathlib import Path

from relay.testing.redis_server import RedisServer as TestingRedisServer
from relay.testing.redis_server import find_redis_server, free_port
from tests.support.acl import server_options

__all__ = ["RedisServer", "find_redis_server", "free_port", "has_tls"]


class RedisServer(TestingRedisServer):
    """A Redis process with the users that gateways and workers log in as."""

    def more_options(self) -> list[str]:
        return server_options()


def has_tls() -> bool:
    """Tell whether the server that ``find_redis_server`` gives was built with TLS."""
    path = find_redis_server()
    return path is not None and b"tls-auth-clients" in Path(path).read_bytes()
