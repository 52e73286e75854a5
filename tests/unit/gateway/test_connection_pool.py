"""The pool: limits, ownership, and nothing left of what has gone."""

from __future__ import annotations

import pytest

from gateway.connection_pool import PoolLimits, PoolStatistics, WebSocketConnectionPool
from gateway.metrics import GatewayMetrics
from relay.errors import CloseCode, RequestRefused
from relay.tokens import Identity


class Standing:
    """A connection that only stands in the pool."""

    def __init__(self, connection_id: str, user_id: str) -> None:
        self.connection_id = connection_id
        self.user_id = user_id
        self.identity = Identity(user_id, 4_000_000_000_000)
        self.client_id = None
        self.calls: list[str] = []

    def close(self, code: CloseCode, reason: str) -> None:
        self.calls.append("close")

    def end_access(self, reason: str) -> None:
        self.calls.append("end_access")

    def drain(self, after_ms: int) -> None:
        self.calls.append("drain")


@pytest.fixture
def pool() -> WebSocketConnectionPool:
    return WebSocketConnectionPool(PoolLimits(per_user=2, per_node=3), GatewayMetrics())


def test_connection_is_given_to_its_owner_only(pool: WebSocketConnectionPool) -> None:
    connection = Standing("c", "alice")
    pool.register(connection)
    assert pool.get("c", "alice") is connection
    assert pool.get("c", "bob") is None
    assert pool.get("d", "alice") is None
    assert pool.of_user("alice") == (connection,)
    assert pool.of_user("bob") == ()


def test_limits_are_per_user_and_per_node(pool: WebSocketConnectionPool) -> None:
    pool.register(Standing("1", "alice"))
    pool.register(Standing("2", "alice"))
    with pytest.raises(RequestRefused, match="2 connections") as caught:
        pool.register(Standing("3", "alice"))
    assert caught.value.http_status == 429
    assert caught.value.retry_after_ms
    pool.register(Standing("4", "bob"))
    with pytest.raises(RequestRefused, match="as many connections as it can serve"):
        pool.register(Standing("5", "carol"))
    assert len(pool) == 3


def test_removal_leaves_no_residue_and_frees_the_place(pool: WebSocketConnectionPool) -> None:
    connections = [Standing("1", "alice"), Standing("2", "alice"), Standing("3", "bob")]
    for connection in connections:
        pool.register(connection)
    assert pool.statistics() == PoolStatistics(connections=3, users=2, largest_user=2)
    for connection in connections:
        pool.remove(connection, 1000, "bye")
        pool.remove(connection, 1000, "bye")
    assert pool.statistics() == PoolStatistics(connections=0, users=0, largest_user=0)
    assert not pool._by_id
    assert not pool._by_user
    assert list(pool) == []
    pool.register(Standing("3", "alice"))


def test_comings_and_goings_are_counted() -> None:
    metrics = GatewayMetrics()
    pool = WebSocketConnectionPool(PoolLimits(per_user=2), metrics)
    for name, code in (("1", 1000), ("2", 1012), ("3", 1000)):
        connection = Standing(name, "alice")
        pool.register(connection)
        pool.remove(connection, code, "")
    assert metrics.opened == 3
    assert metrics.closed == {"1000": 2, "1012": 1}
    assert 'relay_connections_closed_total{code="1000"} 2.0' in metrics.exposition().decode()
