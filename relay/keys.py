"""Every Redis key name and every time to live, in one place.

All keys of one user share the hash tag ``{user}``, so that each script touches one slot. The
user id is percent-encoded (RFC 3986 section 2.1, UTF-8): neither braces nor colons nor line
breaks survive, so no user id can name another user's key or channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from urllib.parse import quote, unquote

CHANNEL_TTL_MARGIN_MS = 3_600_000
"""The log outlives its channel hash by this much; never the other way round (ADR 0001)."""

TEXT_TTL_AFTER_RUN_MS = 300_000
"""A completed run's texts stay this long: its result carries the whole text from then on."""

JUST_ENDED_MS = 300_000
"""``since=active`` and ``runs[]`` include runs that ended at most this long ago."""

RUN_TTL_AFTER_END_MS = 86_400_000
"""A run and its result can be read this long after its end."""

RUN_TTL_ACTIVE_MS = 7 * 86_400_000
"""Backstop for a run that nobody ends; refreshed with its lease."""

NODE_TTL_MS = 3_000
"""A node or worker is alive while its key is; renewed every second."""

PLACES_TTL_MS = 3_600_000
"""A user's places go this long after one was last taken or held; open ones are held before that."""

WORKER_INDEX_TTL_MS = 3_600_000
"""A worker that was not heard of for this long leaves the index when another one starts."""

UPLOAD_TTL_MS = 600_000
"""A large event that was written but never published goes after this."""

TOUCH_MS = 60_000
"""How often publishing renews the times to live of a channel's keys."""

BODY_PIECE_BYTES = 131_072
"""An event that is stored beside the log lies there in pieces of this size."""

BODY_THRESHOLD_BYTES = 65_536
"""An event above this is stored beside the log; a live message above it becomes a claim."""

LARGE_TEXT_BYTES = 262_144
"""A text with more to read is not given with a page of history: it is read piece by piece."""

WIRE_VERSION: Final = 1
"""Version of live messages and tasks (ADR 0010).

It counts forms that an older reader would misunderstand. What is only added (an element at the end,
another field) leaves it as it is.
"""

SCRIPT_CONSTANTS: dict[str, int] = {
    "BODY_PIECE_BYTES": BODY_PIECE_BYTES,
    "BODY_THRESHOLD_BYTES": BODY_THRESHOLD_BYTES,
    "CHANNEL_TTL_MARGIN_MS": CHANNEL_TTL_MARGIN_MS,
    "JUST_ENDED_MS": JUST_ENDED_MS,
    "LARGE_TEXT_BYTES": LARGE_TEXT_BYTES,
    "PLACES_TTL_MS": PLACES_TTL_MS,
    "RUN_TTL_ACTIVE_MS": RUN_TTL_ACTIVE_MS,
    "RUN_TTL_AFTER_END_MS": RUN_TTL_AFTER_END_MS,
    "TEXT_TTL_AFTER_RUN_MS": TEXT_TTL_AFTER_RUN_MS,
    "TOUCH_MS": TOUCH_MS,
    "WIRE_VERSION": WIRE_VERSION,
}
"""What the scripts know under the same names: nothing of it is written down in Lua."""

MAX_USER_ID_CHARS = 256

_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+")
"""User ids that stand in key names as they are, as most do."""


def encode_user(user_id: str) -> str:
    """Give the user id's form within key names.

    Raises:
        ValueError: The id is empty, longer than 256 characters or not encodable as UTF-8.
    """
    if not user_id or len(user_id) > MAX_USER_ID_CHARS:
        raise ValueError(f"a user id has 1 to {MAX_USER_ID_CHARS} characters, not {len(user_id)}")
    if _PLAIN.fullmatch(user_id):
        return user_id
    try:
        return quote(user_id, safe="")
    except UnicodeEncodeError as error:
        raise ValueError("a user id must be encodable as UTF-8") from error


