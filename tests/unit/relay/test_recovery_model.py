"""Random histories of the delivery machine, and proof that each rule is needed.

``tests/unit/relay/delivery_model.py`` has the world and what it checks. A failure prints the
shortest history that still breaks; ``python -m tests.unit.relay.delivery_model FIRST COUNT``
searches further than this suite does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from relay.codec import LiveBatch
from relay.recovery import Cursor, Feed, FeedState, FetchBody, Page, Read
from tests.unit.relay import delivery_model as model
from tests.unit.relay import test_recovery as histories

HISTORIES = 1_500
PER_PART = 300


@pytest.mark.parametrize("first", range(0, HISTORIES, PER_PART))
def test_random_histories_break_no_promise(first: int) -> None:
    found = model.search(range(first, first + PER_PART))
    assert found is None, model.describe(model.random_history(found[0]))


@pytest.mark.parametrize("seed", range(12))
def test_long_histories_break_no_promise(seed: int) -> None:
    history = model.random_history(1_000_000 + seed, 400)
    assert model.failure_of(history) is None, model.describe(history)


@pytest.mark.parametrize("seed", range(60))
def test_resuming_after_every_prefix_ends_in_the_same_state(seed: int) -> None:
    """Every moment of every connection, on another gateway, and also after a restart of Redis."""
    rng = random.Random(seed)
    with model.small_parts():
        world = model.World(keeps_transcripts=True)
        connections = {}
        for name, step in model.random_history(2_000_000 + seed, 70):
            world.step(name, step)
            for client in world.clients:
                if client.connection is not None:
                    connections[id(client.connection)] = client.connection
        world.quiesce()
        if rng.random() < 0.5:
            world.instance += 1
            world.publish(rng)
            world.quiesce()
        moments = [moment for item in connections.values() for moment, _ in item.transcript]
        stayed = list(world.clients)
        for moment in moments:
            returned = moment.fork()
            # One that was reset meanwhile may start elsewhere; what it is owed is checked all
            # the same. Lost bodies are told by resets, whether before or after the moment.
            world.clients = [*stayed, returned]
            world.connect(returned, rng.choice(world.gateways))
            world.quiesce()
            assert returned.connection is not None
            returned.connection.close()


def without(
    path: str, value: Callable[..., Any] | property
) -> Callable[[pytest.MonkeyPatch], None]:
    """Give what replaces a part of the machine or of its shell."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        owner, name = path.split(".")
        patch.setattr({**vars(model), **globals()}[owner], name, value, raising=False)

    return apply


attach, lose, receive_live = Feed.attach, Feed.lose, Feed.receive_live
receive_feed_page, receive_page, receive_body = (
    Feed.receive_page,
    Cursor.receive_page,
    Cursor.receive_body,
)
accept, start, write_page, receive = Feed.accept, Cursor._start, Cursor._write_page, Cursor.receive


def attach_and_read_at_once(feed: Feed, sink: Any, since: Any) -> Cursor:
    feed.confirm()
    return attach(feed, sink, since)


def deliver_while_syncing(feed: Feed, batch: LiveBatch) -> None:
    if feed.state is FeedState.SYNCING and batch.epoch == feed.epoch:
        for publication in batch.publications:
            if not publication.is_claim:
                feed._deliver(publication)
        return
    receive_live(feed, batch)


def ignore_while_syncing(feed: Feed, batch: LiveBatch) -> None:
    if feed.state is not FeedState.SYNCING:
        receive_live(feed, batch)


def deliver_whatever_the_epoch(feed: Feed, batch: LiveBatch) -> None:
    receive_live(feed, batch._replace(epoch=feed.epoch or ""))


def fetch_claims_aside(feed: Feed, batch: LiveBatch) -> None:
    """Later events overtake the large one."""
    if feed.state is FeedState.LIVE and batch.epoch == feed.epoch:
        for publication in batch.publications:
            if publication.is_claim and publication.offset == feed.head + 1:
                feed.head = publication.offset
            else:
                receive_live(feed, LiveBatch(batch.epoch, [publication]))
        return
    receive_live(feed, batch)


def take_any_page_of_a_feed(feed: Feed, read: Read, page: Page) -> None:
    receive_feed_page(feed, dataclasses.replace(read, generation=feed.generation), page)


def take_any_page_of_a_cursor(cursor: Cursor, read: Read, page: Page) -> None:
    receive_page(cursor, dataclasses.replace(read, generation=cursor.generation), page)


def take_any_piece(cursor: Cursor, fetch: FetchBody, piece: bytes) -> None:
    receive_body(cursor, dataclasses.replace(fetch, generation=cursor.generation), piece)


def forget_what_is_owed(cursor: Cursor, page: Page, read_after: int) -> None:
    start(cursor, page, read_after)
    cursor._owed = 0


def use_pages_of_any_epoch(feed: Feed, read: Read, page: Page) -> bool:
    return True


def write_what_is_below_the_cursor(cursor: Cursor, publication: Any) -> None:
    cursor._offset = min(cursor._offset, publication.offset - 1)
    receive(cursor, publication)


