"""Many users at once on several gateways and workers: all of their own events, none of others'."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from relay.client import RunAccepted
from relay.codec import splice
from relay.events import TERMINAL
from relay.keys import Keys, UserKeys
from relay.testing import SequenceChecker
from tests.e2e.agents.marked_agents import PIECES, mark
from tests.support.fleet import Fleet, FleetClient, Frame, for_each
from tests.support.stack import Stack

if TYPE_CHECKING:
    import redis.asyncio

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


async def acknowledged(
    redis: redis.asyncio.Redis, keys: UserKeys
) -> list[tuple[str, str, dict[str, Any]]]:
    """Give run, type and data of every lifecycle event of a user that is in Redis."""
    found = []
    entries: list[tuple[bytes, dict[bytes, bytes]]] = await redis.xrange(keys.log)  # type: ignore[assignment]
    for entry_id, fields in entries:
        event = orjson.loads(splice(fields[b"e"], int(entry_id.split(b"-")[0]), int(fields[b"s"])))
        found.append((event["run_id"], event["type"], event["data"]))
    return found


def whole_text(user_id: str, content: str) -> str:
    """Give what the agent writes in one run."""
    return "".join(f"{number} {mark(user_id, content)}" for number in range(PIECES))


async def verify(
    fleet: Fleet,
    asked: Mapping[str, Mapping[str, str]],
    redis: redis.asyncio.Redis,
    keys: Keys,
) -> None:
    """Fail unless each tab has each event of its user's runs, once, in order, and nothing else.

    Args:
        fleet: All tabs, there from the beginning.
        asked: What each user asked, by run.
        redis: Where the events are that were acknowledged.
        keys: Their names.
    """
    checker = SequenceChecker()
    for user_id, runs in asked.items():
        for event in await acknowledged(redis, keys.user(user_id)):
            checker.published(user_id, *event)
        for run_id, content in runs.items():
            checker.streamed(user_id, run_id, whole_text(user_id, content))
    for client in fleet.clients:
        checker.client(client.name, client.user_id)
        for _, frame in client.frames:
            checker.received(client.name, client.user_id, frame)
    checker.verify()
    for client in fleet.clients:
        assert client.resets == []
        assert client.outages == []
        verify_marks(client, asked[client.user_id])


def verify_marks(client: FleetClient, asked: Mapping[str, str]) -> None:
    """Fail unless every event of a tab was made for its user and for the request of its run."""
    by_run: dict[str, list[Frame]] = defaultdict(list)
    for event in client.events:
        by_run[event["run_id"]].append(event)
    assert set(by_run) == set(asked), client.name
    for run_id, events in by_run.items():
        lifecycle = [event["type"] for event in events if "seq" in event]
        assert lifecycle == STORY, (client.name, run_id)
        assert events[0]["data"]["content"] == asked[run_id]
        assert events[-1]["data"]["result"] == whole_text(client.user_id, asked[run_id])
        # The checker takes a completed run's result for its text: a lost piece is found here.
        text = ""
        for event in events:
            if event["type"] == "text_delta":
                assert event["data"]["position"] == len(text), (client.name, event)
                text += event["data"]["text"]
        assert text == whole_text(client.user_id, asked[run_id])
        own = mark(client.user_id, asked[run_id])
        for event in events:
            parts = list(texts_in(event["data"]))
            if event["type"] not in ("agent_queued", "agent_started"):
                assert any(own in part for part in parts), (client.name, event)
            for part in parts:
                assert part.count("|") == part.count(own), (client.name, event)


async def test_five_users_at_once_see_all_kinds_of_their_own_events_only(
    redis_url: str, key_prefix: str, redis: redis.asyncio.Redis, tmp_path: Path
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
            asked = {user_id: dict([run]) for user_id, run in zip(users, runs, strict=True)}
            for user_id, pair in tabs.items():
                for tab in pair:
                    await tab.until(has_all_of(asked[user_id]), 30.0)
                    shown = [event["type"] for event in tab.events]
                    assert [kind for kind in shown if kind != "text_delta"] == STORY
                    assert "text_delta" in shown
            await verify(fleet, asked, redis, Keys(key_prefix))
            # At once: each had begun before the first one ended.
            events = [event for asking, _ in tabs.values() for event in asking.events]
            begun = [one["timestamp"] for one in events if one["type"] == "tool_executing"]
            ended = [one["timestamp"] for one in events if one["type"] == "agent_completed"]
            assert max(begun) < min(ended)
        stack.assert_no_defects()


@pytest.mark.timeout(240)
async def test_hundred_users_get_every_event_of_twenty_runs_once_and_no_foreign_one(
    redis_url: str, key_prefix: str, redis: redis.asyncio.Redis, tmp_path: Path
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
            await verify(fleet, asked, redis, Keys(key_prefix))
            for client in fleet.clients:
                ends = [one["run_id"] for one in client.events if one["type"] in TERMINAL]
                assert ends == list(asked[client.user_id])
            pids = {
                event["data"]["result"]["pid"]
                for client in fleet.clients
                for event in client.events
                if event["type"] == "tool_completed"
            }
            assert pids == {worker.pid for worker in stack.workers}
        stack.assert_no_defects()
