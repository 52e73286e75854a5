"""Single histories of the delivery machine, each the shortest one for its rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from relay.codec import LiveBatch, Position, Publication
from relay.events import Kind
from relay.recovery import (
    HEADER_ONLY,
    PART_BYTES,
    PART_THRESHOLD_BYTES,
    Advance,
    Broken,
    Cursor,
    CursorState,
    Feed,
    FeedState,
    FetchBody,
    LargeText,
    Page,
    Read,
    RequestQueue,
    Rotate,
    TextMark,
    surviving_offset,
)


@dataclass
class Run:
    first_offset: int


@dataclass
class Sink:
    """Records what a client would be sent."""

    has_room: bool = True
    is_idle: bool = True
    frames: list[tuple[Any, ...]] = field(default_factory=list)

    def established(self, position: Position, recovered: bool, runs: Sequence[Any]) -> None:
        self.frames.append(("established", str(position), recovered))

    def write(self, publication: Publication) -> None:
        self.frames.append(("event", publication.offset))

    def write_all(self, publications: Sequence[Publication]) -> None:
        for publication in publications:
            self.write(publication)

    def write_part(self, frame: bytes, is_last: bool) -> None:
        part = orjson.loads(frame)
        self.frames.append(("part", part["offset"], part["index"], part["total"], part["text"]))

    def reset(self, position: Position, reason: str, runs: Sequence[Any]) -> None:
        self.frames.append(("reset", str(position), reason))

    def reposition(self, position: Position) -> None:
        self.frames.append(("position", str(position)))

    @property
    def offsets(self) -> list[int]:
        return [frame[1] for frame in self.frames if frame[0] == "event"]


def event(offset: int, size: int = 10) -> Publication:
    return Publication(offset, 1, Kind.EVENT, "r1", b'{"n":%d,"x":"%s"}' % (offset, b"x" * size))


def text(offset: int) -> Publication:
    return Publication(offset, 0, Kind.TEXT, "r1", b'{"t":%d}' % offset)


def claim(offset: int, size: int = 0) -> Publication:
    return Publication(offset, 1, Kind.EVENT, "r1", b"", size)


def events(first: int, last: int) -> list[Publication]:
    return [event(offset) for offset in range(first, last + 1)]


def live(*publications: Publication, epoch: str = "e1") -> LiveBatch:
    return LiveBatch(epoch, publications)


def page(
    offset: int,
    publications: Sequence[Publication] = (),
    *,
    epoch: str = "e1",
    floor: int = 0,
    covered: int | None = None,
    previous: Sequence[Position] = (),
    marks: dict[int, TextMark] | None = None,
    runs: Sequence[Run] = (),
) -> Page:
    end = offset if covered is None else covered
    return Page(epoch, offset, floor, previous, end, publications, marks or {}, runs)


def take(feed: Feed) -> list[Read | Rotate | FetchBody]:
    """Give what the shell would have to do now."""
    taken: list[Read | Rotate | FetchBody] = []
    while feed.effects:
        batch, feed.effects[:] = list(feed.effects), []
        for effect in batch:
            if isinstance(effect, Advance):
                effect.cursor.advance()
            elif isinstance(effect, Broken):
                raise effect.error
            else:
                taken.append(effect)
    return taken


def take_read(feed: Feed) -> Read:
    [effect] = take(feed)
    assert isinstance(effect, Read)
    return effect


def take_fetch(feed: Feed) -> FetchBody:
    [effect] = take(feed)
    assert isinstance(effect, FetchBody)
    return effect


def answer(read: Read, given: Page) -> None:
    read.requester.receive_page(read, given)


def live_feed(head: int, *, floor: int = 0) -> Feed:
    """Give a feed that is live at this head."""
    feed = Feed()
    feed.confirm()
    answer(take_read(feed), page(head, floor=floor))
    assert feed.state is FeedState.LIVE
    return feed


def attach(
    feed: Feed, since: Any, given: Page | None = None, sink: Sink | None = None
) -> tuple[Cursor, Sink]:
    """Connect a client and answer its first read, with a page cut before its first event."""
    sink = sink or Sink()
    cursor = feed.attach(sink, since)
    read = take_read(feed)
    given = given or page(feed.head)
    if read.after < given.offset:
        given = dataclasses.replace(given, covered=read.after)
    answer(read, given)
    return cursor, sink


# --- The feed ---


def test_nothing_is_read_before_the_subscription_is_confirmed() -> None:
    feed = Feed()
    feed.attach(Sink(), "active")
    feed.receive_live(live(event(1)))
    assert take(feed) == []
    feed.confirm()
    assert [effect.after for effect in take(feed)] == [HEADER_ONLY, HEADER_ONLY]  # type: ignore[union-attr]


def test_a_live_publication_reaches_every_live_cursor_once() -> None:
    feed = live_feed(4)
    sinks = [attach(feed, "now")[1] for _ in range(2)]
    feed.receive_live(live(event(5), event(6)))
    feed.receive_live(live(event(6)))
    assert [sink.offsets for sink in sinks] == [[5, 6], [5, 6]]


def test_a_gap_is_read_before_anything_behind_it_is_delivered() -> None:
    feed = live_feed(4)
    _, sink = attach(feed, "now")
    feed.receive_live(live(event(7)))
    read = take_read(feed)
    assert (read.after, sink.offsets) == (4, [])
    answer(read, page(7, events(5, 7)))
    assert sink.offsets == [5, 6, 7]


def test_a_live_message_during_a_sync_is_waited_for_and_not_delivered() -> None:
    feed = live_feed(4)
    _, sink = attach(feed, "now")
    feed.sync()
    first = take_read(feed)
    feed.receive_live(live(event(6)))
    answer(first, page(5, events(5, 5)))
    assert (feed.state, sink.offsets) == (FeedState.SYNCING, [5])
    answer(take_read(feed), page(6, events(6, 6)))
    assert (feed.state, sink.offsets) == (FeedState.LIVE, [5, 6])


def test_a_live_message_during_a_sync_is_waited_for_although_the_log_was_trimmed() -> None:
    feed = live_feed(4)
    feed.sync()
    read = take_read(feed)
    feed.receive_live(live(event(9)))
    answer(read, page(8, floor=6))
    assert (feed.state, take_read(feed).after) == (FeedState.SYNCING, 8)


def test_a_claim_is_read_from_history_in_its_place() -> None:
    feed = live_feed(4)
    _, sink = attach(feed, "now")
    feed.receive_live(live(event(5), claim(6), event(7)))
    assert sink.offsets == [5]
    answer(take_read(feed), page(7, events(6, 7)))
    assert sink.offsets == [5, 6, 7]


def test_a_page_asked_for_before_the_connection_broke_is_dropped() -> None:
    feed = live_feed(4)
    _, sink = attach(feed, "now")
    feed.sync()
    stale = take_read(feed)
    feed.lose()
    feed.confirm()
    fresh = take_read(feed)
    answer(stale, page(6, events(5, 6)))
    assert (feed.head, sink.offsets) == (4, [])
    answer(fresh, page(7, events(5, 7)))
    assert sink.offsets == [5, 6, 7]


def test_redis_with_less_than_it_has_shown_begins_a_new_epoch() -> None:
    feed = live_feed(9)
    _, sink = attach(feed, "now")
    feed.sync()
    answer(take_read(feed), page(7))
    [rotate] = take(feed)
    assert isinstance(rotate, Rotate)
    assert rotate.epoch == "e1"
    feed.receive_rotated(rotate)
    answer(take_read(feed), page(7, epoch="e2", previous=[Position("e1", 7)]))
    answer(take_read(feed), page(7, epoch="e2", runs=[Run(6)]))
    assert sink.frames[-1] == ("reset", "e2:5", "history_rewound")


def test_what_a_cursors_page_has_shown_counts_too() -> None:
    feed = live_feed(4)
    attach(feed, Position("e1", 2), page(6))
    answer(take_read(feed), page(6, events(3, 6)))
    feed.sync()
    answer(take_read(feed), page(5, events(5, 5)))
    [rotate] = take(feed)
    assert isinstance(rotate, Rotate)


def test_another_event_at_a_known_offset_begins_a_new_epoch() -> None:
    feed = live_feed(4)
    feed.receive_live(live(event(5)))
    feed.receive_live(live(event(5, size=11)))
    [effect] = take(feed)
    assert isinstance(effect, Rotate)


def test_clients_below_the_surviving_offset_are_told_their_new_position() -> None:
    feed = live_feed(9)
    _, above = attach(feed, "now")
    below, sink = attach(feed, Position("e1", 5), sink=Sink(has_room=False))
    feed.receive_live(live(epoch="e2"))
    answer(take_read(feed), page(7, epoch="e2", previous=[Position("e1", 7)]))
    assert sink.frames == [("established", "e1:5", True), ("position", "e2:5")]
    answer(take_read(feed), page(7, epoch="e2"))
    assert above.frames[-1] == ("reset", "e2:7", "history_rewound")
    assert below.position == ("e2", 5)


def test_a_position_between_two_epochs_survives_only_what_both_kept() -> None:
    previous = [Position("e3", 20), Position("e2", 5), Position("e1", 9)]
    assert surviving_offset(previous, "e3") == 20
    assert surviving_offset(previous, "e1") == 5
    assert surviving_offset(previous, "e0") is None


def test_heartbeats_before_a_reset_keep_the_clients_old_position() -> None:
    """Otherwise a client that leaves just then comes back under the new epoch, unnoticed."""
    feed = live_feed(9)
    cursor, sink = attach(feed, "now")
    feed.receive_live(live(epoch="e2"))
    answer(take_read(feed), page(7, epoch="e2", previous=[Position("e1", 7)]))
    assert cursor.position == ("e1", 9)
    answer(take_read(feed), page(7, epoch="e2"))
    assert (cursor.position, sink.frames[-1][0]) == (("e2", 7), "reset")


# --- The start ---


def test_active_begins_before_the_oldest_listed_run() -> None:
    _, sink = attach(live_feed(9), "active", page(9, runs=[Run(4), Run(6)]))
    assert sink.frames == [("established", "e1:3", True)]


def test_a_run_that_began_after_the_page_was_read_is_not_missed() -> None:
    feed = live_feed(4)
    sink = Sink()
    feed.attach(sink, "active")
    read = take_read(feed)
    feed.receive_live(live(event(5)))
    answer(read, page(4))
    assert sink.frames == [("established", "e1:4", True), ("event", 5)]


def test_a_position_ahead_of_a_lagging_gateway_gets_nothing_twice() -> None:
    feed = live_feed(4)
    _, sink = attach(feed, Position("e1", 6), page(6))
    feed.receive_live(live(*events(5, 7)))
    assert (take(feed), sink.frames) == ([], [("established", "e1:6", True), ("event", 7)])


@pytest.mark.parametrize(
    ("since", "given", "reason"),
    [
        (Position("e0", 3), page(9), "unknown_epoch"),
        (Position("e0", 8), page(9, previous=[Position("e0", 7)]), "history_rewound"),
        (Position("e1", 3), page(9, floor=4), "history_trimmed"),
    ],
)
def test_a_position_that_cannot_be_recovered_gets_one_reset(
    since: Position, given: Page, reason: str
) -> None:
    _, sink = attach(live_feed(9), since, given)
    assert sink.frames == [("established", "e1:9", False), ("reset", "e1:9", reason)]


def test_a_position_above_what_redis_has_begins_a_new_epoch() -> None:
    feed = live_feed(9)
    attach(feed, Position("e1", 12))
    [effect] = take(feed)
    assert isinstance(effect, Rotate)


def test_a_client_that_left_after_a_cut_page_gets_its_texts_from_a_lagging_gateway() -> None:
    """Its position lies before a text that began earlier and stands further on."""
    feed = live_feed(5)
    _, sink = attach(feed, Position("e1", 5), page(10))
    read = take_read(feed)
    assert read.after == 5
    answer(read, page(10, [text(10)], marks={10: TextMark("r1:1:m1", 9, 9)}))
    feed.receive_live(live(*[text(offset) for offset in range(6, 12)]))
    assert sink.offsets == [10, 11]


def test_a_start_reads_its_first_page_along() -> None:
    feed = live_feed(4)
    cursor, sink = feed.attach(sink := Sink(), Position("e1", 2)), sink
    read = take_read(feed)
    assert (read.after, read.with_runs) == (2, True)
    answer(read, page(4, events(3, 4)))
    assert sink.frames == [("established", "e1:2", True), ("event", 3), ("event", 4)]
    assert (take(feed), cursor.state) == ([], CursorState.LIVE)


def test_one_answer_opens_a_cold_feed_and_its_first_cursors() -> None:
    feed = Feed()
    sinks = [Sink() for _ in range(3)]
    for sink, since in zip(sinks, (Position("e1", 2), Position("e1", 2), "active"), strict=True):
        feed.attach(sink, since)  # type: ignore[arg-type]
    feed.confirm()
    queue: RequestQueue[str] = RequestQueue()
    for effect in take(feed):
        queue.add("alice", effect)
    requests = queue.take(10)
    assert [len(request.waiting) for request in requests] == [3, 1]
    for request in requests:
        for read in request.waiting:
            assert isinstance(read, Read)
            after = min(read.after, 4)
            answer(read, page(4, events(after + 1, 4), runs=[Run(5)]))
    assert [sink.offsets for sink in sinks] == [[3, 4], [3, 4], []]
    assert all(cursor.state is CursorState.LIVE for cursor in feed.cursors)


def test_a_request_under_way_is_not_joined() -> None:
    feed = live_feed(4)
    queue: RequestQueue[str] = RequestQueue()
    for _ in range(2):
        feed.attach(Sink(), "now")
        for effect in take(feed):
            queue.add("alice", effect)
        [request] = queue.take(10)
        assert len(request.waiting) == 1


def test_another_users_requests_are_not_joined() -> None:
    queue: RequestQueue[str] = RequestQueue()
    for user in ("alice", "bob"):
        feed = live_feed(4)
        feed.attach(Sink(), "now")
        for effect in take(feed):
            queue.add(user, effect)
    assert [(shared.owner, len(shared.waiting)) for shared in queue.take(10)] == [
        ("alice", 1),
        ("bob", 1),
    ]


# --- A connection that fails ---


class FailingSink(Sink):
    """Cannot be written to, as after a defect."""

    def write(self, publication: Publication) -> None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_broken_connection_is_sent_away_and_the_others_go_on(is_behind: bool) -> None:
    feed = live_feed(4)
    broken = FailingSink()
    attach(feed, "now", sink=broken)
    _, sink = attach(feed, "now")
    if is_behind:
        feed.receive_live(live(event(6)))
        answer(take_read(feed), page(6, events(5, 6)))
    else:
        feed.receive_live(live(*events(5, 6)))
    [effect] = feed.effects
    assert isinstance(effect, Broken)
    assert (effect.sink, sink.offsets) == (broken, [5, 6])
    assert len(feed.cursors) == 1


# --- Catching up ---


def test_a_page_read_while_others_published_is_used() -> None:
    """Dropped, a busy channel would keep a client from ever catching up."""
    feed = live_feed(4)
    _, sink = attach(feed, Position("e1", 2))
    read = take_read(feed)
    feed.receive_live(live(event(5)))
    answer(read, page(4, events(3, 4)))
    assert (take(feed), sink.offsets) == ([], [3, 4, 5])


def test_a_page_of_another_epoch_syncs_the_feed_first() -> None:
    feed = live_feed(4)
    cursor, sink = attach(feed, Position("e1", 2))
    answer(take_read(feed), page(4, events(3, 4), epoch="e2", previous=[Position("e1", 2)]))
    assert sink.offsets == []
    answer(take_read(feed), page(4, epoch="e2", previous=[Position("e1", 2)]))
    assert (sink.frames[-1], cursor.position) == (("position", "e2:2"), ("e2", 2))


def test_a_cut_page_is_followed_by_history_and_not_by_the_ring() -> None:
    feed = live_feed(4)
    _, sink = attach(feed, "0", page(4))
    read = take_read(feed)
    feed.receive_live(live(event(5)))
    answer(read, page(4, events(1, 2), covered=2))
    read = take_read(feed)
    assert read.after == 2
    answer(read, page(5, [event(3), text(4), event(5)]))
    assert sink.offsets == [1, 2, 3, 4, 5]


def test_a_cursor_may_be_ahead_of_its_feed() -> None:
    feed = live_feed(4)
    cursor, sink = attach(feed, "0", page(4))
    answer(take_read(feed), page(6, events(1, 6)))
    assert cursor.state is CursorState.LIVE
    feed.receive_live(live(event(5), event(6), event(7)))
    assert sink.offsets == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_known_of_a_text_is_asked_for_from_there_on() -> None:
    feed = live_feed(9)
    attach(feed, "0", page(9))
    mark = TextMark("r1:1:m1", 5, 4)
    answer(take_read(feed), page(9, [text(3)], covered=3, marks={3: mark}))
    read = take_read(feed)
    assert (read.after, read.epoch, dict(read.known)) == (3, "e1", {mark.name: mark})


def test_a_full_outbox_gets_nothing_until_it_is_writable() -> None:
    feed = live_feed(4)
    cursor, sink = attach(feed, "now")
    sink.has_room = False
    feed.receive_live(live(event(5), event(6)))
    assert (take(feed), sink.offsets) == ([], [])
    sink.has_room = True
    cursor.advance()
    assert (sink.offsets, cursor.state) == ([5, 6], CursorState.LIVE)


def test_a_burst_that_a_cursor_had_no_room_for_comes_from_the_ring() -> None:
    feed = Feed(ring_bytes=64 * 1024)
    feed.confirm()
    answer(take_read(feed), page(0))
    cursor, sink = attach(feed, "now")
    sink.has_room = False
    for offset in range(1, 51):
        feed.receive_live(live(event(offset, size=200)))
    take(feed)
    sink.has_room = True
    cursor.advance()
    assert (take(feed), sink.offsets) == ([], list(range(1, 51)))
    assert cursor.state is CursorState.LIVE


def test_behind_the_ring_history_is_read() -> None:
    feed = Feed(ring_bytes=100)
    feed.confirm()
    answer(take_read(feed), page(0))
    cursor, sink = attach(feed, "now")
    sink.has_room = False
    for offset in range(1, 9):
        feed.receive_live(live(event(offset, size=40)))
    take(feed)
    sink.has_room = True
    cursor.advance()
    assert take_read(feed).after == 0


def test_history_trimmed_above_the_cursor_is_a_reset_once() -> None:
    feed = live_feed(9)
    _, sink = attach(feed, Position("e1", 3), page(9, floor=2))
    answer(take_read(feed), page(9, floor=5))
    answer(take_read(feed), page(9, floor=5, runs=[Run(2)]))
    answer(take_read(feed), page(9, events(6, 9), floor=5))
    assert sink.frames == [
        ("established", "e1:3", True),
        ("reset", "e1:1", "history_trimmed"),
        *[("event", offset) for offset in range(6, 10)],
    ]


def test_a_closed_cursor_writes_nothing_more() -> None:
    feed = live_feed(4)
    cursor, sink = attach(feed, "0")
    read = take_read(feed)
    cursor.close()
    answer(read, page(4, events(1, 4)))
    feed.receive_live(live(event(5)))
    assert sink.offsets == []


# --- Large events ---


def test_a_large_event_is_sent_in_parts_with_other_frames_between_them() -> None:
    body = b'{"x":"' + "é".encode() * PART_THRESHOLD_BYTES + b'"}'
    feed = live_feed(0)
    cursor, sink = attach(feed, "now")
    feed.receive_live(live(claim(1)))
    answer(take_read(feed), page(1, [claim(1, len(body))]))
    while cursor.state is CursorState.BODY:
        fetch = take_fetch(feed)
        assert fetch.length <= PART_BYTES
        cursor.receive_body(fetch, body[fetch.start : fetch.start + fetch.length])
    parts = [frame for frame in sink.frames if frame[0] == "part"]
    assert [frame[2] for frame in parts] == list(range(parts[0][3]))
    joined = orjson.loads("".join(frame[4] for frame in parts))
    assert joined == {"offset": 1, "seq": 1, **orjson.loads(body)}
    assert cursor.state is CursorState.LIVE


def test_a_large_text_is_sent_in_parts_too() -> None:
    content = ('say "é"\n' * PART_THRESHOLD_BYTES)[: PART_THRESHOLD_BYTES + 7]
    stored = content.encode()
    large = LargeText(
        3,
        "r1",
        "r1:1:m1",
        start=TextMark("r1:1:m1", 9, 8),
        size_bytes=len(stored) - 9,
        opening=b'{"type":"text_delta","data":{"position":8,"text":"',
        closing=b'"}}',
    )
    feed = live_feed(3)
    cursor, sink = attach(feed, Position("e1", 2))
    answer(take_read(feed), page(3, [large], covered=3))
    while cursor.state is CursorState.BODY:
        fetch = take_fetch(feed)
        assert (fetch.text, fetch.size_bytes) == ("r1:1:m1", len(stored))
        cursor.receive_body(fetch, stored[fetch.start : fetch.start + fetch.length])
    frames = [frame for frame in sink.frames if frame[0] == "part"]
    assert [frame[2] for frame in frames] == list(range(frames[0][3]))
    joined = orjson.loads("".join(frame[4] for frame in frames))
    assert joined == {
        "offset": 3,
        "type": "text_delta",
        "data": {"position": 8, "text": stored[9:].decode()},
    }
    read = take_read(feed)
    whole = TextMark(large.name, len(stored), 8 + len(joined["data"]["text"]))
    assert dict(read.known) == {large.name: whole}


def test_parts_wait_until_the_outbox_is_empty() -> None:
    """Room within the budget is not enough: a heartbeat would wait behind four parts."""
    feed = live_feed(1)
    cursor, sink = attach(feed, "0")
    answer(take_read(feed), page(1, [claim(1, PART_THRESHOLD_BYTES + 1)]))
    sink.is_idle = False
    cursor.receive_body(take_fetch(feed), b"x" * PART_BYTES)
    assert (take(feed), sink.has_room) == ([], True)
    sink.is_idle = True
    cursor.advance()
    assert take_fetch(feed).start == PART_BYTES


def test_a_body_is_asked_for_in_the_epoch_that_announced_it() -> None:
    feed = live_feed(1)
    cursor, _ = attach(feed, "0")
    answer(take_read(feed), page(1, [claim(1, 100)]))
    fetch = take_fetch(feed)
    assert fetch.epoch == "e1"
    cursor.receive_body(fetch, b"")
    assert take_read(feed).after == 0


def test_lost_bodies_are_told_once_and_then_delivery_goes_on() -> None:
    feed = live_feed(4)
    cursor, sink = attach(feed, "0")
    stored = [event(1), claim(2), event(3), claim(4)]
    resets = 0
    while effects := take(feed):
        [read] = effects
        assert isinstance(read, Read)
        resets += read.with_runs
        assert resets < 10
        remaining = [item for item in stored if item.offset > read.after]
        answer(read, page(4, remaining, runs=[Run(1)]))
    assert cursor.state is CursorState.LIVE
    assert [frame[2] for frame in sink.frames if frame[0] == "reset"] == ["event_lost"] * 2
    assert sink.offsets[-2:] == [1, 3]
