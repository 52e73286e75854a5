"""One user's channel, driven through the scripts as publishers, gateways and clients do."""

from __future__ import annotations

import itertools
import uuid
from typing import Any, Self

import orjson

from relay.codec import RunEnvelope
from relay.columns import columns_of
from relay.events import EventType
from relay.history import page_from, read_call
from relay.keys import Keys
from relay.recovery import HEADER_ONLY, Feed, Page, Read, TextMark
from relay.run_model import AgentInfo, Claim, RunLimits, SubmitRequest, Submitted
from relay.runs import RunRegistry
from relay.scripts import LogLimits, RedisLink

EVENT_MS = 1_700_000_000_000
Item = tuple[int | str | bytes, ...]


class Channel:
    """A user's channel. Use it as an async context manager."""

    def __init__(
        self,
        url: str,
        prefix: str,
        *,
        user_id: str = "alice",
        limits: LogLimits | None = None,
        run_limits: RunLimits | None = None,
        registers: bool = True,
    ) -> None:
        self.user_id = user_id
        self.link = RedisLink(url, limits=limits)
        self.all_keys = Keys(prefix)
        self.keys = self.all_keys.user(user_id)
        self.registry = RunRegistry(self.link, self.all_keys, run_limits)
        self.client = self.link.client
        self._registers = registers
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        if self._registers:
            await self.registry.register_agents([AgentInfo("docs")])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.aclose()

    async def submit(self, message_id: str | None = None, **options: Any) -> Submitted:
        number = next(self._numbers)
        request = SubmitRequest(
            user_id=self.user_id,
            thread_id=options.pop("thread_id", f"t{number}"),
            agent="docs",
            content=options.pop("content", "hi"),
            message_id=message_id or uuid.uuid4().hex,
            **options,
        )
        return await self.registry.submit(request)

    async def claim(self, run_id: str, *, fence: str | None = None) -> Claim:
        claim = await self.registry.claim(self.user_id, run_id, "w1", 15_000, fence=fence)
        assert isinstance(claim, Claim), claim
        return claim

    async def started(self, **options: Any) -> Attempt:
        """Submit and claim a run, and publish its ``agent_started`` as batch 1."""
        submitted = await self.submit(**options)
        attempt = Attempt(self, await self.claim(submitted.run_id))
        await attempt.publish(attempt.event(EventType.AGENT_STARTED))
        return attempt

    async def read(
        self,
        after: int = 0,
        *,
        with_runs: bool = False,
        known: dict[str, TextMark] | None = None,
        epoch: str | None = None,
    ) -> Page:
        if epoch is None and known:
            epoch = await self.epoch()
        read = Read(Feed(), 0, epoch or "", after, with_runs, known or {})
        [reply] = await self.link.run([read_call(self.link, self.all_keys, self.user_id, read)])
        return page_from(self.user_id, read, reply)

    async def header(self) -> Page:
        return await self.read(HEADER_ONLY, with_runs=True)

    async def epoch(self) -> str:
        return (await self.client.hget(self.keys.channel, "epoch")).decode()

    async def rotate(self, epoch: str) -> str:
        [reply] = await self.link.run([self.link.call("rotate", self.keys, None, epoch)])
        return reply[0].decode()


class Attempt:
    """A claimed attempt that publishes its batches by hand."""

    def __init__(self, channel: Channel, claim: Claim) -> None:
        self.channel = channel
        self.claim = claim
        self.run_id = claim.run_id
        self.envelope: RunEnvelope = claim.envelope
        self.batch = 0
        self.epoch = claim.epoch

    def event(
        self, event_type: EventType = EventType.AGENT_THINKING, *, size: int = 0, **data: Any
    ) -> Item:
        if size:
            data["filler"] = "x" * size
        event = self.envelope.encode(event_type, EVENT_MS, data)
        return columns_of(event_type, EVENT_MS, data, event)

    def text(self, message_id: str, position: int, text: str, before: int | None = None) -> Item:
        data = {"message_id": message_id, "position": position, "text": text}
        event = self.envelope.encode(EventType.TEXT_DELTA, EVENT_MS, data)
        return (1, "", message_id, text, event, position if before is None else before)

    def progress(self) -> Item:
        event = self.envelope.encode(EventType.TOOL_PROGRESS, EVENT_MS, {})
        return (2, "", "", "", event, "")

    async def publish(self, *items: Item) -> list[bytes]:
        """Publish the next batch; fails unless it is acknowledged."""
        self.batch += 1
        answer = await self.send(self.batch, *items)
        assert answer[0] == b"ok", answer
        self.epoch = answer[1].decode()
        return answer

    async def send(
        self, number: int, *items: Item, epoch: str | None = None, force: bool = False
    ) -> list[bytes]:
        """Send a batch with any number and give the answer."""
        channel = self.channel
        call = channel.link.call(
            "publish",
            channel.keys,
            self.run_id,
            self.run_id,
            self.claim.fence,
            number,
            self.epoch if epoch is None else epoch,
            "force" if force else "",
            *itertools.chain.from_iterable(items),
        )
        [answer] = await channel.link.run([call])
        return [bytes(part) for part in answer]

    async def end(self, event_type: EventType = EventType.AGENT_COMPLETED) -> list[bytes]:
        return await self.publish(self.event(event_type, result=1, duration_ms=1))


def types(page: Page) -> list[str]:
    """Give the types of a page's events."""
    return [
        orjson.loads(item.event)["type"] if item.event else "claim" for item in page.publications
    ]


def offsets(page: Page) -> list[int]:
    return [item.offset for item in page.publications]


def texts(page: Page) -> dict[int, tuple[int, str]]:
    """Give a page's texts: last offset → position and text."""
    found = {}
    for item in page.publications:
        event = orjson.loads(item.event or b"{}")
        if event.get("type") == "text_delta":
            found[item.offset] = (event["data"]["position"], event["data"]["text"])
    return found
