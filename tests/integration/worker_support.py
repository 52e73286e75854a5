"""What the worker's tests share: settings, a gateway's side of runs, and what arrived of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from agent_worker import Run, Worker
from relay.codec import splice
from relay.config import Settings, load_settings
from relay.events import EventType
from relay.grammar import RunGrammar
from relay.keys import Keys
from relay.run_model import RunDetail, RunLimits, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import RedisLink
from relay.testing import streams
from tests.support.acl import as_owner, as_user

DEADLINE_S = 10.0
ENDED = ("completed", "error", "cancelled")


def worker_settings(redis_url: str, key_prefix: str, **overrides: object) -> Settings:
    overrides = {"cancel_grace_ms": 300, "worker_grace_s": 10, **overrides}
    url = as_user(redis_url, "worker")
    return load_settings(env_file=None, redis_url=url, key_prefix=key_prefix, **overrides)


async def eventually(
    condition: Callable[[], Awaitable[Any]], deadline_s: float = DEADLINE_S
) -> Any:
    """Give the first true value of ``condition``."""
    end_s = time.monotonic() + deadline_s
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < end_s, "it did not happen in time"
        await asyncio.sleep(0.005)


def echo_worker(*names: str) -> Worker:
    """Give a worker whose agents say what they are asked; ``echo`` where none is named."""
    worker = Worker()

    async def echo(run: Run) -> str:
        await run.delta(run.request.content)
        return run.text

    for name in names or ("echo",):
        worker.agent(name)(echo)
    return worker


class Client:
    """Submits runs and reads what came of them, as a gateway does, without a worker's objects."""

    def __init__(self, settings: Settings, user_id: str = "alice") -> None:
        self.user_id = user_id
        self.keys = Keys(settings.key_prefix)
        self.link = RedisLink(as_owner(settings.redis_url))
        limits = RunLimits(
            dispatch_check_ms=settings.lease_ms, cancel_grace_ms=settings.cancel_grace_ms
        )
        self.registry = RunRegistry(self.link, self.keys, limits)
        self._read: dict[int, dict[str, Any]] = {}
        streams.record("log", user_id, lambda: [self._read[at] for at in sorted(self._read)])

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.aclose()

    async def submit(self, agent: str, content: str = "hi", **options: Any) -> str:
        request = SubmitRequest(
            user_id=self.user_id,
            thread_id=options.pop("thread_id", uuid.uuid4().hex),
            agent=agent,
            content=content,
            message_id=options.pop("message_id", uuid.uuid4().hex),
            **options,
        )

        async def is_registered() -> bool:
            return bool(await self.link.client.hexists(self.keys.agents, agent))

        await eventually(is_registered)
        return (await self.registry.submit(request)).run_id

    async def status(self, run_id: str) -> str:
        detail = await self.registry.get(self.user_id, run_id)
        return "unknown" if detail is None else detail.summary.status

    async def ended(self, run_id: str, deadline_s: float = DEADLINE_S) -> RunDetail:
        async def look() -> RunDetail | None:
            detail = await self.registry.get(self.user_id, run_id)
            return detail if detail and detail.summary.status in ENDED else None

        found: RunDetail = await eventually(look, deadline_s)
        return found

    async def has_event(self, run_id: str, event_type: EventType) -> None:
        async def look() -> bool:
            return event_type in [event["type"] for event in await self.log(run_id)]

        await eventually(look)

    async def log(self, run_id: str) -> list[dict[str, Any]]:
        """Give the run's lifecycle events as clients get them."""
        entries = await self.link.client.xrange(self.keys.user(self.user_id).log)
        events = [
            orjson.loads(splice(fields[b"e"], int(entry_id.split(b"-")[0]), int(fields[b"s"])))
            for entry_id, fields in entries
        ]
        found = [event for event in events if event.get("run_id") == run_id]
        self._read |= {event["offset"]: event for event in found}
        return found

    async def checked_log(self, run_id: str) -> list[dict[str, Any]]:
        """Give the run's events after making sure that they are whole, legal and in order."""
        events = await self.log(run_id)
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        offsets = [event["offset"] for event in events]
        assert offsets == sorted(set(offsets))
        grammar = RunGrammar()
        for event in events:
            grammar.apply(EventType(event["type"]), event["data"])
        assert grammar.is_ended
        return events
