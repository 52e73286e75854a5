"""How much work waits for each agent's workers, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from relay.keys import Keys
from relay.scripts import RedisLink, mapped_errors
from relay.tasks import GROUP


@dataclass(frozen=True, slots=True)
class Waiting:
    """Some tasks of a queue.

    Attributes:
        count: How many.
        oldest_age_ms: Since when the oldest of them is in the queue; None where there is none.
    """

    count: int
    oldest_age_ms: int | None

    def as_json(self) -> dict[str, int | None]:
        """Give the object of a queue's ``waiting`` and ``in_hand``."""
        return {"count": self.count, "oldest_age_ms": self.oldest_age_ms}


@dataclass(frozen=True, slots=True)
class AgentQueue:
    """The tasks of one agent.

    Attributes:
        waiting: No worker has taken them yet.
        in_hand: A worker has, and is not done with them.
    """

    agent: str
    waiting: Waiting
    in_hand: Waiting

    def as_json(self) -> dict[str, Any]:
        """Give the item of a list of queues."""
        return {
            "agent": self.agent,
            "waiting": self.waiting.as_json(),
            "in_hand": self.in_hand.as_json(),
        }


async def list_queues(link: RedisLink, keys: Keys) -> list[AgentQueue]:
    """Give the queue of each agent that a worker has ever registered, by agent.

    A run that waits for an earlier one of its thread is in no queue yet.

    Raises:
        RedisUnavailable: Redis did not answer.
    """
    with mapped_errors(link.url):
        names: list[Any] = await link.client.hkeys(keys.agents)
        agents = sorted(name.decode() for name in names)
        seconds, microseconds = await link.client.time()
        sizes = await _read_sizes(link, keys, agents)
        return await _read_ages(link, keys, sizes, seconds * 1000 + microseconds // 1000)


@dataclass(frozen=True, slots=True)
class _Size:
    agent: str
    in_stream: int
    pending: int
    last_delivered: str

    @property
    def waiting(self) -> int:
        # What is settled is deleted, so the stream holds what waits and what is in hand. Both
        # are read at different moments: a task that was settled in between counts in neither.
        return max(0, self.in_stream - self.pending)


async def _read_sizes(link: RedisLink, keys: Keys, agents: Sequence[str]) -> list[_Size]:
    async with link.client.pipeline(transaction=False) as pipe:
        for agent in agents:
            pipe.xinfo_groups(keys.tasks(agent))
            pipe.xlen(keys.tasks(agent))
        replies = await pipe.execute(raise_on_error=False)
    sizes = []
    for agent, groups, in_stream in zip(agents, replies[::2], replies[1::2], strict=True):
        if isinstance(groups, ResponseError):
            # There is no stream: nobody has asked this agent, or Redis was emptied.
            sizes.append(_Size(agent, 0, 0, "0-0"))
            continue
        for reply in (groups, in_stream):
            if isinstance(reply, Exception):
                raise reply
        group = next((each for each in groups if each["name"] == GROUP.encode()), None)
        sizes.append(
            _Size(agent, in_stream, group["pending"], group["last-delivered-id"].decode())
            if group
            else _Size(agent, in_stream, 0, "0-0")
        )
    return sizes


async def _read_ages(
    link: RedisLink, keys: Keys, sizes: Sequence[_Size], now_ms: int
) -> list[AgentQueue]:
    async with link.client.pipeline(transaction=False) as pipe:
        for size in sizes:
            stream = keys.tasks(size.agent)
            pipe.xrange(stream, min=f"({size.last_delivered}", count=1)
            pipe.xrange(stream, max=size.last_delivered, count=1)
        replies = await pipe.execute()
    return [
        AgentQueue(
            size.agent,
            waiting_of(size.waiting, first_waiting, now_ms),
            waiting_of(size.pending, first_in_hand, now_ms),
        )
        for size, first_waiting, first_in_hand in zip(
            sizes, replies[::2], replies[1::2], strict=True
        )
    ]


def waiting_of(count: int, first: Sequence[tuple[bytes, object]], now_ms: int) -> Waiting:
    """Put together what was counted and the first entry, which may have gone in between."""
    if not count or not first:
        return Waiting(count, None)
    # Redis makes the ids of the entries from its own clock, which now_ms is from as well.
    entered_ms = int(first[0][0].partition(b"-")[0])
    return Waiting(count, max(0, now_ms - entered_ms))
