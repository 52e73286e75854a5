"""P4: a process that dies between any two steps leaves a run that reaches its end all the same.

The steps are commands to Redis. A proxy stops a process at one of them, before it reaches Redis or
right after Redis has carried it out; then the process is killed.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from relay.run_model import derive_run_id
from relay.scripts import load_scripts
from tests.conftest import OwnRedis
from tests.faults.conftest import Report
from tests.faults.crew import (
    SETTINGS,
    add_tabs,
    all_ended,
    ask,
    event_of,
    settings_for,
    start_worker,
    verify,
)
from tests.faults.scene import user_with_tabs
from tests.faults.sizes import sized
from tests.integration.worker_support import Client
from tests.support.fleet import Fleet
from tests.support.proxy import Link, RedisProxy
from tests.support.stack import Stack

FROZEN_DEADLINE_S = 15.0
SHA = {name: script.sha.encode() for name, script in load_scripts().items()}


class StepProxy(RedisProxy):
    """Lets nothing more pass from one command on, as if the process died there."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._marks: tuple[bytes, ...] = ()
        self._is_carried_out = False
        self._frozen = threading.Event()

    def freeze_at(self, *marks: bytes, carried_out: bool) -> None:
        """Freeze at the next data that has all these marks.

        Args:
            marks: What the command's bytes contain.
            carried_out: Whether Redis still gets the command. The answer is lost in any case.
        """

        def act() -> None:
            self._frozen.clear()
            self._is_carried_out = carried_out
            self._marks = marks

        self._do(act)

    async def frozen(self) -> None:
        """Return when it has come to that command."""
        assert await asyncio.to_thread(self._frozen.wait, FROZEN_DEADLINE_S), self._marks

    def _look_up(self, link: Link, data: bytes) -> None:
        super()._look_up(link, data)
        if not self._marks or not all(mark in data for mark in self._marks):
            return
        self._marks = ()
        if self._is_carried_out:
            link.server.write(data)
        self._is_blackhole = True
        for each in self._links:
            each.is_blackholed = True
        self._frozen.set()


async def load_all(client: Client) -> None:
    """Make Redis know the scripts: the first call of an unknown one is not carried out."""
    for script in load_scripts().values():
        await client.link.client.script_load(script.source)


@dataclass(frozen=True)
class Point:
    """A place between two steps.

    Attributes:
        command: What the command's bytes contain.
        carried_out: Whether the process dies after it, not before.
        is_accepted: Whether the run exists by then.
    """

    command: bytes
    carried_out: bool
    is_accepted: bool = True


SUBMIT_POINTS = (
    Point(b"ZADD", carried_out=False, is_accepted=False),
    Point(b"ZADD", carried_out=True, is_accepted=False),
    Point(SHA["submit"], carried_out=False, is_accepted=False),
    Point(SHA["submit"], carried_out=True),
    Point(b"XADD", carried_out=False),
    Point(b"XADD", carried_out=True),
)


@dataclass(frozen=True)
class Size:
    points: tuple[Point, ...]


