"""A stack whose workers come to harm, and what each of a user's tabs must have seen of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from relay.codec import splice
from relay.config import Settings, load_settings
from relay.events import TERMINAL
from relay.testing import SequenceChecker
from relay.testing.processes import ManagedProcess
from relay.workers import LivingWorker, list_workers
from tests.faults.worker_agents import BEGUN, FINISHED
from tests.integration.worker_support import Client, eventually
from tests.support.fleet import Fleet, FleetClient, Frame
from tests.support.stack import Stack

ROOT = Path(__file__).parents[2]
AGENTS = "tests.faults.worker_agents:worker"
LEASE_MS = 1_500
GRACE_MS = 1_000

SETTINGS: Mapping[str, str | int] = {
    "LEASE_MS": LEASE_MS,
    "CANCEL_GRACE_MS": GRACE_MS,
    "WORKER_GRACE_S": 20,
    "WORKER_CONCURRENCY": 200,
    "MAX_ACTIVE_RUNS_PER_USER": 500,
    "MAX_QUEUED_RUNS_PER_USER": 5_000,
    "FRAMES_PER_SECOND": 10_000,
    # The log is the ledger here: nothing may be trimmed before it was compared.
    "LOG_MAX_EVENTS": 100_000,
}
WHOLE_TEXT = BEGUN + FINISHED

Runs = dict[str, list[Frame]]


def settings_for(stack: Stack, **overrides: object) -> Settings:
    """Give the settings of the stack's processes, for what the test itself starts."""
    given = {name.lower(): value for name, value in {**SETTINGS, **overrides}.items()}
    return load_settings(
        env_file=None, redis_url=stack.redis_url, key_prefix=stack.key_prefix, **given
    )


async def start_worker(stack: Stack, **settings: Any) -> ManagedProcess:
    """Start a worker with this package's agents."""
    return await stack.start_worker(AGENTS, ROOT, **settings)


async def start_workers(stack: Stack, count: int) -> list[ManagedProcess]:
    """Start several workers at once."""
    return list(await asyncio.gather(*(start_worker(stack) for _ in range(count))))


def add_tabs(fleet: Fleet, user_id: str) -> list[FleetClient]:
    """Give a user one tab on each gateway; each knows the others too, for when its own is gone."""
    return [
        fleet.add(user_id, urls=[url, *(other for other in fleet.urls if other != url)])
        for url in fleet.urls
    ]


async def ask(
    tab: FleetClient, agent: str, content: object, *, thread_id: str | None = None
) -> str:
    """Send a message through a tab; give the run's id."""
    accepted = await tab.client.send_message(
        str(content), thread_id=thread_id or uuid.uuid4().hex, agent=agent
    )
    assert not accepted.duplicate
    return accepted.run_id


async def ask_many(
    tabs: Sequence[FleetClient], agents: Iterable[str], content: object
) -> list[str]:
    """Send a message for each agent, through the tabs in turn; give the ids in this order."""
    return await asyncio.gather(
        *(ask(tabs[number % len(tabs)], name, content) for number, name in enumerate(agents))
    )


async def seen(tab: FleetClient, run_ids: Iterable[str], event_type: str) -> None:
    """Wait until a tab has seen an event of this type of each run."""
    wanted = set(run_ids)
    await tab.until(
        lambda one: (
            wanted <= {event["run_id"] for event in one.events if event["type"] == event_type}
        )
    )


async def all_ended(
    tabs: Iterable[FleetClient], run_ids: Sequence[str], deadline_s: float = 30.0
) -> None:
    """Wait until every tab has a terminal event of each run."""
    wanted = set(run_ids)
    for tab in tabs:
        await tab.until(
            lambda one: (
                wanted <= {event["run_id"] for event in one.events if event["type"] in TERMINAL}
            ),
            deadline_s,
        )


async def living(client: Client) -> list[LivingWorker]:
    """List the workers that live."""
    return await list_workers(client.link, client.keys)


