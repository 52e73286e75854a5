"""The deadline index: which runs must be looked at, and when.

The index is a hint. It is written before the run's own script (intent first), so that a process
that dies between the two leaves at worst a look at a run that does not exist.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib import resources

from relay.errors import DecodingFailed
from relay.keys import Keys, decode_user, encode_user
from relay.scripts import RedisLink, mapped_errors

SHARDS = 8
RETAKE_MS = 2_000
"""What one reaper took and did not settle comes up again after this; it may have died with it."""


def shard_key(keys: Keys, user_id: str) -> str:
    """Give the shard of the index that a user's runs are in."""
    return keys.deadlines(zlib.crc32(user_id.encode()) % SHARDS)


def member_of(user_id: str, run_id: str) -> str:
    """Give a run's name within the index."""
    return f"{encode_user(user_id)}:{run_id}"


def parse_member(member: bytes) -> tuple[str, str]:
    """Give user id and run id of a member.

    Raises:
        DecodingFailed: It is not one of ours.
    """
    user, colon, run_id = member.decode(errors="replace").partition(":")
    if not (user and colon and run_id):
        raise DecodingFailed(f"{member!r} is not a member of the deadline index")
    return decode_user(user), run_id


class Deadlines:
    """The deadline index of one prefix."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys
        source = (resources.files("relay") / "lua" / "take_due.lua").read_text()
        self._take_due = link.client.register_script(source)

    async def bring_forward(self, user_id: str, run_id: str, at_ms: int) -> None:
        """Have a run looked at no later than this.

        Raises:
            RedisUnavailable: Whether it was noted is unknown.
        """
        with mapped_errors(self._link.url):
            await self._link.client.zadd(
                shard_key(self._keys, user_id), {member_of(user_id, run_id): at_ms}, lt=True
            )

    async def restore(self, runs: Sequence[tuple[str, str]], at_ms: int) -> None:
        """Have runs looked at then, unless the index knows of them already."""
        if not runs:
            return
        with mapped_errors(self._link.url):
            async with self._link.client.pipeline(transaction=False) as pipeline:
                for user_id, run_id in runs:
                    pipeline.zadd(
                        shard_key(self._keys, user_id), {member_of(user_id, run_id): at_ms}, nx=True
                    )
                await pipeline.execute()

    async def set(self, user_id: str, run_id: str, at_ms: int) -> None:
        """Have a run looked at then, and not before."""
        with mapped_errors(self._link.url):
            await self._link.client.zadd(
                shard_key(self._keys, user_id), {member_of(user_id, run_id): at_ms}
            )

    async def drop(self, user_id: str, run_id: str) -> None:
        """Look at a run no more."""
        with mapped_errors(self._link.url):
            await self._link.client.zrem(shard_key(self._keys, user_id), member_of(user_id, run_id))

    async def take(self, shard: int, count: int) -> list[bytes]:
        """Take what is due in a shard; each member goes to one caller at a time."""
        with mapped_errors(self._link.url):
            due: list[bytes] = await self._take_due(
                keys=[self._keys.deadlines(shard)], args=[count, RETAKE_MS]
            )
        return due

    async def discard(self, shard: int, member: bytes) -> None:
        """Remove a member that cannot be understood."""
        with mapped_errors(self._link.url):
            await self._link.client.zrem(self._keys.deadlines(shard), member)
