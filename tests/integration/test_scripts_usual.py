"""The usual case of a publish does what the general way does, and leaves everything else to it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio

from relay.batches import KIND_STAGED
from relay.events import EventType
from relay.keys import BODY_THRESHOLD_BYTES, TOUCH_MS
from relay.scripts import LogLimits, Script
from tests.integration.script_support import Attempt, Channel, Item

MAX_EVENTS = 32
MAX_BYTES = 1_000_000
USUAL = (resources.files("relay") / "lua" / "publish_usual.lua").read_bytes()

pytestmark = pytest.mark.every_redis


def script(source: bytes) -> Script:
    return Script("publish", source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


@pytest_asyncio.fixture
async def run(redis_url: str, key_prefix: str) -> AsyncIterator[Attempt]:
    """A run of four events, the last as batch 3."""
    limits = LogLimits(max_events=MAX_EVENTS, max_bytes=MAX_BYTES)
    async with Channel(redis_url, key_prefix, limits=limits) as channel:
        attempt = await channel.started()
        await attempt.publish(attempt.event())
        await attempt.publish(attempt.event())
        yield attempt


@dataclass
class Outcome:
    """What one call answered, published and left."""

    answer: list[Any]
    messages: list[bytes]
    left: Mapping[bytes, Any]


class Ways:
    """Both ways of a publish, played on the same state."""

    def __init__(self, run: Attempt) -> None:
        self.run = run
        self.client: redis.asyncio.Redis = run.channel.client
        whole = run.channel.link.scripts["publish"].source
        # What constants stand for is in the whole script only.
        general_from = whole.index(b"-- Every script but publish")
        self.usual = script(whole[:general_from] + b"return {'fell through'}")
        self.general = script(whole[general_from:])
        self.whole = script(whole)
        assert whole.startswith(USUAL.partition(b"\n")[0])

    async def keys(self) -> list[bytes]:
        keys = self.run.channel.keys
        return sorted([key async for key in self.client.scan_iter(match=f"{keys.base}*")])

    async def play(self, way: Script, send: Callable[[], Awaitable[list[bytes]]]) -> Outcome:
        """Send with one way, and put everything back as it was."""
        before = {key: await self.client.dump(key) for key in await self.keys()}
        scripts = self.run.channel.link.scripts
        scripts["publish"] = way
        async with self.client.pubsub() as pubsub:
            await pubsub.subscribe(self.run.channel.keys.live)
            assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
            answer = await send()
            await self.client.publish(self.run.channel.keys.live, b"the end")
            messages = []
            while (message := await pubsub.get_message(timeout=5))["data"] != b"the end":
                messages.append(message["data"])
        left = {key: await self.content(key) for key in await self.keys()}
        scripts["publish"] = self.whole
        for key in await self.keys():
            await self.client.delete(key)
        for key, dumped in before.items():
            await self.client.restore(key, 0, dumped)
        return Outcome(answer, messages, left)

    async def content(self, key: bytes) -> Any:
        """Give what a key holds, but for times."""
        match await self.client.type(key):
            case b"hash":
                fields = await self.client.hgetall(key)
                timely = (b"updated_ms", b"touched", b"started_ms", b"ended_ms")
                return {name: value for name, value in fields.items() if name not in timely}
            case b"stream":
                entries = await self.client.xrange(key)
                return [
                    (offset, {name: value for name, value in fields.items() if name != b"t"})
                    for offset, fields in entries
                ]
            case b"zset":
                return await self.client.zrange(key, 0, -1)
            case _:
                return await self.client.get(key)


def thinking(run: Attempt, **options: Any) -> Callable[[], Awaitable[list[bytes]]]:
    """Give the next publish, or one that differs from it."""
    number = options.pop("number", 4)
    items: list[Item] = options.pop("items", None) or [run.event(size=options.pop("size", 10))]
    return lambda: run.send(number, *items, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 20_000},
        {"epoch": ""},
        {"epoch": "another"},
        {"force": True},
    ],
)
@pytest.mark.parametrize("event_type", [EventType.AGENT_THINKING, EventType.CUSTOM])
@pytest.mark.parametrize("cancel", [None, "asked"])
async def test_the_usual_case_does_what_the_general_way_does(
    run: Attempt, options: dict[str, Any], event_type: EventType, cancel: str | None
) -> None:
    ways = Ways(run)
    if cancel:
        await ways.client.hset(run.channel.keys.run(run.run_id), "cancel", cancel)
    event = run.event(event_type, name="n", value=1, size=options.pop("size", 10))
    send = thinking(run, items=[event], **options)
    general = await ways.play(ways.general, send)
    assert general.answer[0] == b"ok"
    assert len(general.messages) == 1
    assert await ways.play(ways.usual, send) == general
    assert await ways.play(ways.whole, send) == general


def large_event(run: Attempt, message_bytes: int) -> Item:
    """Give an event that fills a live message to this size, as the scripts count it."""
    envelope = len(bytes(run.event(filler="")[4]))
    return run.event(size=message_bytes - envelope - len(run.run_id) - 24)


async def test_a_message_just_below_a_claim_is_usual(run: Attempt) -> None:
    ways = Ways(run)
    send = thinking(run, items=[large_event(run, BODY_THRESHOLD_BYTES - 1)])
    general = await ways.play(ways.general, send)
    assert len(general.messages[0]) > BODY_THRESHOLD_BYTES - 100
    assert await ways.play(ways.usual, send) == general


async def test_a_log_that_is_full_up_to_what_may_gather_is_usual(run: Attempt) -> None:
    usual_at = set()
    for number in range(4, 60):
        ways = Ways(run)
        general = await ways.play(ways.general, thinking(run, number=number))
        whole = await ways.play(ways.whole, thinking(run, number=number))
        assert whole == general
        usual = await ways.play(ways.usual, thinking(run, number=number))
        assert usual == general or usual.answer == [b"fell through"]
        if usual == general:
            usual_at.add(number)
        await run.publish(run.event(size=10))
    assert set(range(4, MAX_EVENTS - 1)) <= usual_at
    # From then on the run holds its events in the log, and every look at it serves some more.
    assert 5 < len(usual_at & set(range(MAX_EVENTS + 4, 60))) < 20


Change = Callable[[Ways], Awaitable[Any]]


def channel_has(**fields: str | int) -> Change:
    return lambda ways: ways.client.hset(ways.run.channel.keys.channel, mapping=fields)


def run_has(**fields: str | int) -> Change:
    return lambda ways: ways.client.hset(ways.run.channel.keys.run(ways.run.run_id), mapping=fields)


def is_without(name: str) -> Change:
    return lambda ways: ways.client.delete(getattr(ways.run.channel.keys, name))


async def has_no_run(ways: Ways) -> None:
    await ways.client.delete(ways.run.channel.keys.run(ways.run.run_id))


async def has_an_entry_that_nobody_counted(ways: Ways) -> None:
    entry = {"s": 9, "r": ways.run.run_id, "t": 1, "e": "{}"}
    await ways.client.xadd(ways.run.channel.keys.log, entry, id="6-0")


async def was_touched_long_ago(ways: Ways) -> None:
    now_s, _ = await ways.client.time()
    await channel_has(touched=now_s * 1_000 - TOUCH_MS - 1_000)(ways)


def channel_lacks(name: str) -> Change:
    return lambda ways: ways.client.hdel(ways.run.channel.keys.channel, name)


async def is_full_and_was_never_held(ways: Ways) -> None:
    await channel_has(length=MAX_EVENTS + 2)(ways)
    await channel_lacks("held")(ways)


async def run_lacks_its_batch(ways: Ways) -> None:
    await ways.client.hdel(ways.run.channel.keys.run(ways.run.run_id), "batch")


@pytest.mark.parametrize(
    "change",
    [
        channel_has(instance="f" * 40),
        channel_has(epoch="e" * 32),
        channel_has(floor=5),
        channel_has(length=MAX_EVENTS + 2),
        channel_has(length=MAX_EVENTS + 9, held=MAX_EVENTS + 7),
        channel_has(length=MAX_EVENTS * 10, held=MAX_EVENTS * 10),
        channel_has(bytes=MAX_BYTES - 10),
        is_without("channel"),
        is_without("log"),
        has_an_entry_that_nobody_counted,
        was_touched_long_ago,
        channel_lacks("length"),
        channel_lacks("touched"),
        is_full_and_was_never_held,
        run_lacks_its_batch,
        has_no_run,
        run_has(status="waiting"),
        run_has(status="retrying"),
        run_has(status="completed"),
        run_has(fence="another"),
        run_has(batch=4),
        run_has(batch=2),
    ],
)
async def test_another_state_is_left_to_the_general_way(run: Attempt, change: Change) -> None:
    ways = Ways(run)
    await change(ways)
    await compare_where_it_is_not_usual(ways, thinking(run))


@pytest.mark.parametrize("number", [1, 3, 5])
async def test_another_batch_is_left_to_the_general_way(run: Attempt, number: int) -> None:
    await compare_where_it_is_not_usual(Ways(run), thinking(run, number=number))


async def test_other_events_are_left_to_the_general_way(run: Attempt) -> None:
    call = {"tool_call_id": "c1", "tool_name": "search"}
    for items in (
        [run.event(), run.event()],
        [run.event(EventType.TOOL_EXECUTING, **call)],
        [run.event(EventType.AGENT_COMPLETED, result=1, duration_ms=1)],
        [run.text("m1", 0, "ab")],
        [run.progress()],
        [(KIND_STAGED, "custom", "", "", 70_000, "digest")],
        [large_event(run, BODY_THRESHOLD_BYTES)],
        [run.event(size=BODY_THRESHOLD_BYTES)],
    ):
        await compare_where_it_is_not_usual(Ways(run), thinking(run, items=items))


async def compare_where_it_is_not_usual(
    ways: Ways, send: Callable[[], Awaitable[list[bytes]]]
) -> None:
    left = {key: await ways.content(key) for key in await ways.keys()}
    assert await ways.play(ways.usual, send) == Outcome([b"fell through"], [], left)
    general = await ways.play(ways.general, send)
    whole = await ways.play(ways.whole, send)
    if whole.answer[0] == b"ok" and whole.answer[1] != general.answer[1]:
        # Both began an epoch, each a random one.
        assert (whole.answer[2:], len(whole.messages)) == (
            general.answer[2:],
            len(general.messages),
        )
    else:
        assert whole == general
