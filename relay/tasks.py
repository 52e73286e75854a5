"""The task streams: hints to workers that a run waits for them."""

from __future__ import annotations

from relay.codec import Task, encode_task
from relay.keys import Keys
from relay.scripts import RedisLink, mapped_errors

GROUP = "workers"
TASK_FIELD = "task"


async def dispatch(link: RedisLink, keys: Keys, task: Task) -> None:
    """Tell the agent's workers that a run waits.

    Saying it twice is harmless: the claim lets one worker win. The stream is only ever a hint;
    the run's hash is the truth.

    Raises:
        RedisUnavailable: Whether the hint arrived is unknown.
    """
    with mapped_errors(link.url):
        await link.client.xadd(keys.tasks(task.agent), {TASK_FIELD: encode_task(task)})
