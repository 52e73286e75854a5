"""Places in a user's limit, counted over all gateways, on a real Redis."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio
from websockets.exceptions import InvalidStatus

from gateway import place_keeper
from gateway.app import Gateway, running_gateway
from gateway.connection_pool import REPLACED
from gateway.node import RENEW_INTERVAL_S
from gateway.place_keeper import PlaceKeeper
from relay.errors import RedisUnavailable, RequestRefused
from relay.keys import NODE_TTL_MS, PLACES_TTL_MS, Keys
from relay.places import AllTaken, Holder, Place, PlaceBook, PlaceTaken
from relay.scripts import RedisLink, ScriptFailed
from tests.conftest import OwnRedis
from tests.integration.gateway_support import (
    Tab,
    bearer,
    direct_only,
    eventually,
    gateway_settings,
    http,
    raw_tab,
    refusal,
    tab,
)
from tests.support.proxy import RedisProxy


@pytest_asyncio.fixture
async def gateways(
    redis_url: str, key_prefix: str, server: str
) -> AsyncIterator[Sequence[Gateway]]:
    settings = gateway_settings(redis_url, key_prefix, max_connections_per_user=10)
    async with running_gateway(settings) as one, running_gateway(settings) as two:
        yield one, two


@pytest_asyncio.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(redis_url, key_prefix, max_connections_per_user=10)
    async with running_gateway(settings) as running:
        yield running


@pytest_asyncio.fixture
async def link(redis_url: str) -> AsyncIterator[RedisLink]:
    opened = RedisLink(redis_url)
    yield opened
    await opened.aclose()


def connections(key_prefix: str, user_id: str = "alice") -> str:
    return Keys(key_prefix).user(user_id).connections


async def test_ten_of_twelve_get_in_over_two_gateways_and_two_are_told_why(
    gateways: Sequence[Gateway], redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    leave = asyncio.Event()
    answers: list[Any] = []

    async def attempt(gateway: Gateway) -> None:
        try:
            async with raw_tab(gateway, headers=bearer()) as opened:
                answers.append((await opened.receive())["type"])
                await leave.wait()
        except InvalidStatus as error:
            answers.append(error.response.status_code)

    async with asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(attempt(gateways[number % 2]))
        await eventually(lambda: has(answers, 12))
        assert Counter(answers) == {"connection_established": 10, 429: 2}
        assert await redis.hlen(connections(key_prefix)) == 10
        for gateway in gateways:
            response, problem = await refusal(gateway, headers=bearer())
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) > 0
            assert "10 connections" in problem["detail"]
            async with http(gateway) as client:
                # What a browser asks, which cannot see the answer to its upgrade.
                told = await client.post("/v1/tickets")
                assert told.status_code == 429
                assert told.json() == problem
                assert (await client.get("/v1/events")).status_code == 429
            async with tab(gateway, "bob"):
                pass
        leave.set()
    await eventually(lambda: gone(redis, connections(key_prefix)))


@pytest.mark.usefixtures("server")
async def test_full_gateway_refuses_whoever_comes_until_somebody_leaves(
    redis_url: str, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    settings = gateway_settings(redis_url, key_prefix, max_connections_per_node=2)
    async with running_gateway(settings) as gateway, tab(gateway):
        async with tab(gateway, "bob"):
            response, problem = await refusal(gateway, headers=bearer("carol"))
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) > 0
            assert "This gateway has as many connections" in problem["detail"]
            assert not await redis.exists(connections(key_prefix, "carol"))
        await eventually(lambda: has(tuple(gateway.pool), 1))
        async with tab(gateway, "carol") as opened:
            assert await opened.is_alive()


async def has(things: Sequence[object], count: int) -> bool:
    return len(things) == count


async def gone(redis: redis.asyncio.Redis, key: str) -> bool:
    return not await redis.exists(key)


@pytest.mark.usefixtures("server")
async def test_device_that_comes_back_elsewhere_takes_over_its_place(
    redis_url: str, key_prefix: str
) -> None:
    settings = gateway_settings(redis_url, key_prefix, max_connections_per_user=1)
    async with (
        running_gateway(settings) as one,
        running_gateway(settings) as two,
        tab(one, query="?client_id=phone%201") as old,
    ):
        async with http(two) as client:
            assert (await client.post("/v1/tickets")).status_code == 429
            # With the device's name the answer is that of its upgrade.
            assert (await client.post("/v1/tickets?client_id=phone%201")).status_code == 201
        async with tab(two, query="?client_id=phone%201") as new:
            assert await old.closed() == (4429, REPLACED)
            async with tab(two, query="?client_id=phone%201") as newest:
                assert await new.closed() == (4429, REPLACED)
                assert (await refusal(one, headers=bearer()))[0].status_code == 429
                assert await newest.is_alive()


async def test_places_of_a_dead_gateway_are_free_when_its_sign_of_life_is_gone(
    gateways: Sequence[Gateway], redis: redis.asyncio.Redis, link: RedisLink, key_prefix: str
) -> None:
    keys = Keys(key_prefix)
    dead = PlaceBook(link, keys, "gw-dead", 10)
    await redis.set(keys.node("gw-dead"), b"gateway", px=NODE_TTL_MS)
    for number in range(10):
        assert isinstance(await dead.take(Place(f"con_{number}", "alice")), PlaceTaken)
    assert (await refusal(gateways[0], headers=bearer()))[0].status_code == 429
    await redis.delete(keys.node("gw-dead"))
    async with tab(gateways[0]), http(gateways[1]) as client:
        assert (await client.post("/v1/tickets")).status_code == 201
        assert await redis.hlen(connections(key_prefix)) == 1


async def test_gateway_that_was_taken_for_dead_enters_its_places_again(
    gateway: Gateway, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    key = connections(key_prefix)
    async with tab(gateway) as opened, tab(gateway, "bob"):
        before = await redis.hgetall(key)
        await redis.delete(key, connections(key_prefix, "bob"), gateway.node.channel)
        await eventually(lambda: redis.exists(key))
        assert await redis.hgetall(key) == before
        assert await redis.exists(connections(key_prefix, "bob"))
        assert await opened.is_alive()


# It is about the node's own key: which server its connections are on plays no part.
@direct_only
async def test_what_stands_in_place_of_its_sign_of_life_ends_no_gateway(
    gateway: Gateway, redis: redis.asyncio.Redis
) -> None:
    node = gateway.node

    async def is_renewed() -> bool:
        return bool(await redis.type(node.channel) == b"string")

    async with tab(gateway) as opened:
        await redis.delete(node.channel)
        await redis.rpush(node.channel, "not text")
        with pytest.raises(ScriptFailed):
            await node.renew()
        # Longer than between two renewals.
        await asyncio.sleep(1.2 * RENEW_INTERVAL_S)
        await redis.delete(node.channel)
        await eventually(is_renewed)
        assert await opened.is_alive()


@pytest.mark.usefixtures("server")
async def test_open_places_never_expire(
    redis_url: str,
    redis: redis.asyncio.Redis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place_keeper, "HOLD_EVERY_S", 0.2)
    monkeypatch.setattr(place_keeper, "LOOK_EVERY_S", 0.05)
    key = connections(key_prefix)
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway, tab(gateway):
        assert 0 < await redis.pttl(key) <= PLACES_TTL_MS
        await redis.pexpire(key, 2_000)

        async def is_held() -> bool:
            return bool(await redis.pttl(key) > 2_000)

        await eventually(is_held)


async def test_place_nobody_uses_any_more_does_not_keep_its_user_out(
    gateway: Gateway, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    mine = gateway.node.node_id
    left = {f"con_{number}": f"{mine} " for number in range(10)}
    await redis.hset(connections(key_prefix), mapping={**left, "con_x": b"broken"})  # type: ignore[arg-type]
    async with tab(gateway):
        assert await redis.hlen(connections(key_prefix)) == 1


@pytest.mark.usefixtures("server")
async def test_outage_of_redis_ends_no_connection_and_leaves_no_place(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    private = await own_redis()
    async with (
        running_gateway(gateway_settings(private.url, key_prefix)) as gateway,
        private.client() as client,
        tab(gateway) as stays,
    ):
        async with tab(gateway, "bob"):
            await private.kill()
            assert await stays.is_alive()
        # Bob left while nobody could note it, and all places were lost: only one is open.
        await private.start()
        await eventually(lambda: client.exists(connections(key_prefix)))
        await eventually(lambda: settled(gateway))
        assert not await client.exists(connections(key_prefix, "bob"))
        assert await stays.is_alive()


async def settled(gateway: Gateway) -> bool:
    return gateway.pool.statistics().places_owed == 0


async def test_place_whose_answer_was_lost_is_given_back(
    redis_url: str, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    port = int(redis_url.rpartition(":")[2].split("/")[0])
    with RedisProxy(port) as proxy:
        link = RedisLink(proxy.redis_url, timeout_s=0.3)
        book = PlaceBook(link, Keys(key_prefix), "gw-1", 1)
        keeper = PlaceKeeper(book, 1)
        place = Place("con_1", "alice")
        await keeper.check_room(place)
        proxy.lose_next_reply()
        with pytest.raises(RedisUnavailable):
            await keeper.take(place)
        assert await redis.hlen(connections(key_prefix)) == 1
        assert keeper.owed_count == 1
        await keeper.step()
        assert await redis.hlen(connections(key_prefix)) == 0
        # What was sent before may still arrive after what was sent later.
        assert isinstance(await book.take(place), PlaceTaken)
        await keeper.step()
        assert await redis.hlen(connections(key_prefix)) == 0
        assert keeper.owed_count == 0
        await keeper.aclose()
        await link.aclose()


async def test_place_that_may_have_been_entered_again_is_given_back_for_certain(
    redis_url: str, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    port = int(redis_url.rpartition(":")[2].split("/")[0])
    with RedisProxy(port) as proxy:
        link = RedisLink(proxy.redis_url, timeout_s=0.3)
        book = PlaceBook(link, Keys(key_prefix), "gw-1", 2)
        keeper = PlaceKeeper(book, 2)
        leaves_later, leaves_now = Place("con_1", "alice"), Place("con_2", "alice")
        for place in (leaves_later, leaves_now):
            await keeper.take(place)
        keeper.hold_all()
        proxy.lose_next_reply()
        holding = asyncio.create_task(keeper.step())
        await eventually(lambda: is_lost(proxy))
        keeper.give_back(leaves_now)
        with pytest.raises(RedisUnavailable):
            await holding
        keeper.give_back(leaves_later)
        await keeper.step()
        # What was sent before may still arrive after what was sent later.
        await book.hold([leaves_later, leaves_now])
        await keeper.step()
        assert await redis.hlen(connections(key_prefix)) == 0
        assert keeper.owed_count == 0
        await keeper.aclose()
        await link.aclose()


async def is_lost(proxy: RedisProxy) -> bool:
    return proxy.replies_to_lose == 0


async def test_what_stands_in_one_users_way_keeps_no_other_from_a_place(
    gateway: Gateway,
    redis: redis.asyncio.Redis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place_keeper, "HOLD_EVERY_S", 0.0)
    monkeypatch.setattr(place_keeper, "LOOK_EVERY_S", 0.02)
    key = connections(key_prefix)
    async with tab(gateway) as opened, tab(gateway, "bob"):
        await redis.set(key, "not a hash")
        assert (await refusal(gateway, headers=bearer()))[0].status_code == 500
        await eventually(lambda: settled(gateway))
        await redis.delete(connections(key_prefix, "bob"))
        await eventually(lambda: redis.exists(connections(key_prefix, "bob")))
        await redis.delete(key)
        await eventually(lambda: redis.exists(key))
        assert await opened.is_alive()


@pytest.mark.every_redis
async def test_many_places_taken_at_once_are_exact(link: RedisLink, key_prefix: str) -> None:
    books = [PlaceBook(link, Keys(key_prefix), f"gw-{number}", 7) for number in range(3)]
    answers = await asyncio.gather(
        *(
            books[number % 3].take(Place(f"con_{user}_{number}", f"user-{user}"))
            for user in range(40)
            for number in range(12)
        )
    )
    assert Counter(map(type, answers)) == {PlaceTaken: 40 * 7, AllTaken: 40 * 5}


async def test_call_that_cannot_be_sent_fails_and_those_behind_it_are_sent(
    link: RedisLink, key_prefix: str
) -> None:
    book = PlaceBook(link, Keys(key_prefix), "gw-1", 1)
    async with asyncio.timeout(5):
        failed, taken = await asyncio.gather(
            # A lone surrogate has no form in bytes.
            book.take(Place("con_1", "alice", "\ud800")),
            book.take(Place("con_2", "alice")),
            return_exceptions=True,
        )
    assert isinstance(failed, RuntimeError)
    assert isinstance(failed.__cause__, UnicodeEncodeError)
    assert taken == PlaceTaken(())


@pytest.mark.every_redis
async def test_taking_a_place_again_takes_it_once(
    link: RedisLink, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    book = PlaceBook(link, Keys(key_prefix), "gw-1", 1)
    place = Place("con_1", "alice", "a device: {x} é")
    for _ in range(2):
        assert await book.take(place) == PlaceTaken(())
    assert await redis.hlen(connections(key_prefix)) == 1
    keeper = PlaceKeeper(PlaceBook(link, Keys(key_prefix), "gw-1", 1), 1)
    await keeper.take(Place("con_2", "bob"))
    with pytest.raises(RequestRefused):
        await keeper.take(Place("con_3", "bob"))


@pytest.mark.every_redis
async def test_places_that_are_held_count_whatever_the_limit_until_they_are_free(
    link: RedisLink, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    book = PlaceBook(link, Keys(key_prefix), "gw-1", 2)
    held = [Place(f"con_{number}", "alice", "a device") for number in range(3)]
    await book.hold(held)
    assert 0 < await redis.pttl(connections(key_prefix)) <= PLACES_TTL_MS
    another = Place("con_3", "alice")
    refused = await book.take(another)
    assert isinstance(refused, AllTaken)
    assert {holder.connection_id for holder in refused.holders} == {"con_0", "con_1", "con_2"}
    await book.free(held[:2])
    await book.free(held[:1])
    assert await book.take(another) == PlaceTaken(())
    # The device comes back: its old connection gives up its place.
    again = await book.take(Place("con_4", "alice", "a device"), gone=["gw-dead"])
    assert again == PlaceTaken((Holder("con_2", "gw-1"),))
    assert isinstance(await book.look(Place("con_5", "alice")), AllTaken)
    assert await redis.hlen(connections(key_prefix)) == 2


CYCLES = 60
OURS = ("gateway.", "relay.", "uvicorn.", "starlette.")


async def test_connections_that_come_and_go_leave_nothing(
    gateway: Gateway, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    async def cycle(number: int) -> None:
        async with tab(gateway, f"user-{number % 7}", query=f"?client_id=c{number}"):
            pass

    async def count() -> Counter[str]:
        await eventually(lambda: nothing_left(gateway))
        gc.collect()
        names = Counter(f"{type(one).__module__}.{type(one).__name__}" for one in gc.get_objects())
        ours = {name: n for name, n in names.items() if name.startswith(OURS)}
        return Counter({name: n for name, n in ours.items() if "testing" not in name})

    for number in range(20):
        await cycle(number)
    before = await count()
    for number in range(CYCLES):
        await cycle(number)
    assert await count() == before
    assert not [key async for key in redis.scan_iter(f"{key_prefix}:*:connections")]


async def test_peer_that_vanishes_during_the_upgrade_leaves_no_place(
    gateway: Gateway, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    head = (
        f"GET /v1/ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Authorization: {bearer()['Authorization']}\r\n\r\n"
    )
    for _ in range(20):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode())
        await writer.drain()
        writer.transport.abort()
    await eventually(lambda: nothing_left(gateway))
    await eventually(lambda: gone(redis, connections(key_prefix)))


async def nothing_left(gateway: Gateway) -> bool:
    figures = gateway.pool.statistics()
    return figures.connections == figures.opening == figures.places_owed == 0


async def test_statistics_of_the_node(gateway: Gateway) -> None:
    async def stats() -> dict[str, Any]:
        async with http(gateway, "operator", scopes=["relay:admin"]) as client:
            told: dict[str, Any] = (await client.get(gateway.admin_url + "/v1/admin/stats")).json()
            return told

    opened: Tab
    async with tab(gateway) as opened, tab(gateway), tab(gateway, "bob"):
        figures = await stats()
        assert figures["connections"] == 3
        assert (figures["users"], figures["largest_user"], figures["opened"]) == (2, 2, 3)
        assert (figures["max_per_user"], figures["max_connections"]) == (10, 20_000)
        await opened.socket.close()
        await eventually(lambda: has(tuple(gateway.pool), 2))
        assert (await stats())["closed"] == {"1000": 1}
