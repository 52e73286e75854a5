"""What publish.lua promises, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import redis.asyncio

from relay.batches import KIND_STAGED
from relay.codec import decode_live
from relay.events import EventType
from relay.history import fetch_call
from relay.keys import BODY_PIECE_BYTES, BODY_THRESHOLD_BYTES, RUN_TTL_AFTER_END_MS
from relay.recovery import FetchBody
from relay.scripts import LogLimits
from relay.staging import pieces_of
from tests.integration.script_support import Channel, offsets, texts, types

DAY_MS = 86_400_000

pytestmark = pytest.mark.every_redis


@pytest_asyncio.fixture
async def channel(redis_url: str, key_prefix: str) -> AsyncIterator[Channel]:
    async with Channel(redis_url, key_prefix) as channel:
        yield channel


async def test_offsets_and_seqs_are_assigned_without_a_hole(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.event(), run.text("m1", 0, "a"), run.progress(), run.event())
    answer = await run.end()
    assert [answer[2], answer[3], answer[4]] == [b"7", b"7", b"5"]
    page = await channel.read()
    assert [item.seq for item in page.publications if item.seq] == [1, 2, 3, 4, 5]
    assert offsets(page) == [1, 2, 3, 4, 6, 7]
    assert (page.offset, page.covered) == (7, 7)


async def test_the_same_batch_again_gives_the_same_answer_and_appends_nothing(
    channel: Channel,
) -> None:
    run = await channel.started()
    items = (run.event(), run.text("m1", 0, "ab"))
    first = await run.publish(*items)
    assert await run.send(2, *items) == first
    last = await run.end()
    assert await run.send(3, run.event(EventType.AGENT_COMPLETED)) == last
    page = await channel.read()
    assert (page.offset, texts(page)) == (5, {4: (0, "ab")})


async def test_an_older_batch_is_acknowledged_and_appends_nothing(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.event())
    await run.publish(run.event())
    assert (await run.send(1, run.event()))[0] == b"ok"
    assert (await channel.read()).offset == 4


async def test_nothing_follows_the_terminal_event(channel: Channel) -> None:
    run = await channel.started()
    await run.end()
    assert await run.send(3, run.event()) == [b"ended", b"completed"]
    assert types(await channel.read())[-1] == "agent_completed"


async def test_a_superseded_fence_publishes_nothing(channel: Channel) -> None:
    run = await channel.started()
    stale = (await channel.client.hget(channel.keys.run(run.run_id), "fence")).decode()
    assert stale == run.claim.fence
    await channel.client.hset(channel.keys.run(run.run_id), "fence", "somebody else's")
    assert await run.send(2, run.event()) == [b"stale"]
    assert await run.send(1, run.event()) == [b"stale"]
    assert (await channel.read()).offset == 2


async def test_a_missing_batch_is_refused(channel: Channel) -> None:
    run = await channel.started()
    assert await run.send(3, run.event()) == [b"hole", b"2"]
    assert (await channel.read()).offset == 2


async def test_after_another_epoch_the_missing_batch_is_asked_for(channel: Channel) -> None:
    run = await channel.started()
    before = await channel.epoch()
    await channel.rotate(before)
    assert await run.send(4, run.event()) == [b"expected", b"2"]
    forced = await run.send(4, run.event(), force=True)
    assert (forced[0], forced[1].decode()) == (b"ok", await channel.epoch())
    assert (await run.send(5, run.event(), epoch=forced[1].decode()))[0] == b"ok"


async def test_an_unknown_run_is_said_to_be_unknown(channel: Channel) -> None:
    run = await channel.started()
    await channel.client.delete(channel.keys.run(run.run_id))
    assert await run.send(2, run.event()) == [b"unknown"]


async def test_a_text_with_a_lost_piece_is_dropped_rather_than_joined(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "ab"))
    await channel.client.delete(channel.keys.text(run.run_id, 1, "m1"))
    await run.publish(run.text("m1", 2, "cd"))
    await run.publish(run.text("m1", 4, "ef"), run.text("m2", 0, "new"))
    page = await channel.read()
    assert list(texts(page).values()) == [(0, "new")]
    assert await channel.client.exists(channel.keys.text(run.run_id, 1, "m1")) == 0


async def test_one_live_message_has_the_whole_batch(
    channel: Channel, redis: redis.asyncio.Redis
) -> None:
    run = await channel.started()
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel.keys.live)
        assert await pubsub.get_message(timeout=5)
        await run.publish(run.event(), run.text("m1", 0, "é"), run.progress())
        message = await pubsub.get_message(timeout=5)
        batch = decode_live(message["data"])
        assert batch.epoch == await channel.epoch()
        assert [(item.offset, item.seq, item.kind) for item in batch.publications] == [
            (3, 3, 0),
            (4, 0, 1),
            (5, 0, 2),
        ]
        assert not any(item.is_claim for item in batch.publications)


async def test_a_large_message_carries_claims_only(
    channel: Channel, redis: redis.asyncio.Redis
) -> None:
    run = await channel.started()
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel.keys.live)
        assert await pubsub.get_message(timeout=5)
        await run.publish(*[run.event(size=BODY_THRESHOLD_BYTES // 4) for _ in range(5)])
        message = await pubsub.get_message(timeout=5)
        assert len(message["data"]) < 1_000
        assert all(item.is_claim for item in decode_live(message["data"]).publications)
    assert types(await channel.read(2)) == ["agent_thinking"] * 5


async def test_a_large_event_lies_beside_the_log(channel: Channel) -> None:
    run = await channel.started()
    item = run.event(size=BODY_THRESHOLD_BYTES)
    await run.publish(item)
    page = await channel.read(2)
    [publication] = page.publications
    event = item[4]
    assert isinstance(event, bytes)
    assert (publication.is_claim, publication.size_bytes) == (True, len(event))

    async def fetch(*, epoch: str = page.epoch, size: int = len(event)) -> bytes:
        cursor = object()
        wanted = FetchBody(cursor, 0, epoch, 3, size, 10, 20)  # type: ignore[arg-type]
        call = fetch_call(channel.link, channel.all_keys, channel.user_id, wanted)
        return (await channel.link.run([call]))[0]

    assert await fetch() == event[10:30]
    assert await fetch(epoch="another") == b""
    assert await fetch(size=5) == b""
    await channel.client.delete(channel.keys.body(3))
    assert await fetch() == b""
    [lost] = (await channel.read(2)).publications
    assert (lost.is_claim, lost.size_bytes) == (True, 0)


@pytest.mark.parametrize("days", [1, 30])
async def test_text_of_a_failed_run_can_be_read_as_long_as_its_events(
    redis_url: str, key_prefix: str, days: int
) -> None:
    age_ms = days * 86_400_000
    async with Channel(redis_url, key_prefix, limits=LogLimits(max_age_ms=age_ms)) as channel:
        run = await channel.started()
        await run.publish(run.text("m1", 0, "half an ans"))
        await run.end(EventType.AGENT_ERROR)
        # As if it were a minute later: whoever reads renews the times to live.
        await channel.client.hset(channel.keys.channel, "touched", 1)
        await channel.read()
        [name] = await channel.client.zrange(channel.keys.texts, 0, -1)
        text = f"{channel.keys.base}text:{name.decode()}"
        for key in (text, channel.keys.run(run.run_id), channel.keys.texts, channel.keys.log):
            assert await channel.client.pttl(key) >= age_ms, key
        # Another run begins to write: the index of texts is still of use to the first one.
        other = await channel.started()
        await other.publish(other.text("m2", 0, "more"))
        assert await channel.client.pttl(channel.keys.texts) >= age_ms


async def test_a_staged_event_is_published_by_its_name_once_it_is_there(channel: Channel) -> None:
    run = await channel.started()
    kind, *middle, event, digest = run.event(size=2 * BODY_PIECE_BYTES)
    assert kind == 0
    assert isinstance(event, bytes)
    items = (run.event(), (KIND_STAGED, *middle, len(event), digest))
    upload = channel.keys.upload(run.claim.fence, 2, 1)
    assert await run.send(2, *items) == [b"staging"]
    pieces = pieces_of(event)
    for lacking in pieces:
        kept = {name: piece for name, piece in pieces.items() if name != lacking}
        await channel.client.delete(upload)
        await channel.client.hset(upload, mapping=kept)
        assert await run.send(2, *items) == [b"staging"]
    assert (await channel.read()).offset == 2
    await channel.client.hset(upload, mapping=pieces)
    first = await run.publish(*items)
    assert await run.send(2, *items) == first
    assert await channel.client.hgetall(channel.keys.body(4)) == {
        name.encode(): piece for name, piece in pieces.items()
    }
    ttl_ms = await channel.client.pttl(channel.keys.body(4))
    assert ttl_ms > RUN_TTL_AFTER_END_MS - 5_000
    assert not await channel.client.exists(upload)
    last = (await channel.read()).publications[-1]
    assert (last.is_claim, last.size_bytes) == (True, len(event))


async def test_the_log_is_trimmed_by_count_and_the_floor_follows(
    redis_url: str, key_prefix: str
) -> None:
    async with Channel(redis_url, key_prefix, limits=LogLimits(max_events=16)) as channel:
        for _ in range(12):
            await (await channel.started()).end()
        page = await channel.read()
        stored = await channel.client.xlen(channel.keys.log)
        assert 16 <= stored <= 17
        assert (page.offset, page.floor) == (36, 36 - stored)
        assert offsets(page)[0] == page.floor + 1


async def test_events_of_active_runs_are_kept_up_to_ten_times_the_count(
    redis_url: str, key_prefix: str
) -> None:
    async with Channel(redis_url, key_prefix, limits=LogLimits(max_events=16)) as channel:
        run = await channel.started()
        for _ in range(20):
            await (await channel.started()).end()
        assert (await channel.read()).floor == 0
        for _ in range(5):
            await run.publish(*[run.event() for _ in range(40)])
        page = await channel.read()
        assert page.floor > 2
        assert await channel.client.xlen(channel.keys.log) <= 161


async def test_the_log_is_trimmed_by_bytes_with_its_bodies(redis_url: str, key_prefix: str) -> None:
    limits = LogLimits(max_bytes=200_000)
    async with Channel(redis_url, key_prefix, limits=limits) as channel:
        run = await channel.started()
        for _ in range(10):
            await run.publish(run.event(size=70_000))
        page = await channel.read()
        bodies = await channel.client.keys(
            channel.keys.body(0)[:-1].replace("{", "*").replace("}", "*") + "*"
        )
        assert page.floor > 2
        assert len(bodies) == 12 - page.floor
        assert sum(item.size_bytes for item in page.publications) <= 2 * limits.max_bytes


async def test_the_log_is_trimmed_by_age(redis_url: str, key_prefix: str) -> None:
    async with Channel(redis_url, key_prefix) as channel:
        await (await channel.started()).end()
        # Age is looked at with the channel's times to live, once a minute.
        await channel.client.hset(channel.keys.channel, "touched", 0)
    await asyncio.sleep(0.5)
    async with Channel(redis_url, key_prefix, limits=LogLimits(max_age_ms=400)) as channel:
        await channel.submit()
        page = await channel.read()
        assert (page.floor, types(page)) == (3, ["agent_queued"])


@pytest.mark.parametrize("size", [10, 70_000], ids=["in-the-run", "beside-the-log"])
async def test_a_result_is_kept_for_a_day_although_its_event_is_trimmed(
    redis_url: str, key_prefix: str, size: int
) -> None:
    async with Channel(redis_url, key_prefix, limits=LogLimits(max_events=4)) as channel:
        run = await channel.started()
        await run.publish(run.event(EventType.AGENT_COMPLETED, size=size, result="r"))
        for _ in range(6):
            await (await channel.started()).end()
        assert (await channel.read()).floor >= 3
        detail = await channel.registry.get(channel.user_id, run.run_id)
        assert detail is not None
        assert detail.as_json()["result"] == "r"
        body = channel.keys.body(3)
        assert await channel.client.exists(body) == (size > BODY_THRESHOLD_BYTES)
        for key in (channel.keys.run(run.run_id), *([body] if size > BODY_THRESHOLD_BYTES else [])):
            assert DAY_MS - 5_000 < await channel.client.pttl(key) <= DAY_MS + 3_600_000


async def test_the_channel_expires_before_its_log(channel: Channel) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "a"))
    ttl = {}
    names = {"channel": channel.keys.channel, "log": channel.keys.log, "texts": channel.keys.texts}
    for name, key in names.items():
        ttl[name] = await channel.client.pttl(key)
    assert 0 < ttl["channel"] < ttl["log"]
    assert ttl["channel"] < ttl["texts"]


@pytest.mark.parametrize(
    ("end", "longest_ms"),
    [(EventType.AGENT_COMPLETED, 300_000), (EventType.AGENT_ERROR, 90_000_000)],
)
async def test_texts_stay_five_minutes_or_without_a_result_as_long_as_the_log(
    channel: Channel, end: EventType, longest_ms: int
) -> None:
    run = await channel.started()
    await run.publish(run.text("m1", 0, "a"))
    await run.end(end)
    ttl = await channel.client.pttl(channel.keys.text(run.run_id, 1, "m1"))
    assert longest_ms - 5_000 < ttl <= longest_ms
