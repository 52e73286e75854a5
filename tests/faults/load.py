"""Publishing as a worker does, with books about everything that was published."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from agent_worker.patience import until_redis_answers
from relay.events import EventType
from relay.keys import Keys
from relay.publisher import Publisher
from relay.run_model import AgentInfo, Claim, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import LogLimits, RedisLink

if TYPE_CHECKING:
    from types import TracebackType

AGENT = "load"
LEASE_MS = 600_000


class LoadRun:
    """One run, published from the test.

    Attributes:
        events: Type and data of each lifecycle event, in ``seq`` order; the first is seq 1.
        texts: All text of each message of the current attempt, in order.
        pieces: How many pieces of text were published.
        is_lost: Redis has lost the run with all that was published in it.
    """

    def __init__(self, load: Load, claim: Claim) -> None:
        self.user_id = claim.envelope.user_id
        self.run_id = claim.run_id
        asked = claim.request
        queued = {
            "message_id": asked.message_id,
            "content": asked.content,
            "metadata": asked.metadata,
        }
        self.events: list[tuple[str, dict[str, Any]]] = [("agent_queued", queued)]
        self.texts: list[str] = []
        self.has_ended = False
        self.is_lost = False
        self.attempt = claim.envelope.attempt
        self.stream = load.publisher.open(claim)
        self._load = load
        self._is_in_message = False
        self._tools = 0
        self.pieces = 0

    async def publish(self, event_type: EventType, data: dict[str, Any]) -> None:
        """Publish a lifecycle event and enter it into the books."""
        await self.stream.publish(event_type, data)
        self.events.append((event_type.value, data))
        self._is_in_message = False

    async def think(self, *, padding: int = 0) -> None:
        """Publish the next ``agent_thinking``, marked with user and number."""
        thought = f"{self.user_id}#{len(self.events) + 1}" + "." * padding
        await self.publish(EventType.AGENT_THINKING, {"thought": thought})

    async def delta(self, *, padding: int = 0) -> None:
        """Publish a piece of text, marked with user and number."""
        self.pieces += 1
        piece = f"{self.user_id}.{self.pieces} " + "." * padding
        await self.stream.delta(piece)
        if not self._is_in_message:
            self.texts.append("")
            self._is_in_message = True
        self.texts[-1] += piece

    async def call_tool(self) -> None:
        """Publish a tool call from start to end."""
        self._tools += 1
        call = {"tool_call_id": f"call-{self._tools}", "tool_name": "look"}
        await self.publish(EventType.TOOL_EXECUTING, {**call, "parameters": {"n": self._tools}})
        await self.publish(
            EventType.TOOL_COMPLETED,
            {**call, "status": "ok", "result": self._tools, "duration_ms": 1},
        )

    async def complete(self, result: Any = None) -> None:
        """End the run; returns when Redis has it."""
        data = {"result": "".join(self.texts) if result is None else result, "duration_ms": 1}
        await self.stream.finish(EventType.AGENT_COMPLETED, data)
        self.events.append(("agent_completed", data))
        self.has_ended = True
        self.stream.close()

    async def retry(self) -> None:
        """End the attempt and begin the next one, as after a failure that may be repeated."""
        data = {"attempt": self.attempt + 1, "reason": "rate_limited", "delay_ms": 0}
        await self.publish(EventType.AGENT_RETRYING, data)
        await self.settle()
        self.stream.close()
        claim = await self._load.claim(self.user_id, self.run_id)
        self.attempt = claim.envelope.attempt
        self.stream = self._load.publisher.open(claim)
        self.texts = []
        await self.publish(EventType.AGENT_STARTED, {})

    async def settle(self) -> None:
        """Wait until Redis has everything so far."""
        await self.stream.flush()

    @property
    def lifecycle(self) -> list[tuple[int, str]]:
        """Give seq and type of all lifecycle events."""
        return [(seq, kind) for seq, (kind, _) in enumerate(self.events, start=1)]


class Load:
    """A worker's side of the relay, in the test's own process.

    Args:
        redis_url: Where to publish.
        key_prefix: Prefix of the keys.
        merge_ms: As of the publisher; 0 makes every piece of text an event of its own.
    """

    def __init__(
        self,
        redis_url: str,
        key_prefix: str,
        *,
        merge_ms: int = 0,
        limits: LogLimits | None = None,
    ) -> None:
        self.keys = Keys(key_prefix)
        self.runs: list[LoadRun] = []
        self._link = RedisLink(redis_url, limits=limits)
        self.redis = self._link.client
        self.registry = RunRegistry(self._link, self.keys)
        self.publisher = Publisher(self._link, self.keys, merge_ms=merge_ms)

    async def __aenter__(self) -> Self:
        await self.register()
        await self.publisher.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.publisher.__aexit__()
        await self._link.aclose()

    async def register(self) -> None:
        """Make the agent known, as a worker does when it starts and when Redis was emptied."""
        agents = [AgentInfo(AGENT, policy="parallel")]
        await until_redis_answers(lambda: self.registry.register_agents(agents), "register")

    async def open(self, user_id: str, content: str = "go") -> LoadRun:
        """Submit a run and start its first attempt."""
        request = SubmitRequest(user_id, "t1", AGENT, content, secrets.token_hex(8))
        submitted = await until_redis_answers(lambda: self.registry.submit(request), "submit")
        claim = await self.claim(user_id, submitted.run_id)
        run = LoadRun(self, claim)
        self.runs.append(run)
        await run.publish(EventType.AGENT_STARTED, {})
        return run

    async def claim(self, user_id: str, run_id: str) -> Claim:
        """Take a run for an attempt."""
        fence = secrets.token_hex(8)
        claim = await until_redis_answers(
            lambda: self.registry.claim(user_id, run_id, "load-worker", LEASE_MS, fence=fence),
            "claim",
        )
        assert isinstance(claim, Claim), claim
        return claim

    async def settle(self) -> None:
        """Wait until Redis has everything that was published in runs that still go on."""
        await asyncio.gather(*(run.settle() for run in self.runs if not run.has_ended))

    async def complete_all(self) -> None:
        """End all runs."""
        await asyncio.gather(*(run.complete() for run in self.runs if not run.has_ended))


async def keep_publishing(
    runs: Sequence[LoadRun],
    per_second: float,
    until: Callable[[], bool],
    *,
    seed: int = 0,
    lifecycle_share: float = 0.2,
    padding: int = 0,
) -> int:
    """Publish to the runs in turn at a total rate: text mostly, thoughts and tool calls between.

    Returns:
        How many steps were taken.

    Raises:
        PublishRefused: Redis takes no more events of a run.
    """
    chooser = random.Random(seed)
    began_s, steps = time.monotonic(), 0
    while not until():
        due = int((time.monotonic() - began_s) * per_second)
        # After a pause of Redis the agents do not make up for all that they did not say.
        if due - steps > per_second:
            began_s = time.monotonic() - steps / per_second
            due = steps + 1
        while steps < due:
            run = runs[steps % len(runs)]
            steps += 1
            chance = chooser.random()
            if chance < lifecycle_share / 2:
                await run.think()
            elif chance < lifecycle_share * 0.75:
                await run.call_tool()
            else:
                await run.delta(padding=padding)
        await asyncio.sleep(0.005)
    return steps
