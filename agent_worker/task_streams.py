"""The task streams of a worker's agents: taking and settling.

A task is a hint that a run waits; the run's own hash is the truth. So a task that is read twice
does no harm, and one that is lost is found again by whoever checks the hashes. What must not
happen is that a worker takes tasks that it has no room for: they would wait beside an idle worker.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from relay.errors import RelayError
from relay.keys import Keys
from relay.scripts import RedisLink, ScriptFailed, mapped_errors
from relay.tasks import GROUP, TASK_FIELD

BLOCK_MS = 1_000
"""How long one blocking read waits; a dead connection is noticed that much later, plus a margin."""

READ_TIMEOUT_S = BLOCK_MS / 1000 + 2.0


EntryKey = tuple[str, bytes]


class TaskEntry(NamedTuple):
    """One entry of a task stream.

    Attributes:
        agent: The agent whose stream it was read from.
        entry_id: Its id there.
        fields: Its fields, None where the entry was deleted while it was pending.
    """

    agent: str
    entry_id: bytes
    fields: dict[bytes, bytes] | None

    @property
    def key(self) -> EntryKey:
        """What tells this entry from all others of a worker."""
        return self.agent, self.entry_id

    @property
    def payload(self) -> bytes | None:
        """The task's bytes, None where the entry has no such field."""
        return (self.fields or {}).get(TASK_FIELD.encode())

    @property
    def raw(self) -> bytes:
        """What the entry holds, for a dead letter: the task's bytes, else all fields."""
        payload = self.payload
        if payload is not None:
            return payload
        return b" ".join(b"%s=%s" % pair for pair in (self.fields or {}).items())


class GroupMissing(RelayError):
    """A stream or its consumer group is gone: somebody emptied Redis. ``prepare`` makes it anew."""


class TaskStreams:
    """The consumer group's side of the task streams.

    Reading has a connection of its own, because it blocks, and never repeats a command by
    itself: a reply that was lost may have carried tasks, which ``prepare`` then finds.

    Every method raises ``RedisUnavailable`` or ``RedisMisconfigured`` where Redis does not answer
    or refuses.
    """

    def __init__(self, link: RedisLink, keys: Keys, agents: Sequence[str], consumer: str) -> None:
        self._url = link.url
        self._shared = link.client
        self._keys = keys
        self._agents = list(agents)
        self._consumer = consumer
        self._agent_of = {keys.tasks(agent).encode(): agent for agent in agents}
        # One connection of its own: nothing else could use it while a read waits.
        self._own = RedisLink(link.url, max_connections=1, timeout_s=READ_TIMEOUT_S)
        self._reader = self._own.client
        self._reader_id = 0

    async def prepare(self, in_hand: Collection[EntryKey]) -> list[TaskEntry]:
        """Make the groups, and give the tasks that this consumer was sent but never received.

        Args:
            in_hand: Keys of the entries that the caller is working on.
        """
        with mapped_errors(self._url):
            for agent in self._agents:
                await self._make_group(self._keys.tasks(agent))
            self._reader_id = await self._reader.client_id()
            reply = await self._reader.xreadgroup(
                GROUP, self._consumer, {self._keys.tasks(agent): "0" for agent in self._agents}
            )
        return [entry for entry in self._entries(reply) if entry.key not in in_hand]

    async def _make_group(self, stream: str) -> None:
        try:
            await self._reader.xgroup_create(stream, GROUP, "0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def take(self, room: int) -> list[TaskEntry]:
        """Wait for tasks, for a second at most, and give at most ``room`` of them.

        Raises:
            GroupMissing: Call ``prepare`` again.
        """
        try:
            with mapped_errors(self._url):
                return await self._take(room)
        except ScriptFailed as error:
            # UNBLOCKED: the stream was deleted while the read was waiting on it.
            if str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise GroupMissing(str(error)) from error
            raise

    async def _take(self, room: int) -> list[TaskEntry]:
        count = len(self._agents)
        if room < count:
            # COUNT holds for each stream. With less room than streams, ask one after the other …
            taken = await self._take_one_by_one(room)
            if taken:
                return taken
        reply = await self._reader.xreadgroup(
            GROUP,
            self._consumer,
            {self._keys.tasks(agent): ">" for agent in self._agents},
            count=max(1, room // count),
            block=BLOCK_MS,
        )
        entries = self._entries(reply)
        # … and then wait on all. What came in on several at the same moment goes back.
        for entry in entries[room:]:
            await self._give_back(entry)
        return entries[:room]

    async def _take_one_by_one(self, room: int) -> list[TaskEntry]:
        taken: list[TaskEntry] = []
        # Rotated, so that a busy agent cannot starve the others.
        self._agents.append(self._agents.pop(0))
        for agent in self._agents:
            reply = await self._reader.xreadgroup(
                GROUP, self._consumer, {self._keys.tasks(agent): ">"}, count=room - len(taken)
            )
            taken += self._entries(reply)
            if len(taken) == room:
                break
        return taken

    def _entries(self, reply: Any) -> list[TaskEntry]:
        return [
            TaskEntry(self._agent_of[stream], entry_id, fields)
            for stream, entries in reply or ()
            for entry_id, fields in entries
        ]

    async def _give_back(self, entry: TaskEntry) -> None:
        key = self._keys.tasks(entry.agent)
        async with self._reader.pipeline(transaction=True) as pipe:
            if entry.fields:
                pipe.xadd(key, dict(entry.fields))  # type: ignore[arg-type]
            pipe.xack(key, GROUP, entry.entry_id)
            pipe.xdel(key, entry.entry_id)
            await pipe.execute()

    async def settle(self, entry: TaskEntry) -> None:
        """Remove a task that is done with. Doing it twice changes nothing."""
        key = self._keys.tasks(entry.agent)
        with mapped_errors(self._url):
            async with self._shared.pipeline(transaction=True) as pipe:
                pipe.xack(key, GROUP, entry.entry_id)
                pipe.xdel(key, entry.entry_id)
                await pipe.execute()

    async def wake(self) -> None:
        """End a blocking read now; it gives what it has, so that nothing is lost on the way."""
        with mapped_errors(self._url):
            await self._shared.client_unblock(self._reader_id)

    async def leave(self) -> None:
        """Take this consumer out of the groups in which it holds nothing any more."""
        with mapped_errors(self._url):
            for agent in self._agents:
                key = self._keys.tasks(agent)
                pending = await self._shared.xpending_range(
                    key, GROUP, min="-", max="+", count=1, consumername=self._consumer
                )
                # Deleting a consumer drops what it still holds, for whoever could claim it later.
                if not pending:
                    await self._shared.xgroup_delconsumer(key, GROUP, self._consumer)

    async def aclose(self) -> None:
        """Close the reading connection."""
        await self._own.aclose()