def decode_user(encoded: str) -> str:
    """Give the user id of its form within key names."""
    return unquote(encoded)


@dataclass(frozen=True)
class UserKeys:
    """The key names of one user."""

    prefix: str
    user_id: str

    @cached_property
    def base(self) -> str:
        """What all of the user's keys start with, hash tag included, colon at the end."""
        return f"{self.prefix}:{{{encode_user(self.user_id)}}}:"

    @cached_property
    def channel(self) -> str:
        """Hash: epoch, offset, floor, tail, instance, previous epochs."""
        return self.base + "channel"

    @cached_property
    def log(self) -> str:
        """Stream of lifecycle events, id ``<offset>-0``."""
        return self.base + "log"

    @cached_property
    def texts(self) -> str:
        """Sorted set: ``run:attempt:message`` by the last offset of that text."""
        return self.base + "texts"

    @cached_property
    def live(self) -> str:
        """Pub/sub channel of publications."""
        return self.base + "live"

    @cached_property
    def runs(self) -> str:
        """Sorted set: active and just-ended runs by their first offset."""
        return self.base + "runs"

    @cached_property
    def threads(self) -> str:
        """Hash: lane → run ids in order, the first one dispatched."""
        return self.base + "threads"

    @cached_property
    def connections(self) -> str:
        """Hash: places taken by the user's connections in the cluster, with node and client."""
        return self.base + "connections"

    def run(self, run_id: str) -> str:
        """Hash: the truth about one run."""
        return f"{self.base}run:{run_id}"

    def body(self, offset: int) -> str:
        """Hash: an event too large for the log; its size, and its pieces by their number from 0."""
        return f"{self.base}body:{offset}"

    def upload(self, fence: str, batch: int, index: int) -> str:
        """Hash: a large event that is about to be published, by its place in its batch."""
        return f"{self.base}upload:{fence}:{batch}:{index}"

    def text(self, run_id: str, attempt: int, message_id: str) -> str:
        """String: a message's text so far."""
        return f"{self.base}text:{run_id}:{attempt}:{message_id}"


@dataclass(frozen=True)
class Keys:
    """The key names under one prefix."""

    prefix: str = "relay"

    def user(self, user_id: str) -> UserKeys:
        """Give one user's keys."""
        return UserKeys(self.prefix, user_id)

    def tasks(self, agent: str) -> str:
        """Stream: work for the workers of one agent, consumer group ``workers``."""
        return f"{self.prefix}:tasks:{agent}"

    @property
    def agents(self) -> str:
        """Hash: agent name → what its workers said about it when they started, as JSON."""
        return f"{self.prefix}:agents"

    @property
    def workers(self) -> str:
        """Sorted set: workers by when they were last heard of; whose key lives is alive."""
        return f"{self.prefix}:workers"

    @property
    def dead_letters(self) -> str:
        """Stream: tasks that no worker can carry out, with the reason."""
        return f"{self.prefix}:dead-letters"

    @property
    def revocations(self) -> str:
        """Stream of revoked tokens, and the channel that says there is something new."""
        return f"{self.prefix}:revocations"

    @property
    def sweep(self) -> str:
        """String: which process looks after the tasks of dead workers at the moment."""
        return f"{self.prefix}:sweep"

    def deadlines(self, shard: int) -> str:
        """Sorted set: what the reaper must look at, by due time in ms."""
        return f"{self.prefix}:deadlines:{shard}"

    def node(self, node_id: str) -> str:
        """String and pub/sub channel: a gateway's liveness and signals."""
        return f"{self.prefix}:node:{node_id}"

    def worker(self, worker_id: str) -> str:
        """String and pub/sub channel: a worker's liveness and signals."""
        return f"{self.prefix}:worker:{worker_id}"

    def ticket(self, ticket_id: str) -> str:
        """String: a one-use ticket for opening a WebSocket."""
        return f"{self.prefix}:ticket:{ticket_id}"
