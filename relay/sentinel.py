"""Redis behind Sentinel: each new connection goes to whoever is the master then.

Which node that is, redis-py finds out. When a Sentinel has promoted another one it ends the
connections of the old master; whoever had one connects again, and asks again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import redis.sentinel
from redis.asyncio.connection import BlockingConnectionPool, parse_url
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.sentinel import MasterNotFoundError

from relay.redis_connections import obey_cancellation
from relay.sentinel_address import SentinelAddress, parse_sentinel_url

SENTINEL_TIMEOUT_S = 1.0
"""Sentinels are asked one after the other: one that is gone must not cost much."""


class MasterPool(SentinelConnectionPool, BlockingConnectionPool):
    """A pool whose connections lead to the master, and whose callers wait for a free one."""

    async def get_master_address(self) -> tuple[str, int]:
        """Ask the Sentinels.

        Raises:
            MasterNotFoundError: None of them answers, or knows a master that is well.
        """
        try:
            address: tuple[str, int] = await super().get_master_address()  # type: ignore[no-untyped-call]
        except MasterNotFoundError:
            raise _not_found(self.service_name) from None
        return address


class ThreadMasterPool(redis.sentinel.SentinelConnectionPool):
    """The same for a thread: its calls block."""

    def get_master_address(self) -> tuple[str, int]:
        """Ask the Sentinels.

        Raises:
            MasterNotFoundError: None of them answers, or knows a master that is well.
        """
        try:
            address: tuple[str, int] = super().get_master_address()  # type: ignore[no-untyped-call]
        except MasterNotFoundError:
            raise _not_found(self.service_name) from None
        return address


def _not_found(service: str) -> MasterNotFoundError:
    # The client library's own text describes each client, down to the objects in it.
    return MasterNotFoundError(
        f"no Sentinel that answers knows a master named {service!r} that is well"
    )


class _Parts(NamedTuple):
    """What an address and the options of a pool make of connections.

    Attributes:
        address: What was read.
        to_sentinels: Options of connections to Sentinels.
        to_master: Those of connections to the master, beside the given ones.
    """

    address: SentinelAddress
    to_sentinels: dict[str, Any]
    to_master: dict[str, Any]


def _read(url: str, options: dict[str, Any]) -> _Parts:
    address = parse_sentinel_url(url)
    # The client library reads what it reads of any address; only the place comes from Sentinels.
    given: dict[str, Any] = {**parse_url(address.redis_url)}
    is_tls = given.pop("connection_class", None) is not None
    for name in ("host", "port"):
        given.pop(name, None)
    timeout_s = min(SENTINEL_TIMEOUT_S, options.get("socket_timeout", SENTINEL_TIMEOUT_S))
    to_sentinels = {
        **{name: value for name, value in given.items() if name.startswith("ssl_")},
        **address.account,
        "ssl": is_tls,
        "retry": options.get("retry"),
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
    }
    return _Parts(address, to_sentinels, {**given, "ssl": is_tls})


def make_master_pool(url: str, **options: Any) -> tuple[MasterPool, Sentinel]:
    """Make a pool of connections to the master, and what it asks. Nothing is connected yet.

    Args:
        url: See ``relay.sentinel_address``.
        options: Those of the pool and of its connections.

    Raises:
        ValueError: The address is not of that form.
    """
    address, to_sentinels, to_master = _read(url, options)
    sentinel = Sentinel(address.sentinels, sentinel_kwargs=to_sentinels)  # type: ignore[no-untyped-call]
    for asked in sentinel.sentinels:
        obey_cancellation(asked.connection_pool)
    pool = MasterPool(address.service, sentinel, **options, **to_master)  # type: ignore[no-untyped-call]
    return pool, sentinel


def make_thread_master_pool(
    url: str, **options: Any
) -> tuple[ThreadMasterPool, redis.sentinel.Sentinel]:
    """Make such a pool for a thread. As ``make_master_pool``, for the blocking client."""
    address, to_sentinels, to_master = _read(url, options)
    sentinel = redis.sentinel.Sentinel(address.sentinels, sentinel_kwargs=to_sentinels)  # type: ignore[no-untyped-call]
    pool = ThreadMasterPool(address.service, sentinel, **options, **to_master)  # type: ignore[no-untyped-call]
    return pool, sentinel
