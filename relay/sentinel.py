"""Redis behind Sentinel: each new connection goes to whoever is the master then.

Which node that is, redis-py finds out. When a Sentinel has promoted another one it ends the
connections of the old master; whoever had one connects again, and asks again.
"""

from __future__ import annotations

from typing import Any

from redis.asyncio.connection import BlockingConnectionPool, parse_url
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from relay.sentinel_address import parse_sentinel_url

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
            # Its own text describes each client, down to the objects in it.
            raise MasterNotFoundError(
                f"no Sentinel that answers knows a master named {self.service_name!r} that is well"
            ) from None
        return address


def make_master_pool(url: str, **options: Any) -> tuple[MasterPool, Sentinel]:
    """Make a pool of connections to the master, and what it asks. Nothing is connected yet.

    Args:
        url: See ``relay.sentinel_address``.
        options: Those of the pool and of its connections.

    Raises:
        ValueError: The address is not of that form.
    """
    address = parse_sentinel_url(url)
    # The client library reads what it reads of any address; only the place comes from Sentinels.
    given: dict[str, Any] = {**parse_url(address.redis_url)}
    is_tls = given.pop("connection_class", None) is not None
    for name in ("host", "port"):
        given.pop(name, None)
    timeout_s = min(SENTINEL_TIMEOUT_S, options.get("socket_timeout", SENTINEL_TIMEOUT_S))
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        address.sentinels,
        sentinel_kwargs={
            **{name: value for name, value in given.items() if name.startswith("ssl_")},
            **address.account,
            "ssl": is_tls,
            "retry": options.get("retry"),
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
        },
    )
    pool = MasterPool(  # type: ignore[no-untyped-call]
        address.service, sentinel, ssl=is_tls, **options, **given
    )
    return pool, sentinel
