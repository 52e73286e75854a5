"""Which of a user's keys holds something else than the relay's data, and what to do about it.

Redis says that a type is wrong, but not where. Each key is asked by a command that only its own
type answers; the roles in ``deploy/acl`` have these commands anyway, and have no ``TYPE``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_WRONG_TYPE = "WRONGTYPE"

_KINDS = {
    "channel": "hash",
    "threads": "hash",
    "connections": "hash",
    "run": "hash",
    "body": "hash",
    "upload": "hash",
    "log": "stream",
    "texts": "sorted set",
    "runs": "sorted set",
    "text": "string",
}
"""By what follows the hash tag. ``live`` is the name of a pub/sub channel, and no key."""

_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hash": ("HLEN", ()),
    "stream": ("XLEN", ()),
    "sorted set": ("ZRANGE", ("0", "0")),
    "string": ("STRLEN", ()),
}

MOST_MEMBERS = 1_000
"""So many runs or texts of a user are asked after, at most."""


class Probe(NamedTuple):
    """A question that a key answers with an error unless it is of its kind."""

    key: str
    kind: str
    command: tuple[str, ...]


def is_wrong_type(text: str) -> bool:
    """Say whether an answer complains about what a key holds. Before 7.0 the word is within."""
    return _WRONG_TYPE in text


def probe(key: str) -> Probe | None:
    """Give what to ask after a key; None where it is none of a user's."""
    name = key.rpartition("}:")[2].partition(":")[0]
    kind = _KINDS.get(name)
    if kind is None:
        return None
    command, options = _COMMANDS[kind]
    return Probe(key, kind, (command, key, *options))


def probes(keys: Iterable[str]) -> list[Probe]:
    """Give what to ask after these keys, without those that cannot be asked."""
    return [one for one in map(probe, keys) if one is not None]


def list_members(keys: Iterable[str]) -> list[tuple[str, ...]]:
    """Give the commands that list the runs and texts of the user whose keys these are."""
    sets = [one.key for one in probes(keys) if one.kind == "sorted set"]
    return [("ZRANGE", key, "0", str(MOST_MEMBERS - 1)) for key in sets]


def member_keys(set_key: str, members: Iterable[bytes]) -> list[str]:
    """Give the keys that stand behind what a user's set of runs or of texts lists."""
    base, _, name = set_key.rpartition("}:")
    texts = [member.decode(errors="replace") for member in members]
    if name == "runs":
        return [f"{base}}}:run:{text}" for text in texts]
    runs = {text.partition(":")[0]: None for text in texts}
    return [f"{base}}}:text:{text}" for text in texts] + [f"{base}}}:run:{run}" for run in runs]


def explain(found: Probe) -> str:
    """Say what is wrong with a key, and what to do about it."""
    return (
        f"the key {found.key} holds no {found.kind}, which is what the relay keeps there: "
        "something else has written it. Find out what does, then rename or delete the key; the "
        "relay begins anew without what it had there."
    )


def explain_unknown(keys: Iterable[str]) -> str:
    """Say the same where none of the keys that can be asked is the one."""
    bases = {f"{key.rpartition('}:')[0]}}}:*" for key in keys if "}:" in key}
    where = " or ".join(sorted(bases)) or "of the relay"
    return (
        f"a key {where} holds another type than the relay keeps there: something else has written "
        "it. Compare the types with the table of keys in docs/operations.md, then rename or delete "
        "that key."
    )
