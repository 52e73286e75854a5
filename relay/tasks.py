"""The task streams: hints to workers that a run waits for them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from relay.codec import Task, encode_task
from relay.keys import Keys
from relay.scripts import RedisLink, ScriptFailed, mapped_errors

GROUP = "workers"
TASK_FIELD = "task"
FIRST_FIELD = "first"
"""Id of the entry in which a task came first, once it was left for newer workers."""

MAX_DEAD_LETTERS = 10_000


async def dispatch(link: RedisLink, keys: Keys, task: Task) -> None:
    """Tell the agent's workers that a run waits.

    Saying it twice is harmless: the claim lets one worker win. The stream is only ever a hint;
    the run's hash is the truth.

    Raises:
        RedisUnavailable: Whether the hint arrived is unknown.
    """
    with mapped_errors(link.url):
        await link.client.xadd(keys.tasks(task.agent), {TASK_FIELD: encode_task(task)})


async def pass_on(
    link: RedisLink,
    keys: Keys,
    agent: str,
    entry_id: bytes,
    fields: Mapping[bytes, bytes],
) -> None:
    """Put a task of a newer version back into its stream, as it is, for a newer worker to take.

    Doing it twice is harmless, as for ``dispatch``.

    Raises:
        RedisUnavailable: Whether it was done is unknown.
    """
    stream = keys.tasks(agent)
    first = fields.get(FIRST_FIELD.encode(), entry_id)
    with mapped_errors(link.url):
        async with link.client.pipeline(transaction=True) as pipe:
            pipe.xadd(stream, {**fields, FIRST_FIELD.encode(): first})  # type: ignore[dict-item]
            pipe.xack(stream, GROUP, entry_id)
            pipe.xdel(stream, entry_id)
            await pipe.execute()


def age_ms(entry_id: bytes, fields: Mapping[bytes, bytes]) -> int:
    """Give for how long a task has been left for newer workers, by the clock of Redis."""
    first = fields.get(FIRST_FIELD.encode(), entry_id)
    try:
        return max(0, _entry_order(entry_id)[0] - _entry_order(first)[0])
    except ValueError:
        # Not an id: whoever wrote it does not say since when.
        return 0


async def has_waiting_tasks(link: RedisLink, keys: Keys, agent: str) -> bool:
    """Tell whether an agent's stream holds tasks that no worker has taken yet."""
    stream = keys.tasks(agent)
    try:
        with mapped_errors(link.url):
            groups = await link.client.xinfo_groups(stream)
            newest: Any = await link.client.xrevrange(stream, count=1)
    except ScriptFailed as error:
        if "no such key" in str(error):
            return False
        raise
    delivered = next(
        (group["last-delivered-id"] for group in groups if group["name"] == GROUP.encode()), b"0-0"
    )
    return bool(newest) and _entry_order(newest[0][0]) > _entry_order(delivered)


def _entry_order(entry_id: bytes) -> tuple[int, int]:
    time_ms, _, count = entry_id.partition(b"-")
    return int(time_ms), int(count or 0)


async def bury(
    link: RedisLink, keys: Keys, agent: str, task: bytes, reason: str, *, entry_id: bytes = b""
) -> None:
    """Put a task that cannot be carried out to the dead letters; the oldest of ten thousand go.

    Args:
        link: Redis.
        keys: Key names.
        agent: Whose stream it came from.
        task: Its bytes, as they are.
        reason: Why, for the operator.
        entry_id: Its id in that stream, where it has one.

    Raises:
        RedisUnavailable: Whether it arrived is unknown; at worst it is found twice.
    """
    with mapped_errors(link.url):
        await link.client.xadd(
            keys.dead_letters,
            {
                "reason": reason,
                "agent": agent,
                "entry_id": entry_id,
                "task": task,
                "at_ms": time.time_ns() // 1_000_000,
            },
            maxlen=MAX_DEAD_LETTERS,
            approximate=True,
        )