async def run_of_worker(
    client: Client, stack: Stack, run_ids: Iterable[str]
) -> dict[ManagedProcess, list[str]]:
    """Say which process has which of a user's runs."""
    processes = {process.pid: process for process in stack.workers if process.is_running}
    pids = {worker.worker_id: worker.card.pid for worker in await living(client)}
    user = client.keys.user(client.user_id)
    found: dict[ManagedProcess, list[str]] = defaultdict(list)
    for run_id in run_ids:
        stored: Any = await client.link.client.hget(user.run(run_id), "worker")
        found[processes[pids[stored.decode()]]].append(run_id)
    return found


async def ledger(client: Client) -> Runs:
    """Give all lifecycle events that Redis holds of a user's runs."""
    runs: Runs = defaultdict(list)
    entries: Any = await client.link.client.xrange(client.keys.user(client.user_id).log)
    for entry_id, fields in entries:
        offset, seq = int(entry_id.split(b"-")[0]), int(fields[b"s"])
        event = orjson.loads(splice(fields[b"e"], offset, seq))
        runs[event["run_id"]].append(event)
    return runs


async def verify(
    client: Client,
    tabs: Iterable[FleetClient],
    run_ids: Sequence[str],
    *,
    texts: Mapping[str, str] | None = None,
) -> Runs:
    """Fail unless every tab has each event of the user's runs once, in order, and no other.

    The books are Redis' log, written by scripts that have been tested by themselves; the grammar
    and the whole numbers of each run are checked beside them.

    Args:
        texts: All text of the last attempt of runs, as far as it is known.

    Returns:
        The events of each run.
    """
    runs = await ledger(client)
    assert set(runs) == set(run_ids)
    for tab in tabs:
        checker = SequenceChecker()
        for run_id, events in runs.items():
            for event in events:
                checker.published(client.user_id, run_id, event["type"], event["data"])
        for run_id, text in (texts or {}).items():
            attempt = max(event["attempt"] for event in runs[run_id])
            checker.streamed(client.user_id, run_id, text, attempt)
        checker.client(tab.name, client.user_id)
        for _, frame in tab.frames:
            checker.received(tab.name, client.user_id, frame)
        checker.verify()
        assert not tab.holes, tab.holes
        assert not tab.resets, tab.resets
        for run_id, events in runs.items():
            assert tab.lifecycle(run_id) == [(event["seq"], event["type"]) for event in events]
    for run_id, events in runs.items():
        types = [event["type"] for event in events]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), run_id
        assert [name in TERMINAL for name in types] == [False] * (len(types) - 1) + [True], types
    return runs


def types_of(events: Iterable[Frame]) -> list[str]:
    """Give the types of a run's events."""
    return [event["type"] for event in events]


def event_of(events: Iterable[Frame], event_type: str) -> Frame:
    """Give a run's only event of this type."""
    [event] = [event for event in events if event["type"] == event_type]
    return event


def seconds_until(
    tab: FleetClient, run_ids: Iterable[str], event_types: Iterable[str], since_s: float
) -> list[float]:
    """Say when, after a time of day, a tab had the last event of these types of each run."""
    wanted, names, arrived = set(run_ids), set(event_types), {}
    for event, at_s in zip(tab.events, tab.arrived_at_s, strict=True):
        if event["type"] in names and event["run_id"] in wanted:
            arrived[event["run_id"]] = at_s - since_s
    assert set(arrived) == wanted
    return list(arrived.values())


async def contact(client: Client, count: int, *, is_first: bool = True) -> None:
    """Wait until so many workers live.

    Args:
        client: Looks at Redis.
        count: How many.
        is_first: Wait, too, until all reapers have had the contact with Redis that they need.
    """

    async def are_there() -> bool:
        return len(await living(client)) >= count

    await eventually(are_there)
    if is_first:
        await asyncio.sleep(LEASE_MS / 1_000)


def now_s() -> float:
    """The time of day, as events carry it."""
    return time.time()
