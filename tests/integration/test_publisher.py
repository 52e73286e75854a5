"""The publisher on a real Redis: everything once, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
import pytest_asyncio
import redis.asyncio
from structlog.testing import capture_logs

import relay.publisher
from relay.batch_sender import MOST_FAILURES
from relay.codec import Task
from relay.columns import Columns
from relay.errors import GrammarViolation, InvalidEvent, PublishRefused, RunEnded, StaleFence
from relay.events import EventType
from relay.keys import BODY_PIECE_BYTES, Keys
from relay.pipeline import Pipeline
from relay.publisher import Publisher
from relay.recovery import Page
from relay.run_stream import STREAM_BUFFER_BYTES, RunStream
from relay.scripts import RedisLink
from relay.staging import read_large_event
from relay.tasks import dispatch
from tests.conftest import OwnRedis
from tests.integration.script_support import Channel, texts, types
from tests.support.proxy import RedisProxy


@pytest_asyncio.fixture
async def channel(redis_url: str, key_prefix: str) -> AsyncIterator[Channel]:
    async with Channel(redis_url, key_prefix) as channel:
        yield channel


@asynccontextmanager
async def publishing(channel: Channel, **options: object) -> AsyncIterator[RunStream]:
    """Give a stream of a claimed run that has started."""
    submitted = await channel.submit(**options)
    async with Publisher(channel.link, channel.all_keys, merge_ms=5) as publisher:
        stream = publisher.open(await channel.claim(submitted.run_id))
        await stream.publish(EventType.AGENT_STARTED, {})
        yield stream


async def think(stream: RunStream, number: int) -> None:
    await stream.publish(EventType.AGENT_THINKING, {"thought": str(number)})


async def complete(stream: RunStream, result: object = None) -> None:
    await stream.finish(EventType.AGENT_COMPLETED, {"result": result, "duration_ms": 1})


async def read_all(channel: Channel) -> list[Page]:
    pages, after = [], 0
    while True:
        page = await channel.read(after)
        pages.append(page)
        after = page.covered
        if after >= page.offset:
            return pages


async def thoughts(channel: Channel) -> list[int]:
    found = []
    for page in await read_all(channel):
        for item in page.publications:
            event = orjson.loads(item.event)
            if event["type"] == "agent_thinking":
                found.append(int(event["data"]["thought"]))
    return found


async def test_killed_connections_double_and_lose_nothing(
    channel: Channel, redis: redis.asyncio.Redis
) -> None:
    async with publishing(channel) as stream:
        for number in range(120):
            await think(stream, number)
            await stream.delta("é")
            if number % 15 == 0:
                await redis.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.002)
        await complete(stream)
    assert await thoughts(channel) == list(range(120))
    joined = [text for page in await read_all(channel) for _, text in texts(page).values()]
    assert "".join(joined) == stream.text == "é" * 120


async def test_a_new_connection_gets_its_own_time_to_answer(
    channel: Channel, redis_url: str
) -> None:
    submitted = await channel.submit()
    claim = await channel.claim(submitted.run_id)
    with RedisProxy(int(redis_url.rpartition(":")[2].split("/")[0])) as proxy:
        link = RedisLink(proxy.redis_url)
        async with Publisher(link, channel.all_keys) as publisher:
            sender = publisher._sender
            stream = publisher.open(claim)
            await stream.publish(EventType.AGENT_STARTED, {})
            await stream.flush()
            proxy.blackhole()
            await think(stream, 0)
            async with asyncio.timeout(5):
                while not sender._in_flight:
                    await asyncio.sleep(0)
                proxy.refuse()
                while sender._in_flight:
                    await asyncio.sleep(0.005)
            # What is left of the old one's time would end the next one before it can answer.
            assert sender._watch_timer is None
            proxy.accept()
            await complete(stream)
        await link.aclose()
    assert await thoughts(channel) == [0]


async def test_a_restart_with_its_file_doubles_and_loses_nothing(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with Channel(server.url, "t") as channel, publishing(channel) as stream:
        for number in range(20):
            await think(stream, number)
        await stream.flush()
        await server.kill()
        for number in range(20, 40):
            await think(stream, number)
        await server.start()
        await complete(stream)
        assert await thoughts(channel) == list(range(40))


async def test_what_an_older_copy_lacks_is_sent_again(own_redis: OwnRedis, tmp_path: Path) -> None:
    server = await own_redis()
    async with Channel(server.url, "t") as channel, publishing(channel) as stream:
        for number in range(10):
            await think(stream, number)
        await stream.delta("first ")
        await stream.flush()
        await channel.client.save()
        shutil.copy(server.directory / "dump.rdb", tmp_path / "copy.rdb")
        await stream.delta("second ")
        for number in range(10, 20):
            await think(stream, number)
            await stream.flush()
        await server.kill()
        shutil.copy(tmp_path / "copy.rdb", server.directory / "dump.rdb")
        await server.start()
        await think(stream, 20)
        await complete(stream)
        assert await thoughts(channel) == list(range(21))
        page = (await read_all(channel))[-1]
        assert [text for _, text in texts(page).values()] == ["first second "]


async def test_while_redis_is_away_the_agent_waits_at_the_bound(own_redis: OwnRedis) -> None:
    server = await own_redis(append_only=True)
    async with Channel(server.url, "t") as channel, publishing(channel) as stream:
        await stream.flush()
        await server.stop()
        sent = 0

        async def stream_on() -> None:
            nonlocal sent
            for _ in range(30):
                await stream.delta("x" * 100_000)
                sent += 1

        agent = asyncio.create_task(stream_on())
        done, _ = await asyncio.wait([agent], timeout=1.0)
        assert not done
        assert sent * 100_000 <= STREAM_BUFFER_BYTES + 200_000
        await server.start()
        await agent
        await complete(stream)
        pages = await read_all(channel)
        sizes = [item.size_bytes for page in pages for item in page.publications if item.kind]
        assert sizes == [3_000_000]


async def test_a_superseded_attempt_learns_it_and_publishes_nothing(channel: Channel) -> None:
    refused: list[PublishRefused] = []
    submitted = await channel.submit()
    async with Publisher(channel.link, channel.all_keys) as publisher:
        claim = await channel.claim(submitted.run_id)
        stream = publisher.open(claim, on_refused=refused.append)
        await channel.client.hset(channel.keys.run(claim.run_id), "fence", "another")
        await stream.publish(EventType.AGENT_STARTED, {})
        with pytest.raises(StaleFence):
            await stream.flush()
        with pytest.raises(StaleFence):
            await stream.delta("more")
    assert [type(one) for one in refused] == [StaleFence]
    assert types(await channel.read()) == ["agent_queued"]


async def test_the_first_terminal_event_wins(channel: Channel) -> None:
    async with publishing(channel) as stream:
        await stream.flush()
        await channel.client.hset(channel.keys.run(stream.claim.run_id), "status", "cancelled")
        with pytest.raises(RunEnded):
            await complete(stream)


async def test_what_is_not_legal_reaches_nobody(channel: Channel) -> None:
    async with publishing(channel) as stream:
        with pytest.raises(InvalidEvent):
            await stream.publish(EventType.AGENT_THINKING, {"thouhgt": "x"})
        with pytest.raises(GrammarViolation):
            await stream.publish(EventType.AGENT_STARTED, {})
        with pytest.raises(UnicodeEncodeError):
            await stream.delta("\ud800")
        await complete(stream)
    assert types(await channel.read()) == ["agent_queued", "agent_started", "agent_completed"]


async def test_the_end_closes_what_is_open(channel: Channel) -> None:
    async with publishing(channel) as stream:
        tool = {"tool_call_id": "c", "tool_name": "search", "parameters": {"token": "secret"}}
        await stream.publish(EventType.TOOL_EXECUTING, tool)
        await stream.progress("c", 50)
        await complete(stream)
    page = await channel.read()
    assert types(page)[2:] == ["tool_executing", "tool_completed", "agent_completed"]
    assert b"secret" not in b"".join(item.event for item in page.publications)


async def test_cancelling_an_agent_mid_publish_leaves_whole_events(channel: Channel) -> None:
    async with publishing(channel) as stream:

        async def work() -> None:
            for number in range(10_000):
                await think(stream, number)
                await stream.flush()

        agent = asyncio.create_task(work())
        while not await thoughts(channel):
            await asyncio.sleep(0.005)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        await stream.finish(EventType.AGENT_CANCELLED, {"by": "user", "duration_ms": 1})
    found = await thoughts(channel)
    assert found == list(range(len(found)))


async def test_the_next_run_of_the_thread_is_dispatched(channel: Channel) -> None:
    async with publishing(channel, thread_id="t") as stream:
        following = await channel.submit(thread_id="t")
        await complete(stream)
        async with asyncio.timeout(10):
            while await channel.client.xlen(channel.all_keys.tasks("docs")) < 2:
                await asyncio.sleep(0.005)
    await channel.claim(following.run_id)


async def test_one_runs_broken_key_holds_up_no_other(channel: Channel) -> None:
    submitted = [await channel.submit() for _ in range(2)]
    async with Publisher(channel.link, channel.all_keys) as publisher:
        broken, stream = [publisher.open(await channel.claim(one.run_id)) for one in submitted]
        key = channel.keys.text(broken.claim.run_id, 1, "m1")
        await channel.client.hset(key, "not", "a string")
        for one in (broken, stream):
            await one.publish(EventType.AGENT_STARTED, {})
        await broken.delta("x")
        await stream.delta("y")
        await complete(stream)
        with pytest.raises(PublishRefused):
            await broken.flush()
        await channel.client.delete(key)
    for page in await read_all(channel):
        seqs = [item.seq for item in page.publications if item.run_id == stream.claim.run_id]
        assert seqs == [1, 2, 0, 3]


async def test_large_events_survive_cut_connections_and_lost_pieces(
    channel: Channel, redis: redis.asyncio.Redis
) -> None:
    values = [character * (3 << 20) for character in "abc"]
    async with publishing(channel) as stream:
        await stream.flush()

        async def disturb() -> None:
            for number in range(1_000):
                await redis.client_kill_filter(_type="normal", skipme=True)
                if number == 3:
                    await redis.delete(channel.keys.upload(stream.claim.fence, 2, 0))
                await asyncio.sleep(0.01 * 1.2**number)

        disturbing = asyncio.create_task(disturb())
        for value in values:
            await stream.publish(EventType.CUSTOM, {"name": "n", "value": value})
        await complete(stream, "d" * (3 << 20))
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)
    for offset, value in enumerate(values, 3):
        event = orjson.loads(await read_large_event(channel.link, channel.keys.body(offset)) or b"")
        assert event["data"]["value"] == value
    detail = await channel.registry.get(channel.user_id, stream.claim.run_id)
    assert detail is not None
    assert detail.as_json()["result"] == "d" * (3 << 20)
    assert not [name async for name in redis.scan_iter("*:upload:*")]


async def test_a_large_event_reaches_redis_in_small_steps(own_redis: OwnRedis) -> None:
    server = await own_redis()
    async with Channel(server.url, "t") as channel, publishing(channel) as stream:
        await stream.flush()
        await channel.client.config_resetstat()
        await complete(stream, "x" * (10 << 20))
        stats = await channel.client.info("commandstats")
        # The size, the pieces, and what publish.lua does itself.
        assert stats["cmdstat_hset"]["calls"] > (10 << 20) // BODY_PIECE_BYTES
        assert await channel.client.hlen(channel.keys.body(3)) == (10 << 20) // BODY_PIECE_BYTES + 2
        entry = (await channel.client.xrange(channel.keys.log))[-1][1]
        stored = await read_large_event(channel.link, channel.keys.body(3))
        assert stored is not None
        assert entry[b"d"] == hashlib.sha256(stored).hexdigest().encode()


async def test_scripts_that_redis_has_forgotten_are_loaded_again(
    channel: Channel, redis: redis.asyncio.Redis
) -> None:
    async with publishing(channel) as stream:
        for number in range(5):
            await think(stream, number)
            await stream.flush()
            await redis.script_flush()
        await complete(stream)
    assert await thoughts(channel) == list(range(5))


async def test_a_run_whose_large_events_cannot_be_written_is_given_up(channel: Channel) -> None:
    submitted = [await channel.submit() for _ in range(2)]
    async with Publisher(channel.link, channel.all_keys) as publisher:
        broken, stream = [publisher.open(await channel.claim(one.run_id)) for one in submitted]
        await channel.client.set(channel.keys.upload(broken.claim.fence, 1, 0), "not a hash")
        with capture_logs() as logs:
            await broken.publish(EventType.AGENT_STARTED, {"model": "x" * (3 << 20)})
            async with asyncio.timeout(10):
                with pytest.raises(PublishRefused, match="WRONGTYPE"):
                    await broken.flush()
        assert publisher.is_available
        assert publisher.last_error is None
        await stream.publish(EventType.AGENT_STARTED, {})
        await complete(stream)
    assert [line["event"] for line in logs] == ["large events not written"] * MOST_FAILURES
    assert types(await channel.read())[-1] == "agent_completed"


async def test_a_write_that_fails_leaves_nothing_to_take_another_ones_answer(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failing = Pipeline.write, [RuntimeError("not now")]

    def fail_once(pipeline: Pipeline, data: bytes) -> None:
        if failing:
            raise failing.pop()
        write(pipeline, data)

    submitted = [await channel.submit() for _ in range(2)]
    async with Publisher(channel.link, channel.all_keys) as publisher:
        first, second = [publisher.open(await channel.claim(one.run_id)) for one in submitted]
        monkeypatch.setattr(Pipeline, "write", fail_once)
        await first.publish(EventType.AGENT_STARTED, {})
        async with asyncio.timeout(10):
            while failing:
                await asyncio.sleep(0)
            with capture_logs() as logs:
                await second.publish(EventType.AGENT_STARTED, {})
                await complete(second)
                await complete(first)
    assert logs == []
    for page in await read_all(channel):
        ended = [item.run_id for item in page.publications if b"agent_completed" in item.event]
        assert sorted(ended) == sorted(one.run_id for one in submitted)


async def test_a_run_that_becomes_due_while_the_publisher_closes_is_dispatched(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = Publisher(channel.link, channel.all_keys)
    close = publisher._sender.aclose

    async def close_after_the_answer() -> None:
        await ending
        await close()

    async def dispatch_slowly(link: RedisLink, keys: Keys, task: Task) -> None:
        await asyncio.sleep(0.05)
        await dispatch(link, keys, task)

    monkeypatch.setattr(relay.publisher, "dispatch", dispatch_slowly)
    submitted = await channel.submit(thread_id="t")
    async with publisher:
        stream = publisher.open(await channel.claim(submitted.run_id))
        await channel.submit(thread_id="t")
        await stream.publish(EventType.AGENT_STARTED, {})
        await stream.flush()
        monkeypatch.setattr(publisher._sender, "aclose", close_after_the_answer)
        ending = asyncio.create_task(complete(stream))
    assert "next-runs" not in [task.get_name() for task in asyncio.all_tasks()]
    assert await channel.client.xlen(channel.all_keys.tasks("docs")) == 2


async def test_a_batch_that_cannot_be_sent_ends_its_run_alone(channel: Channel) -> None:
    submitted = [await channel.submit() for _ in range(2)]
    async with Publisher(channel.link, channel.all_keys) as publisher:
        broken, stream = [publisher.open(await channel.claim(one.run_id)) for one in submitted]
        for one in (broken, stream):
            await one.publish(EventType.AGENT_STARTED, {})
        columns = Columns(0, "custom", "", object(), b"{}", "")  # type: ignore[arg-type]
        broken.batches.add_event(columns)
        with pytest.raises(PublishRefused):
            await broken.flush()
        await complete(stream)
    assert types(await channel.read())[-1] == "agent_completed"
