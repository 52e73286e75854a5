"""The pool: limits, ownership, the audit trail, and nothing left of what has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict

import pytest
from structlog.testing import capture_logs

from gateway.connection_pool import REPLACED, PoolLimits, WebSocketConnectionPool
from gateway.metrics import GatewayMetrics
from relay.errors import CloseCode, RedisUnavailable, RequestRefused
from relay.places import Holder, Place
from relay.tokens import Identity


class Standing:
    """A connection that only stands in the pool."""

    def __init__(self, place: Place) -> None:
        self.connection_id = place.connection_id
        self.user_id = place.user_id
        self.identity = Identity(place.user_id, 4_000_000_000_000, jti="t1")
        self.client_id = place.client_id
        self.closed: list[tuple[CloseCode, str]] = []

    def close(self, code: CloseCode, reason: str) -> None:
        self.closed.append((code, reason))

    def end_access(self, reason: str) -> None:
        self.closed.append((CloseCode.TOKEN_EXPIRED, reason))

    def drain(self, after_ms: int) -> None:
        self.closed.append((CloseCode.DRAIN, ""))


class Unlimited:
    """Places without Redis: all are granted, or one answer is prepared."""

    def __init__(self) -> None:
        self.held: list[Place] = []
        self.error: Exception | None = None
        self.replaced: Sequence[Holder] = ()
        self.owed_count = 0

    async def take(self, place: Place) -> Sequence[Holder]:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.held.append(place)
        return self.replaced

    async def check_room(self, place: Place) -> None:
        if self.error is not None:
            raise self.error

    def give_back(self, place: Place) -> None:
        self.held.remove(place)


class Setup:
    """A pool and what is around it."""

    def __init__(self, per_user: int = 2, per_node: int = 3) -> None:
        self.places = Unlimited()
        self.metrics = GatewayMetrics()
        self.told: list[tuple[str, str, str]] = []
        self.pool = WebSocketConnectionPool(
            PoolLimits(per_user=per_user, per_node=per_node),
            self.metrics,
            self.places,
            node_id="here",
            tell_replaced=self.tell,
        )

    async def tell(self, node_id: str, user_id: str, connection_id: str) -> None:
        self.told.append((node_id, user_id, connection_id))

    async def open(self, user_id: str, client_id: str | None = None) -> Standing:
        connection = Standing(await self.pool.take_place(user_id, client_id))
        self.pool.register(connection)
        return connection


@pytest.fixture
def setup() -> Setup:
    return Setup()


async def test_connection_is_given_to_its_owner_only(setup: Setup) -> None:
    pool = setup.pool
    connection = await setup.open("alice")
    assert pool.get(connection.connection_id, "alice") is connection
    assert pool.get(connection.connection_id, "bob") is None
    assert pool.get("con_x", "alice") is None
    assert pool.of_user("alice") == (connection,)
    assert pool.of_user("bob") == ()


async def test_limits_are_per_user_and_per_node(setup: Setup) -> None:
    await setup.open("alice")
    await setup.open("alice")
    with pytest.raises(RequestRefused, match="2 connections") as caught:
        await setup.open("alice")
    assert caught.value.http_status == 429
    assert caught.value.retry_after_ms
    await setup.open("bob")
    with pytest.raises(RequestRefused, match="as many connections as it can serve"):
        await setup.open("carol")
    for user_id in ("alice", "carol"):
        with pytest.raises(RequestRefused):
            await setup.pool.check_room(user_id)
    assert len(setup.pool) == len(setup.places.held) == 3


async def test_ten_of_twelve_that_come_at_once_get_in(setup: Setup) -> None:
    crowd = Setup(per_user=100, per_node=10)
    came = await asyncio.gather(*(crowd.open(f"u{n}") for n in range(12)), return_exceptions=True)
    assert [type(one) for one in came] == [Standing] * 10 + [RequestRefused] * 2


async def test_place_counts_before_its_connection_is_open_and_is_free_if_it_never_is() -> None:
    setup = Setup(per_user=1)
    place = await setup.pool.take_place("alice")
    assert len(setup.pool) == 0
    assert setup.pool.get(place.connection_id, "alice") is None
    assert setup.pool.statistics().opening == 1
    with pytest.raises(RequestRefused):
        await setup.pool.take_place("alice")
    setup.pool.give_up(place)
    setup.pool.give_up(place)
    assert setup.places.held == []
    connection = await setup.open("alice")
    setup.pool.give_up(place)
    assert setup.pool.of_user("alice") == (connection,)


@pytest.mark.parametrize("error", [RequestRefused("rate_limited"), RedisUnavailable("away")])
async def test_place_that_redis_does_not_grant_is_not_taken_here(
    setup: Setup, error: Exception
) -> None:
    setup.places.error = error
    with pytest.raises(type(error)):
        await setup.open("alice")
    assert setup.pool.statistics().opening == 0
    assert not setup.pool._by_user


async def test_device_that_comes_back_takes_over_its_place() -> None:
    setup = Setup(per_user=1)
    old = await setup.open("alice", "phone")
    other = await setup.open("bob", "phone")
    setup.places.replaced = [Holder(old.connection_id, "here"), Holder("con_far", "there")]
    new = await setup.open("alice", "phone")
    assert old.closed == [(CloseCode.LIMIT, REPLACED)]
    assert setup.told == [("there", "alice", "con_far")]
    assert new.closed == other.closed == []
    # A signal names the user too: nobody's connection is closed in another's name.
    setup.pool.close_replaced(other.connection_id, "alice")
    assert other.closed == []
    setup.places.replaced = []
    with pytest.raises(RequestRefused):
        await setup.open("alice", "laptop")


async def test_handshake_whose_device_has_come_again_meanwhile_is_refused(setup: Setup) -> None:
    opening = asyncio.create_task(setup.open("alice", "phone"))
    await asyncio.sleep(0)
    (connection_id,) = setup.pool._entries
    setup.pool.close_replaced(connection_id, "bob")
    setup.pool.close_replaced(connection_id, "alice")
    with pytest.raises(RequestRefused, match="newer connection") as caught:
        await opening
    assert caught.value.http_status == 429
    assert caught.value.retry_after_ms
    assert setup.places.held == []
    assert not setup.pool._entries
    opening = asyncio.create_task(setup.open("alice", "phone"))
    await asyncio.sleep(0)
    (connection_id,) = setup.pool._entries
    setup.pool.close_replaced(connection_id, "bob")
    assert (await opening).closed == []


async def test_removal_leaves_no_residue_and_frees_the_place(setup: Setup) -> None:
    empty = asdict(setup.pool.statistics())
    connections = [await setup.open(user_id) for user_id in ("alice", "alice", "bob")]
    statistics = setup.pool.statistics()
    assert (statistics.connections, statistics.users, statistics.largest_user) == (3, 2, 2)
    for connection in connections:
        setup.pool.remove(connection, 1000, "bye")
        setup.pool.remove(connection, 1000, "bye")
    assert asdict(setup.pool.statistics()) == {**empty, "opened": 3, "closed": {"1000": 3}}
    assert not setup.pool._entries
    assert not setup.pool._by_user
    assert list(setup.pool) == []
    assert setup.places.held == []
    await setup.open("bob")


async def test_comings_and_goings_are_counted(setup: Setup) -> None:
    for code in (1000, 1012, 1000):
        setup.pool.remove(await setup.open("alice"), code, "")
    assert setup.metrics.opened == 3
    assert setup.metrics.closed == {"1000": 2, "1012": 1}
    text = setup.metrics.exposition().decode()
    assert 'relay_connections_closed_total{code="1000"} 2.0' in text


async def test_audit_trail_says_who_came_and_why_they_went(setup: Setup) -> None:
    with capture_logs() as lines:
        connection = await setup.open("alice", "phone")
        setup.pool.remove(connection, CloseCode.NO_PONG, "no pong")
    opened, closed = lines
    who = {
        "connection_id": connection.connection_id,
        "user_id": "alice",
        "client_id": "phone",
        "log_level": "info",
    }
    assert opened == {**who, "event": "connection opened", "jti": "t1"}
    assert closed.pop("lasted_s") >= 0
    assert closed == {**who, "event": "connection closed", "code": 4408, "reason": "no pong"}
