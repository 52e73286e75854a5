"""Script calls of many callers on one connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from relay.errors import RedisUnavailable
from relay.keys import Keys
from relay.script_line import ScriptLine
from relay.scripts import RedisLink, ScriptCall, ScriptFailed
from tests.support.proxy import RedisProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import redis.asyncio

    from tests.conftest import OwnRedis


@pytest_asyncio.fixture
async def link(redis_url: str) -> AsyncIterator[RedisLink]:
    made = RedisLink(redis_url)
    yield made
    await made.aclose()


def place(link: RedisLink, key_prefix: str, user_id: str, limit: int = 1) -> ScriptCall:
    keys = (Keys(key_prefix).user(user_id).connections,)
    return ScriptCall(link.scripts["place_take"], keys, "", (f"con-{user_id}", "gw-1", "", limit))


def port_of(redis_url: str) -> int:
    return int(redis_url.rpartition(":")[2].split("/")[0])


@pytest.mark.every_redis
async def test_each_caller_gets_its_own_answers(
    link: RedisLink, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    line = ScriptLine(link)

    async def ask(number: int) -> list[Any]:
        # Where there is no place at all, the answer is 0.
        calls = [place(link, key_prefix, f"u-{number}-{at}", at % 2) for at in range(number % 4)]
        return [answer[0] for answer in await line.run_each(calls)]

    answers = await asyncio.gather(*map(ask, range(200)))
    assert answers == [[at % 2 for at in range(number % 4)] for number in range(200)]
    assert len([name async for name in redis.scan_iter(f"{key_prefix}*")]) == 100


@pytest.mark.every_redis
async def test_scripts_that_redis_has_forgotten_are_loaded_again(
    link: RedisLink, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    line = ScriptLine(link)
    await line.run_each([place(link, key_prefix, "alice")])
    await redis.script_flush()
    calls = [place(link, key_prefix, f"user-{number}") for number in range(20)]
    read = link.call("read", Keys(key_prefix).user("bob"), None, 0, 1_000, "", "")
    answers = await asyncio.gather(
        *(line.run_each([call]) for call in calls), line.run_each([calls[0], read])
    )
    assert all(answer[0][0] == 1 for answer in answers)
    assert len(answers[-1][1]) == 8


async def test_call_that_fails_hides_no_other_answer(
    link: RedisLink, redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    line = ScriptLine(link)
    calls = [place(link, key_prefix, user_id) for user_id in ("alice", "bob")]
    await redis.set(calls[0].keys[0], "not a hash")
    failed, taken = await line.run_each(calls)
    assert isinstance(failed, ScriptFailed)
    assert taken == [1]


async def test_caller_that_leaves_takes_no_answer_with_it(link: RedisLink, key_prefix: str) -> None:
    line = ScriptLine(link)
    await line.run_each([place(link, key_prefix, "alice")])
    left = [
        asyncio.create_task(line.run_each([place(link, key_prefix, "bob", 0)])) for _ in range(3)
    ]
    await asyncio.sleep(0)
    left[0].cancel()  # Before it has been sent.
    await asyncio.sleep(0)
    left[1].cancel()  # While it is answered.
    answer = await line.run_each([place(link, key_prefix, "carol")])
    assert answer == [[1]]
    assert await left[2] == [[0]]
    assert [task.cancelled() for task in left] == [True, True, False]


async def test_lost_connection_fails_what_is_under_way_and_is_made_again(
    redis_url: str, key_prefix: str
) -> None:
    with RedisProxy(port_of(redis_url)) as proxy:
        link = RedisLink(proxy.redis_url, timeout_s=0.3)
        line = ScriptLine(link)
        await line.run_each([place(link, key_prefix, "alice")])
        proxy.lose_next_reply()
        calls = [line.run_each([place(link, key_prefix, f"user-{at}")]) for at in range(10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, RedisUnavailable) for answer in answers)
        assert await line.run_each([place(link, key_prefix, "alice")]) == [[1]]
        await link.aclose()


async def test_connection_that_answers_nothing_is_given_up(redis_url: str, key_prefix: str) -> None:
    with RedisProxy(port_of(redis_url)) as proxy:
        link = RedisLink(proxy.redis_url, timeout_s=0.3)
        line = ScriptLine(link)
        await line.run_each([place(link, key_prefix, "alice")])
        proxy.blackhole()
        async with asyncio.timeout(5):
            with pytest.raises(RedisUnavailable, match="answer"):
                await line.run_each([place(link, key_prefix, "alice")])
            proxy.accept()
            assert await line.run_each([place(link, key_prefix, "alice")]) == [[1]]
        await link.aclose()


async def test_server_that_became_a_replica_is_connected_to_anew(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    link = RedisLink((await own_redis()).url)
    line = ScriptLine(link)
    await line.run_each([place(link, key_prefix, "alice")])
    before = line._pipeline
    await link.client.replicaof("127.0.0.1", "1")
    with pytest.raises(RedisUnavailable):
        await line.run_each([place(link, key_prefix, "alice")])
    await link.client.replicaof("NO", "ONE")
    assert await line.run_each([place(link, key_prefix, "alice")]) == [[1]]
    assert line._pipeline is not before
    await link.aclose()


async def test_nothing_is_asked_when_the_link_is_closed(redis_url: str, key_prefix: str) -> None:
    link = RedisLink(redis_url)
    line = ScriptLine(link)
    under_way = asyncio.create_task(line.run_each([place(link, key_prefix, "alice")]))
    await asyncio.sleep(0)
    await link.aclose()
    assert await under_way == [[1]]
    with pytest.raises(RedisUnavailable):
        await line.run_each([place(link, key_prefix, "alice")])
