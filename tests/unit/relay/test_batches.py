"""The publisher's half of the publish contract, against a model of the script's half."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from relay import batches
from relay.batches import Acknowledged, OutgoingBatches
from relay.codec import RunEnvelope
from relay.columns import columns_of
from relay.errors import PublishRefused, RunEnded, StaleFence
from relay.events import EventType, Kind

ENVELOPE = RunEnvelope("run_1", 1, "t", "alice", "docs")


@dataclass
class Redis:
    """What ``publish.lua`` keeps of one run."""

    epoch: str = "e1"
    batch: int = 0
    applied: list[tuple[Any, ...]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    seen: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    def copy(self) -> Redis:
        return Redis(self.epoch, self.batch, list(self.applied), dict(self.texts), dict(self.seen))

    def publish(self, arguments: tuple[Any, ...]) -> list[bytes]:
        run_id, fence, number, epoch, force, *columns = arguments
        assert (run_id, fence) == ("run_1", "f")
        body = tuple(columns)
        # A batch is the same bytes however often and under whatever epoch it is sent.
        assert self.seen.setdefault(number, body) == body
        if number > self.batch:
            if number > self.batch + 1 and not force:
                kind = b"expected" if epoch != self.epoch else b"hole"
                return [kind, b"%d" % (self.batch + 1)]
            self.batch = number
            for start in range(0, len(body), 6):
                self._apply(body[start : start + 6])
        return [b"ok", self.epoch.encode(), b"1", b"1", b"1", b"", b"", b""]

    def _apply(self, item: tuple[Any, ...]) -> None:
        kind, _, message_id, text, event, before = item
        self.applied.append(item)
        if kind == Kind.TEXT:
            known = self.texts.get(message_id, "")
            data = orjson.loads(event)["data"]
            assert data == {"message_id": message_id, "position": data["position"], "text": text}
            if len(known.encode()) == before:
                assert data["position"] == len(known)
                self.texts[message_id] = known + text

    def events(self) -> list[int]:
        return [
            orjson.loads(item[4])["data"]["value"] for item in self.applied if item[0] == Kind.EVENT
        ]


class Agent:
    """Publishes at random and keeps what it published."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
        self.events: list[int] = []
        self.messages: list[str] = []
        self.is_in_message = False

    def act(self) -> None:
        choice = self.rng.random()
        if choice < 0.4:
            number = len(self.events)
            data = {"name": "n", "value": number, "x": "y" * self.rng.choice((0, 0, 20, 60))}
            event = ENVELOPE.encode(EventType.CUSTOM, 0, data)
            self.outgoing.add_event(columns_of(EventType.CUSTOM, 0, data, event))
            self.events.append(number)
            self.is_in_message = False
        elif choice < 0.5:
            self.outgoing.add_progress(self.rng.choice("ab"), b'{"data":{}}')
        else:
            piece = self.rng.choice(("a", "é", "日本", "xyz" * 5))
            self.outgoing.add_text(piece, 0)
            if not self.is_in_message:
                self.messages.append("")
                self.is_in_message = True
            self.messages[-1] += piece

    def texts(self) -> dict[str, str]:
        return {f"m{index}": text for index, text in enumerate(self.messages, 1)}


def send(agent: Agent, redis: Redis, *, is_answer_lost: bool = False) -> None:
    batch, arguments = agent.outgoing.next_batch()
    answer = redis.publish(arguments)
    if not is_answer_lost:
        agent.outgoing.receive_answer(batch, answer)


@pytest.mark.parametrize("seed", range(200))
def test_everything_arrives_once_and_in_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost answers, failovers to copies that lack batches, merging: nothing shows."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 300)
    rng = random.Random(seed)
    agent, redis = Agent(rng), Redis()
    copies = [redis.copy()]
    for _ in range(120):
        choice = rng.random()
        if choice < 0.5:
            agent.act()
        elif choice < 0.92:
            if not agent.outgoing.is_empty:
                send(agent, redis, is_answer_lost=rng.random() < 0.3)
        elif choice < 0.96:
            copies.append(redis.copy())
        else:
            seen = redis.seen
            redis = rng.choice(copies).copy()
            redis.epoch = f"e{rng.getrandbits(30)}"
            redis.seen = seen
    while not agent.outgoing.is_empty:
        send(agent, redis, is_answer_lost=rng.random() < 0.3)
    # What a last rewind took is asked for by the next batch only.
    agent.is_in_message = False
    data = {"name": "n", "value": len(agent.events)}
    event = ENVELOPE.encode(EventType.CUSTOM, 0, data)
    agent.events.append(len(agent.events))
    agent.outgoing.add_event(columns_of(EventType.CUSTOM, 0, data, event))
    while not agent.outgoing.is_empty:
        send(agent, redis)
    assert redis.events() == agent.events
    assert redis.texts == agent.texts()
    assert agent.outgoing.size_bytes == 0


def test_a_rewind_further_than_the_buffer_goes_on_by_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "REPLAY_BYTES", 1)
    agent, redis = Agent(random.Random(0)), Redis()
    for _ in range(6):
        agent.outgoing.add_event(event_columns(len(agent.events)))
        agent.events.append(len(agent.events))
        send(agent, redis)
    rewound = Redis(epoch="e2", seen=redis.seen)
    agent.outgoing.add_event(event_columns(6))
    while not agent.outgoing.is_empty:
        send(agent, rewound)
    assert rewound.events() == [5, 6]
    agent.outgoing.add_event(event_columns(7))
    _, arguments = agent.outgoing.next_batch()
    assert arguments[4] == ""


