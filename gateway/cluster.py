"""What operators ask of all processes together, rather than of this gateway."""

from __future__ import annotations

from typing import Any

from relay.dead_letters import DeadLetters
from relay.errors import RedisUnavailable
from relay.keys import Keys
from relay.queues import list_queues
from relay.runs import RunRegistry
from relay.scripts import RedisLink
from relay.workers import list_workers


class Cluster:
    """The workers, the queues and the dead letters, as Redis has them.

    Attributes:
        dead_letters: Tasks that were given up.
    """

    def __init__(self, link: RedisLink, keys: Keys, registry: RunRegistry) -> None:
        self._link = link
        self._keys = keys
        self.dead_letters = DeadLetters(link, keys, registry)

    async def figures(self) -> dict[str, Any]:
        """Give what works, what waits, and how much was given up; each None without Redis.

        This gateway's own figures are worth most when Redis is away, so they do not depend on it.
        """
        try:
            return {
                "workers": [each.as_json() for each in await list_workers(self._link, self._keys)],
                "queues": [each.as_json() for each in await list_queues(self._link, self._keys)],
                "dead_letters": await self.dead_letters.count(),
            }
        except RedisUnavailable:
            return {"workers": None, "queues": None, "dead_letters": None}
