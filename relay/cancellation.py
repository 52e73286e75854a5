"""Ending tasks for certain.

On Python 3.11 ``asyncio.wait_for`` drops a cancellation that comes in the moment in which what it
waits for is done (fixed in 3.12, https://github.com/python/cpython/issues/86296). Where a library
or an agent uses it, a loop that is cancelled once may go on for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 0.25
"""How long a task may take for its clean-up before it is cancelled again."""


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until all of them have ended. What they raise is not raised here."""
    ending = set(tasks)
    pending = ending
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
    for task in ending:
        if not task.cancelled():
            # Read, or the loop would report it as lost.
            task.exception()