def test_what_is_kept_for_a_rewind_takes_no_more_memory_than_it_may() -> None:
    outgoing = Agent(random.Random(0)).outgoing

    def stream(pieces: int) -> None:
        for number in range(pieces):
            outgoing.add_text(f"a few letters {number}", 0)
            batch, arguments = outgoing.next_batch()
            outgoing.receive_answer(batch, [b"ok", b"e1", b"1", b"1", b"1", b"", b"", b""])
            del batch, arguments

    stream(10)
    tracemalloc.start()
    try:
        stream(6_000)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # It is full, and what is counted is about what it takes.
    assert 0.7 * batches.REPLAY_BYTES < kept < 1.1 * batches.REPLAY_BYTES


def event_columns(number: int) -> Any:
    data = {"name": "n", "value": number}
    event = ENVELOPE.encode(EventType.CUSTOM, 0, data)
    return columns_of(EventType.CUSTOM, 0, data, event)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([b"stale"], StaleFence),
        ([b"ended", b"completed"], RunEnded),
        ([b"unknown"], PublishRefused),
        ([b"hole", b"1"], PublishRefused),
    ],
)
def test_refusals_are_told_apart(answer: list[bytes], error: type[PublishRefused]) -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    outgoing.add_event(event_columns(1))
    batch, _ = outgoing.next_batch()
    with pytest.raises(error) as caught:
        outgoing.receive_answer(batch, answer)
    assert caught.type is error


def test_an_acknowledgement_tells_of_a_cancel_and_of_the_next_run() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    outgoing.add_event(event_columns(1))
    batch, _ = outgoing.next_batch()
    answer = [b"ok", b"e1", b"1", b"1", b"1", b'{"by":"user"}', b"run_2", b"docs"]
    assert outgoing.receive_answer(batch, answer) == Acknowledged(
        b'{"by":"user"}', ("run_2", "docs")
    )


def test_pieces_wait_for_each_other_and_events_do_not() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    outgoing.release_text()
    assert not outgoing.is_due
    outgoing.add_text("a", 1_000)
    outgoing.add_text("b", 1_015)
    assert not outgoing.is_due
    outgoing.add_event(event_columns(1))
    assert outgoing.is_due
    _, arguments = outgoing.next_batch()
    assert [arguments[5 + 6 * index + 3] for index in range(2)] == ["ab", ""]


def test_text_that_has_waited_is_due() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    outgoing.add_text("a", 1_000)
    outgoing.release_text()
    assert outgoing.is_due


def test_a_long_piece_of_text_is_cut_into_batches() -> None:
    outgoing, redis = OutgoingBatches(ENVELOPE, "f", "e1"), Redis()
    text = "aé日😀" * 200_000
    outgoing.add_text(text, 0)
    while not outgoing.is_empty:
        batch, arguments = outgoing.next_batch()
        assert batch.size_bytes <= batches.BATCH_BYTES
        outgoing.receive_answer(batch, redis.publish(arguments))
    assert redis.texts == {"m1": text}


def test_a_large_event_is_sent_by_its_size_until_redis_has_it() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    event = b"x" * (batches.STAGE_ABOVE_BYTES + 1)
    outgoing.add_event(columns_of(EventType.AGENT_COMPLETED, 0, {}, event))
    batch, arguments = outgoing.next_batch()
    kind, name, _, status, size, digest = arguments[5:]
    assert (kind, name, status) == (batches.KIND_STAGED, "agent_completed", "completed")
    assert (size, digest) == (len(event), hashlib.sha256(event).hexdigest())
    assert batch.bodies == ((0, event),)
    batch.is_staged = True
    assert outgoing.receive_answer(batch, [b"staging"]) is None
    assert not batch.is_staged
    assert outgoing.next_batch()[0] is batch


def test_an_event_ends_the_message_and_progress_does_not() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    outgoing.add_text("é", 0)
    outgoing.add_progress("c", b"{}")
    outgoing.add_text("b", 0)
    outgoing.add_event(event_columns(1))
    outgoing.add_text("c", 0)
    _, arguments = outgoing.next_batch()
    items = [arguments[start : start + 6] for start in range(5, len(arguments), 6)]
    texts = [(item[2], item[3], item[5]) for item in items if item[0] == Kind.TEXT]
    assert texts == [("m1", "é", 0), ("m1", "b", 2), ("m2", "c", 0)]


def test_only_the_latest_waiting_progress_of_a_tool_is_sent() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    for number in range(5):
        outgoing.add_progress("c", b"%d" % number)
    outgoing.add_progress("d", b"x")
    _, arguments = outgoing.next_batch()
    assert [arguments[9], arguments[15]] == [b"4", b"x"]
    assert outgoing.size_bytes == 2


def test_a_piece_is_joined_only_to_text_that_still_waits() -> None:
    outgoing = OutgoingBatches(ENVELOPE, "f", "e1")
    assert not outgoing.extend_text("before any")
    outgoing.add_text("a", 1_000)
    assert outgoing.extend_text("é")
    assert outgoing.size_bytes == 3
    with pytest.raises(UnicodeEncodeError):
        outgoing.extend_text("\ud800")
    assert not outgoing.extend_text("x" * (batches.TEXT_CHARS + 1))
    assert outgoing.size_bytes == 3
    outgoing.add_event(event_columns(1))
    assert not outgoing.extend_text("behind an event")
    outgoing.add_text("b", 1_001)
    outgoing.next_batch()
    assert not outgoing.extend_text("behind what was sent")
    outgoing.add_text("c", 1_002)
    outgoing.add_progress("call", b"{}")
    assert not outgoing.extend_text("behind a progress")
