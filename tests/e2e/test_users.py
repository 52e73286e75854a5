"""Many users at once on several gateways and workers: all of their own events, none of others'."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.client import RunAccepted
from relay.events import TERMINAL, EventType
from relay.grammar import RunGrammar
from tests.e2e.agents.marked_agents import PIECES, mark
from tests.support.fleet import Fleet, FleetClient, Frame, for_each
from tests.support.stack import Stack

ROOT = Path(__file__).parents[2]
AGENTS = "tests.e2e.agents.marked_agents:worker"
STORY = [
    "agent_queued",
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "agent_completed",
]


async def start(stack: Stack) -> None:
    """Start two gateways and two workers."""
    await asyncio.gather(
        stack.start_gateways(2),
        stack.start_worker(AGENTS, ROOT),
        stack.start_worker(AGENTS, ROOT),
    )


def add_two_tabs_each(fleet: Fleet, users: list[str]) -> dict[str, tuple[FleetClient, FleetClient]]:
    """Give each user a tab on each gateway; which of them will ask is left to chance."""
    chooser = random.Random(7)
    return {
        user_id: (
            fleet.add(user_id, urls=[(urls := chooser.sample(fleet.urls, 2))[0]]),
            fleet.add(user_id, urls=[urls[1]]),
        )
        for user_id in users
    }


async def ask(client: FleetClient, content: str, thread_id: str, agent: str) -> tuple[str, str]:
    """Send a message; give its run and its content."""
    accepted: RunAccepted = await client.client.send_message(
        content, thread_id=thread_id, agent=agent
    )
    assert not accepted.duplicate
    return accepted.run_id, content


def has_all_of(run_ids: Iterable[str]) -> Callable[[FleetClient], bool]:
    """Give the condition that a tab has the end of each of these runs."""
    return lambda client: all(client.has_ended(run_id) for run_id in run_ids)


def texts_in(value: Any) -> Iterator[str]:
    """Give every text in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def verify(client: FleetClient, asked: dict[str, str]) -> None:
    """Fail unless a tab has each event of its user's runs, once, in order, and nothing else.

    Args:
        client: A tab.
        asked: What its user asked, by run.
    """
    events = client.events
    assert client.resets == []
    assert client.holes == []
    offsets = [event["offset"] for event in events]
    assert offsets == sorted(set(offsets)), f"{client.name}: offsets do not rise"
    by_run: dict[str, list[Frame]] = defaultdict(list)
    for event in events:
        assert event["user_id"] == client.user_id, (client.name, event)
        by_run[event["run_id"]].append(event)
    assert set(by_run) == set(asked), client.name
    for run_id, own in by_run.items():
        verify_run(client.user_id, asked[run_id], own)


def verify_run(user_id: str, content: str, events: list[Frame]) -> None:
    """Fail unless these are all events of one run, each made for this user and this request."""
    lifecycle = [event for event in events if "seq" in event]
    assert [event["type"] for event in lifecycle] == STORY
    assert [event["seq"] for event in lifecycle] == list(range(1, len(STORY) + 1))
    grammar, text = RunGrammar(), ""
    own = mark(user_id, content)
    for event in events:
        kind, data = EventType(event["type"]), event["data"]
        if "seq" in event:
            grammar.apply(kind, data)
        if kind is EventType.TEXT_DELTA:
            assert data["position"] == len(text)
            text += data["text"]
        # Every mark that is anywhere in the event is this run's.
        for part in texts_in(data):
            assert part.count("|") == part.count(own), (user_id, content, event)
        has_mark = any(own in part for part in texts_in(data))
        needs_mark = kind not in (EventType.AGENT_QUEUED, EventType.AGENT_STARTED)
        # A piece of text may end within a mark; the whole text is compared below.
        assert has_mark or not needs_mark or kind is EventType.TEXT_DELTA, (content, event)
    assert grammar.is_ended
    assert lifecycle[0]["data"]["content"] == content
    whole = "".join(f"{number} {own}" for number in range(PIECES))
    assert text == whole
    assert lifecycle[-1]["data"]["result"] == whole


async def test_five_users_at_once_see_all_kinds_of_their_own_events_only(
    redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    users = [f"user-{number}" for number in range(5)]
    async with Stack(tmp_path, redis_url, key_prefix=key_prefix) as stack:
        await start(stack)
        async with Fleet(stack.urls, stack.token) as fleet:
            tabs = add_two_tabs_each(fleet, users)
            await fleet.connect()
            nodes = {user_id: {tab.nodes[0] for tab in pair} for user_id, pair in tabs.items()}
            assert all(len(served_by) == 2 for served_by in nodes.values())
            runs = await asyncio.gather(
                *(ask(asking, "hello", "t1", "steady") for asking, _ in tabs.values())
            )
            asked = dict(zip(users, runs, strict=True))
            for user_id, pair in tabs.items():
                run_id, content = asked[user_id]
                for tab in pair:
                    await tab.until(has_all_of([run_id]), 30.0)
                    verify(tab, {run_id: content})
                    shown = [event["type"] for event in tab.events]
                    for kind in STORY:
                        assert shown.count(kind) == 1
                    assert shown.count("text_delta") >= 1
            # At once: each had begun before the first one ended.
            events = [event for asking, _ in tabs.values() for event in asking.events]
            begun = [one["timestamp"] for one in events if one["type"] == "tool_executing"]
            ended = [one["timestamp"] for one in events if one["type"] == "agent_completed"]
            assert max(begun) < min(ended)
        stack.assert_no_defects()


@pytest.mark.timeout(240)
async def test_hundred_users_get_every_event_of_twenty_runs_once_and_no_foreign_one(
    redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    users = [f"user-{number:03d}" for number in range(100)]
    settings = {"MAX_QUEUED_RUNS_PER_USER": 20, "FRAMES_PER_SECOND": 100}
    async with Stack(tmp_path, redis_url, key_prefix=key_prefix, settings=settings) as stack:
        await start(stack)
        async with Fleet(stack.urls, stack.token) as fleet:
            tabs = add_two_tabs_each(fleet, users)
            await fleet.connect()
            asked: dict[str, dict[str, str]] = {user_id: {} for user_id in users}

            async def ask_twenty_times(client: FleetClient) -> None:
                for number in range(20):
                    # One thread: the runs wait for each other, and come in the order asked.
                    run_id, content = await ask(client, f"request {number}", "t1", "quick")
                    asked[client.user_id][run_id] = content

            await for_each([asking for asking, _ in tabs.values()], ask_twenty_times, at_once=100)
            for user_id, pair in tabs.items():
                for tab in pair:
                    await tab.until(has_all_of(asked[user_id]), 120.0)
            for user_id, pair in tabs.items():
                for tab in pair:
                    verify(tab, asked[user_id])
                    ends = [one["run_id"] for one in tab.events if one["type"] in TERMINAL]
                    assert ends == list(asked[user_id])
            assert fleet.outages() == []
            pids = {
                event["data"]["result"]["pid"]
                for client in fleet.clients
                for event in client.events
                if event["type"] == "tool_completed"
            }
            assert pids == {worker.pid for worker in stack.workers}
        stack.assert_no_defects()