@sized(small=Size(SUBMIT_POINTS[2:5]), full=Size(SUBMIT_POINTS))
async def test_gateway_killed_within_submit(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    with StepProxy(server.port) as proxy:
        async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
            other, *_ = await asyncio.gather(stack.start_gateway(), start_worker(stack))
            victim = await stack.start_gateway(redis_url=proxy.redis_url)
            async with (
                Fleet([other.url], stack.token) as fleet,
                Client(settings_for(stack), "alice") as client,
                httpx.AsyncClient(base_url=victim.url, trust_env=False, timeout=60) as http,
            ):
                tabs = add_tabs(fleet, client.user_id)
                await fleet.connect()
                await load_all(client)
                run_ids = []
                for number, point in enumerate(size.points):
                    if number:
                        proxy.accept()
                        await stack.restart(victim)
                    message_id = uuid.uuid4().hex
                    asked: dict[str, Any] = {
                        "thread_id": f"t{number}",
                        "agent": "echo",
                        "content": "hello",
                    }
                    run_id = derive_run_id(client.user_id, message_id)
                    proxy.freeze_at(point.command, run_id.encode(), carried_out=point.carried_out)
                    headers = {"Authorization": f"Bearer {stack.token(client.user_id)}"}
                    body = {**asked, "message_id": message_id}
                    posting = asyncio.create_task(http.post("/v1/runs", json=body, headers=headers))
                    await proxy.frozen()
                    await victim.kill()
                    [lost] = await asyncio.gather(posting, return_exceptions=True)
                    assert isinstance(lost, httpx.TransportError), lost
                    if point.is_accepted:
                        await all_ended(tabs, [run_id])
                    # A client that got no answer asks again, with the same id.
                    again = await tabs[0].client.send_message(**asked, message_id=message_id)
                    assert again.run_id == run_id
                    assert again.duplicate is point.is_accepted, point
                    run_ids.append(run_id)
                    await all_ended(tabs, [run_id])
                runs = await verify(client, tabs, run_ids)
                for events in runs.values():
                    assert event_of(events, "agent_started")["attempt"] == 1
                    assert events[-1]["data"]["result"] == "hello"
    report(points=len(size.points))


# Scripts have the names of events in their sources; only events have them as their type.
STARTED, COMPLETED = b'"type":"agent_started"', b'"type":"agent_completed"'

WORK_POINTS = (
    Point(SHA["claim"], carried_out=False),
    Point(SHA["claim"], carried_out=True),
    Point(STARTED, carried_out=False),
    Point(STARTED, carried_out=True),
    Point(COMPLETED, carried_out=False),
    Point(COMPLETED, carried_out=True),
    Point(b"XACK", carried_out=False),
    Point(b"XACK", carried_out=True),
)


@sized(small=Size((WORK_POINTS[1], WORK_POINTS[5])), full=Size(WORK_POINTS))
async def test_worker_killed_within_claim_and_finish(
    size: Size, own_redis: OwnRedis, tmp_path: Path, report: Report
) -> None:
    server = await own_redis()
    with StepProxy(server.port) as proxy:
        async with Stack(tmp_path, server.url, settings=SETTINGS) as stack:
            _, victim = await asyncio.gather(
                stack.start_gateways(2), start_worker(stack, redis_url=proxy.redis_url)
            )
            async with user_with_tabs(stack, "alice") as (client, tabs):
                await load_all(client)
                run_ids = []
                for number, point in enumerate(size.points):
                    if number:
                        proxy.accept()
                        victim.start()
                        await stack.wait_worker_started(victim, times=number + 1)
                    proxy.freeze_at(point.command, carried_out=point.carried_out)
                    # The second run waits for the end of the first one, whoever brings it about.
                    run_ids += [
                        await ask(tabs[0], "linger", content, thread_id=f"t{number}")
                        for content in ("first", "second")
                    ]
                    await proxy.frozen()
                    await victim.kill()
                    replacement = await start_worker(stack)
                    await all_ended(tabs, run_ids)
                    await replacement.terminate()
                runs = await verify(client, tabs, run_ids)
                ends = [
                    (runs[run_id][-1]["type"], runs[run_id][-1]["attempt"]) for run_id in run_ids
                ]
                for number, point in enumerate(size.points):
                    first, second = ends[2 * number : 2 * number + 2]
                    has_begun = point.carried_out or point.command != SHA["claim"]
                    has_ended = point.command == b"XACK" or point == WORK_POINTS[5]
                    again = has_begun and not has_ended
                    assert first == ("agent_completed", 2 if again else 1), (number, point)
                    # Whoever settles the first may have taken the second one already.
                    attempts = (1, 2) if point.command == b"XACK" else (1,)
                    assert second[0] == "agent_completed", (number, point)
                    assert second[1] in attempts, (number, point)
                # What the dead left in the streams is settled by others.
                letters = await client.link.client.xlen(client.keys.dead_letters)
                assert letters == 0
    report(points=len(size.points))
