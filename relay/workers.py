"""Living workers: what they say about themselves, and finding them.

Each worker writes its card to its own key, which lives for three seconds, and its id to one index.
The key is the truth about whether it lives; the index only says which keys to look for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
import structlog

from relay.errors import DecodingFailed
from relay.events import format_timestamp
from relay.keys import Keys
from relay.scripts import RedisLink, mapped_errors

MAX_LISTED_RUNS = 100
"""A card is written every second: it names this many runs, the oldest ones, and counts the rest."""

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunAtWork:
    """A run that a worker carries out.

    Attributes:
        since_ms: When the worker took it (its own clock).
    """

    user_id: str
    run_id: str
    agent: str
    since_ms: int

    def as_json(self) -> dict[str, Any]:
        """Give the item of a worker's ``runs``."""
        return {
            "run_id": self.run_id,
            "user_id": self.user_id,
            "agent": self.agent,
            "since": format_timestamp(self.since_ms),
        }


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """What stays the same about a worker as long as it lives.

    Attributes:
        name: What its author called it.
        agents: The agents whose tasks it takes; none for a bridge, which takes no tasks.
    """

    name: str
    agents: tuple[str, ...]
    host: str
    pid: int
    started_ms: int


def encode_card(card: WorkerCard, runs: Sequence[RunAtWork]) -> bytes:
    """Give the bytes of a worker's key."""
    oldest = sorted(runs, key=lambda run: run.since_ms)[:MAX_LISTED_RUNS]
    return orjson.dumps({**asdict(card), "active": len(runs), "runs": [asdict(r) for r in oldest]})


@dataclass(frozen=True, slots=True)
class LivingWorker:
    """A worker as operators see it.

    Attributes:
        active: How many runs it carries out.
        runs: The oldest hundred of them.
    """

    worker_id: str
    card: WorkerCard
    active: int
    runs: tuple[RunAtWork, ...]

    def as_json(self) -> dict[str, Any]:
        """Give the item of a list of workers."""
        return {
            "worker_id": self.worker_id,
            "name": self.card.name,
            "agents": list(self.card.agents),
            "host": self.card.host,
            "pid": self.card.pid,
            "started_at": format_timestamp(self.card.started_ms),
            "active": self.active,
            "runs": [run.as_json() for run in self.runs],
        }


def decode_worker(worker_id: str, value: bytes) -> LivingWorker:
    """Read a worker's key.

    Raises:
        DecodingFailed: It is not a card of a form that we know.
    """
    try:
        fields = orjson.loads(value)
        return LivingWorker(
            worker_id,
            WorkerCard(
                name=str(fields["name"]),
                agents=tuple(map(str, fields["agents"])),
                host=str(fields["host"]),
                pid=int(fields["pid"]),
                started_ms=int(fields["started_ms"]),
            ),
            active=int(fields["active"]),
            runs=tuple(RunAtWork(**run) for run in fields["runs"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DecodingFailed(f"the card of worker {worker_id} cannot be read: {error!r}") from error


async def list_workers(link: RedisLink, keys: Keys) -> list[LivingWorker]:
    """List the workers that live, by name and start.

    Costs one read of the index and one ``GET`` for each worker of the last hour. Ids of workers
    that are gone for longer are taken out of the index by the workers that start.

    Raises:
        RedisUnavailable: Redis did not answer.
    """
    with mapped_errors(link.url):
        members: Any = await link.client.zrange(keys.workers, 0, -1)
        ids = [member.decode() for member in members]
        # One GET each, not MGET: the keys are in different slots of a cluster.
        async with link.client.pipeline(transaction=False) as pipe:
            for worker_id in ids:
                pipe.get(keys.worker(worker_id))
            values = await pipe.execute()
    living = []
    for worker_id, value in zip(ids, values, strict=True):
        if value is None:
            continue
        try:
            living.append(decode_worker(worker_id, value))
        except DecodingFailed as error:
            # One worker of another version must not hide all others.
            log.warning("worker not understood", worker_id=worker_id, error=str(error))
    return sorted(living, key=lambda worker: (worker.card.name, worker.card.started_ms))