def start_whole_at_the_head(cursor: Cursor, page: Page, read_after: int) -> None:
    head = cursor._feed.head
    if cursor._resolve(page) is not None and page.offset > head:
        page = dataclasses.replace(page, offset=head)
    start(cursor, page, read_after)


def go_on_from_the_ring(cursor: Cursor, page: Page) -> None:
    write_page(cursor, dataclasses.replace(page, offset=page.covered))


def ignore_that_events_are_lost(cursor: Cursor, page: Page) -> None:
    kept = [item for item in page.publications if item.size_bytes]
    write_page(cursor, dataclasses.replace(page, publications=kept))


def begin_epoch_with_texts_as_they_stand(world: model.World) -> None:
    store = world.store
    store.previous.insert(0, model.Position(store.epoch, store.offset))
    store.epoch = world.new_epoch()
    store.instance = world.instance
    world.broadcast(LiveBatch(store.epoch, []))


ABLATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "rule 1: instance check": without("World.open_channel", lambda world: world.store),
    "rule 6: subscribe, then read": without("Feed.attach", attach_and_read_at_once),
    "rule 7: nothing is delivered while syncing": without(
        "Feed.receive_live", deliver_while_syncing
    ),
    "rule 7: live messages raise the target": without("Feed.receive_live", ignore_while_syncing),
    "rule 7: another epoch is never delivered": without(
        "Feed.receive_live", deliver_whatever_the_epoch
    ),
    "rule 8: a claim is a gap": without("Feed.receive_live", fetch_claims_aside),
    "rule 9: a feed's generations": without("Feed.receive_page", take_any_page_of_a_feed),
    "rule 9: a cursor's generations": without("Cursor.receive_page", take_any_page_of_a_cursor),
    "rule 9: a body's generations": without("Cursor.receive_body", take_any_piece),
    "rule 10: owed": without("Cursor._start", forget_what_is_owed),
    "rule 10: the feed first": without("Feed.accept", use_pages_of_any_epoch),
    "rule 11: never below the cursor": without("Cursor.receive", write_what_is_below_the_cursor),
    "rule 13: audit": without("Gateway.audit", lambda gateway: None),
    "rule 15: outbox": without("Connection.has_room", property(lambda connection: True)),
    "parts wait for an idle socket": without(
        "Cursor._has_room_for", lambda cursor, body: cursor.sink.has_room
    ),
    "whole: after a cut page history": without("Cursor._write_page", go_on_from_the_ring),
    "whole: a start below the channel's offset": without("Cursor._start", start_whole_at_the_head),
    "sharing: only what asks the same": without("Read.question", property(lambda read: "read")),
    "sharing: not what knows a text already": without(
        "Read.question", property(lambda read: (read.after, read.with_runs))
    ),
    "sharing: not another piece": without(
        "FetchBody.question", property(lambda fetch: (fetch.epoch, fetch.text or fetch.offset))
    ),
    "rewind: less than was seen": without("Feed._rotate", lambda feed: feed._settle()),
    "rewind: texts stand anew": without("World.begin_epoch", begin_epoch_with_texts_as_they_stand),
    "a position keeps its epoch until the reset": without(
        "Cursor.position",
        property(lambda cursor: model.Position(cursor._feed.epoch or "", cursor.offset)),
    ),
    "a lost body is a reset": without("Cursor._write_page", ignore_that_events_are_lost),
    "a lost body is one reset": without(
        "Cursor._lost_until", property(lambda cursor: 0, lambda cursor, value: None)
    ),
}


REWINDS = {"fail_over": 8, "copy": 8, "publish": 40}
BURSTS = {"execute": 1, "work": 48, "fail_over": 8, "copy": 3}
FOCUS = {
    "rule 1: instance check": REWINDS,
    "rule 7: live messages raise the target": {"execute": 16, "reply": 4, "trim": 6},
    "rewind: texts stand anew": BURSTS,
}
"""Where random histories alone would have to be many."""

DIRECTED = {
    "rule 7: another epoch is never delivered": (
        histories.test_clients_below_the_surviving_offset_are_told_their_new_position
    ),
    "rule 10: the feed first": histories.test_a_page_of_another_epoch_syncs_the_feed_first,
    "whole: a start below the channel's offset": (
        histories.test_a_client_that_left_after_a_cut_page_gets_its_texts_from_a_lagging_gateway
    ),
    "a position keeps its epoch until the reset": (
        histories.test_heartbeats_before_a_reset_keep_the_clients_old_position
    ),
}
"""Where they would have to be very many: the shortest history that needs the rule."""


@pytest.mark.parametrize("rule", [rule for rule in ABLATIONS if rule not in DIRECTED])
def test_no_rule_can_be_left_out(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ABLATIONS[rule](monkeypatch)
    assert model.search(range(3_000), 90, FOCUS.get(rule)) is not None


@pytest.mark.parametrize("rule", DIRECTED)
def test_no_rule_can_be_left_out_of_its_own_history(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ABLATIONS[rule](monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        DIRECTED[rule]()
