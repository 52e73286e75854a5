"""A user's channel through restarts, rewinds, lost keys and odd user ids, on a real Redis."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio

from relay.codec import Position, decode_live
from relay.errors import RedisMisconfigured, RedisUnavailable, RelayError
from relay.events import EventType
from relay.recovery import TextMark, surviving_offset
from relay.scripts import mapped_errors
from tests.conftest import OwnRedis
from tests.integration.script_support import Attempt, Channel, offsets, texts, types

pytestmark = pytest.mark.every_redis

REPLICATE_AT_ONCE = {"repl-diskless-sync-delay": "0"}


@pytest_asyncio.fixture
async def channel(redis_url: str, key_prefix: str) -> AsyncIterator[Channel]:
    async with Channel(redis_url, key_prefix) as channel:
        yield channel


async def persist(channel: Channel) -> None:
    """Do what every caller does while Redis is away: try again."""
    async with asyncio.timeout(10):
        while True:
            try:
                await channel.header()
            except RedisUnavailable:
                await asyncio.sleep(0.01)
            else:
                return


# --- Another instance of the server ---


async def test_a_restart_with_its_file_keeps_every_position(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with Channel(server.url, "t") as channel:
        run = await channel.started()
        before = await channel.header()
        await server.restart()
        await persist(channel)
        after = await channel.header()
        assert after.epoch != before.epoch
        assert surviving_offset(after.previous, before.epoch) == before.offset
        assert offsets(await channel.read()) == [1, 2]
        assert (await run.send(2, run.event()))[0] == b"ok"


async def test_an_older_copy_keeps_the_positions_that_it_has(
    own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = await own_redis()
    async with Channel(server.url, "t") as channel:
        run = await channel.started()
        await run.publish(run.text("m1", 0, "ab"), run.event())
        await channel.client.save()
        copy = tmp_path / "copy.rdb"
        shutil.copy(server.directory / "dump.rdb", copy)
        await run.publish(run.event())
        await run.publish(run.event(), run.event())
        before = await channel.header()
        await server.kill()
        shutil.copy(copy, server.directory / "dump.rdb")
        await server.start()
        await persist(channel)
        # The next events pass the offsets that were lost.
        assert await run.send(5, run.event()) == [b"expected", b"3"]
        for _ in range(5):
            await (await channel.started()).end()
        after = await channel.header()
        assert after.offset > before.offset
        assert surviving_offset(after.previous, before.epoch) == 4


async def test_in_a_new_epoch_open_texts_stand_behind_what_survived(channel: Channel) -> None:
    """Whoever skipped one because it stood further on before the rewind gets it now."""
    run = await channel.started()
    ended = await channel.started()
    await ended.publish(ended.text("m1", 0, "over"))
    await ended.end(EventType.AGENT_ERROR)
    await run.publish(run.text("m1", 0, "a"), run.event(), run.text("m2", 0, "bc"))
    before = await channel.header()
    after_epoch = await channel.rotate(before.epoch)
    page = await channel.read(before.offset)
    assert (page.epoch, page.previous[0]) == (after_epoch, (before.epoch, before.offset))
    assert list(texts(page).values()) == [(0, "a"), (0, "bc")]
    await run.publish(run.text("m2", 2, "d"))
    assert list(texts(await channel.read(page.offset)).values()) == [(0, "bcd")]


async def test_what_is_known_of_a_text_counts_in_its_epoch_only(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "éa"))
    name = f"{run.run_id}:1:m1"
    known = {name: TextMark(name, 2, 1)}
    epoch = await channel.epoch()
    assert texts(await channel.read(known=known, epoch=epoch)) == {3: (1, "a")}
    assert texts(await channel.read(known=known, epoch="another")) == {3: (0, "éa")}
    whole = {name: TextMark(name, 3, 2)}
    assert texts(await channel.read(known=whole, epoch=epoch)) == {}


async def test_a_promoted_replica_begins_a_new_epoch(own_redis: OwnRedis) -> None:
    master = await own_redis(options=REPLICATE_AT_ONCE)
    replica = await own_redis()
    async with master.client() as client, replica.client() as other:
        await other.replicaof("127.0.0.1", master.port)
        async with Channel(master.url, "t") as channel:
            await channel.started()
            before = await channel.header()
            await client.wait(1, 5_000)
            await other.replicaof("NO", "ONE")
            await channel.submit()
        async with Channel(replica.url, "t") as channel:
            await channel.submit()
            after = await channel.header()
            assert after.epoch != before.epoch
            assert surviving_offset(after.previous, before.epoch) == 2


async def test_a_replica_is_asked_anew_after_its_promotion(own_redis: OwnRedis) -> None:
    """Its connections outlive the promotion, and with them what was learned when they were made."""
    master = await own_redis(options=REPLICATE_AT_ONCE)
    replica = await own_redis()
    async with master.client() as client, replica.client() as other:
        await other.replicaof("127.0.0.1", master.port)
        async with Channel(master.url, "t") as channel:
            await channel.started()
            before = await channel.header()
        await client.wait(1, 5_000)
        async with Channel(replica.url, "t", registers=False) as channel:
            assert (await channel.header()).epoch == before.epoch
            await other.replicaof("NO", "ONE")
            after = await channel.header()
    assert (after.epoch != before.epoch, after.offset) == (True, before.offset)


async def test_rotation_is_a_compare_and_set(channel: Channel) -> None:
    await channel.started()
    first = await channel.epoch()
    second = await channel.rotate(first)
    assert second != first
    assert await channel.rotate(first) == second
    assert (await channel.header()).previous == [Position(first, 2)]


async def test_eight_earlier_epochs_are_remembered(channel: Channel) -> None:
    await channel.submit()
    epochs = [await channel.epoch()]
    for _ in range(10):
        epochs.append(await channel.rotate(epochs[-1]))
    previous = (await channel.header()).previous
    assert [entry.epoch for entry in previous] == epochs[-2:-10:-1]


async def test_a_new_epoch_is_announced_to_every_gateway(
    channel: Channel, redis: redis.asyncio.Redis
) -> None:
    await channel.started()
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel.keys.live)
        assert await pubsub.get_message(timeout=5)
        epoch = await channel.rotate(await channel.epoch())
        message = await pubsub.get_message(timeout=5)
        assert decode_live(message["data"]) == (epoch, [])


# --- Lost keys ---


async def test_a_lost_log_raises_the_floor(channel: Channel) -> None:
    run = await channel.started()
    await channel.client.delete(channel.keys.log)
    page = await channel.read()
    assert (page.floor, page.publications) == (2, [])
    await run.publish(run.event())
    page = await channel.read()
    assert (page.floor, offsets(page)) == (2, [3])


async def test_a_lost_channel_begins_a_history_without_leftovers(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "ab"), run.event())
    before = await channel.epoch()
    await channel.client.delete(channel.keys.channel)
    assert (await run.send(3, run.event()))[0] == b"ok"
    page = await channel.read()
    assert (page.floor, page.offset, offsets(page), list(page.previous)) == (0, 1, [1], [])
    assert page.epoch != before
    assert await channel.client.exists(channel.keys.text(run.run_id, 1, "m1")) == 0


async def test_what_a_lost_channel_left_does_not_stand_in_for_new_text(channel: Channel) -> None:
    """Text is not in the log, and leaves the old event at its offset where it is."""
    run = await channel.started()
    await channel.client.delete(channel.keys.channel)
    await run.publish(run.text("m1", 0, "ab"), run.progress())
    page = await channel.read()
    assert (types(page), texts(page)) == (["text_delta"], {1: (0, "ab")})


async def test_a_lost_text_leaves_the_rest_readable(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "ab"), run.event(), run.text("m2", 0, "cd"))
    await channel.client.delete(channel.keys.text(run.run_id, 1, "m1"))
    assert list(texts(await channel.read()).values()) == [(0, "cd")]
    assert await channel.client.zcard(channel.keys.texts) == 1


KEYS = ["channel", "log", "texts", "runs", "threads", "run", "text", "body"]


@pytest.mark.parametrize("name", KEYS)
async def test_losing_any_key_stops_nobody(channel: Channel, name: str) -> None:
    run = await channel.started(thread_id="t")
    await run.publish(run.text("m1", 0, "ab"), run.event(size=70_000))
    keys = channel.keys
    key = {
        "run": keys.run(run.run_id),
        "text": keys.text(run.run_id, 1, "m1"),
        "body": keys.body(4),
    }.get(name) or getattr(keys, name)
    assert await channel.client.delete(key) == 1
    answer = await run.send(3, run.text("m2", 0, "x"), run.event(EventType.AGENT_COMPLETED))
    assert answer[0] == (b"unknown" if name == "run" else b"ok")
    other = await channel.started(thread_id="another")
    await other.end()
    page = await channel.read()
    assert types(page)[-3:] == ["agent_queued", "agent_started", "agent_completed"]
    assert (await channel.header()).offset == page.offset


async def test_a_thread_whose_first_run_is_lost_goes_on(channel: Channel) -> None:
    lost = await channel.submit(thread_id="t")
    await channel.client.delete(channel.keys.run(lost.run_id))
    following = await channel.started(thread_id="t")
    assert (await following.end())[0] == b"ok"


async def test_lost_runs_do_not_fill_the_quota(redis_url: str, key_prefix: str) -> None:
    from relay.run_model import RunLimits

    async with Channel(redis_url, key_prefix, run_limits=RunLimits(max_active=2)) as channel:
        for thread in "ab":
            lost = await channel.submit(thread_id=thread)
            await channel.client.delete(channel.keys.run(lost.run_id))
        assert (await channel.submit(thread_id="c")).status == "queued"


# --- Reading ---


async def test_pages_are_cut_by_bytes_and_continue_where_they_end(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "early"))
    for _ in range(12):
        await run.publish(run.event(size=50_000))
    await run.publish(run.text("m2", 0, "late"))
    seen: list[int] = []
    after, pages = 0, 0
    while after < (await channel.header()).offset:
        page = await channel.read(after)
        assert sum(item.size_bytes for item in page.publications) <= 256 * 1024
        seen += offsets(page)
        after, pages = page.covered, pages + 1
    assert pages > 2
    assert seen == list(range(1, 17))


async def test_a_text_that_moved_on_is_found_at_its_new_place(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "é"))
    for _ in range(6):
        await run.publish(run.event(size=60_000))
    first = await channel.read()
    assert first.covered < first.offset
    assert texts(first) == {3: (0, "é")}
    await run.publish(run.text("m1", 1, "ü", before=2))
    name = f"{run.run_id}:1:m1"
    rest = await channel.read(first.covered, known={name: first.marks[3]})
    assert texts(rest)[10] == (1, "ü")
    assert texts(await channel.read(first.covered))[10] == (0, "éü")


async def test_superseded_and_trimmed_texts_are_not_read(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "first try"))
    await channel.client.hset(channel.keys.run(run.run_id), "attempt", 2)
    assert texts(await channel.read()) == {}
    await channel.client.hset(channel.keys.run(run.run_id), "attempt", 1)
    await run.end(EventType.AGENT_ERROR)
    assert texts(await channel.read()) == {3: (0, "first try")}
    await channel.client.hset(channel.keys.channel, "floor", 4)
    assert texts(await channel.read()) == {}


async def test_the_header_lists_runs_with_what_is_open(channel: Channel) -> None:
    run = await channel.started(thread_id="t1")
    await run.publish(
        run.event(EventType.TOOL_EXECUTING, tool_call_id="c1", tool_name="search"),
        run.event(EventType.TOOL_EXECUTING, tool_call_id="c2", tool_name="mail"),
        run.event(EventType.TOOL_COMPLETED, tool_call_id="c2"),
        run.event(
            EventType.INPUT_REQUESTED,
            request_id="i1",
            prompt="?",
            expires_at="2030-01-01T00:00:00.000Z",
        ),
    )
    page = await channel.header()
    [item] = [summary.as_json() for summary in page.runs]
    assert (item["status"], item["attempt"], item["first_offset"]) == ("waiting", 1, 1)
    assert item["open_tools"] == [{"tool_call_id": "c1", "tool_name": "search"}]
    assert [(one["request_id"], one["prompt"]) for one in item["open_inputs"]] == [("i1", "?")]
    assert page.publications == []


# --- User ids ---

ODD_IDS = ["{}", "a}:live{b", "*", "a:b", "line\nbreak", "%7B", "é", "日本", " ", "\x00", "a" * 256]


async def test_odd_user_ids_stay_apart(redis_url: str, key_prefix: str) -> None:
    attempts: list[Attempt] = []
    channels = [Channel(redis_url, key_prefix, user_id=user_id) for user_id in ODD_IDS]
    for channel in channels:
        async with channel:
            attempts.append(await channel.started())
            await attempts[-1].publish(attempts[-1].event())
    for channel in [Channel(redis_url, key_prefix, user_id=user_id) for user_id in ODD_IDS]:
        async with channel:
            assert offsets(await channel.read()) == [1, 2, 3]


# --- The server itself ---


async def test_the_scripts_work_together_over_a_restart(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with Channel(server.url, "t") as channel:
        await channel.link.check()
        run = await channel.started(thread_id="t")
        waiting = await channel.submit(thread_id="t")
        await run.publish(run.text("m1", 0, "é"), run.event(size=70_000), run.progress())
        before = await channel.header()
        await server.restart()
        await persist(channel)
        after = await channel.header()
        assert surviving_offset(after.previous, before.epoch) == before.offset
        answer = await run.end()
        assert answer[6].decode() == waiting.run_id
        assert types(await channel.read()) == [
            "agent_queued",
            "agent_started",
            "agent_queued",
            "claim",
            "text_delta",
            "agent_completed",
        ]
        outcome = await channel.registry.cancel(channel.user_id, waiting.run_id)
        assert outcome.status == "cancelled"
        assert issubclass(RedisUnavailable, RelayError)


async def test_a_full_redis_is_a_passing_state(own_redis: OwnRedis) -> None:
    server = await own_redis()
    async with Channel(server.url, "t") as channel:
        run = await channel.started()
        await channel.link.client.config_set("maxmemory", "1")
        with pytest.raises(RedisUnavailable, match="maxmemory"):
            await run.send(2, run.event())
        await channel.link.client.config_set("maxmemory", "0")
        assert (await run.send(2, run.event()))[0] == b"ok"


async def test_missing_rights_are_told_apart_from_an_outage(own_redis: OwnRedis) -> None:
    server = await own_redis()
    async with Channel(server.url, "t") as channel:
        await channel.started()
        await channel.link.client.execute_command("ACL", "SETUSER", "default", "-publish")
        with pytest.raises(RedisMisconfigured, match="publish"), mapped_errors(server.url):
            await channel.link.client.publish("t:x", b"")
