"""A client of Redis for one thread: its calls block, and nothing is repeated by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, ConnectionPool
from redis.retry import Retry

from relay.sentinel import make_thread_master_pool
from relay.sentinel_address import SENTINEL_SCHEMES


@contextmanager
def thread_client(
    url: str, *, timeout_s: float, on_connect: Callable[[AbstractConnection], None]
) -> Iterator[redis.Redis]:
    """Give a client with one connection, which is made when it is needed.

    Args:
        url: An address as ``relay.config`` gives it, that of a master's Sentinels too.
        timeout_s: How long a connection attempt or an answer may take.
        on_connect: Called with each new connection; it has to begin with ``on_connect()`` of it.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": 1,
        "redis_connect_func": on_connect,
    }
    with ExitStack() as closing:
        pool: ConnectionPool
        if url.partition("://")[0] in SENTINEL_SCHEMES:
            pool, sentinel = make_thread_master_pool(url, **options)
            for asked in sentinel.sentinels:
                closing.callback(asked.close)
        else:
            pool = ConnectionPool.from_url(url, **options)
        closing.callback(pool.disconnect)
        yield redis.Redis(connection_pool=pool)
