"""Tokens that are no longer worth anything although they have not expired.

Redis keeps them as entries of one stream, each until the token would have expired by itself. Every
gateway holds all of them in memory, so that a request is checked without a trip to Redis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from relay.errors import DecodingFailed
from relay.keys import Keys
from relay.scripts import RedisLink, mapped_errors
from relay.tokens import LATEST_EXPIRY_S, LEEWAY_S, Identity

KEPT_WITHOUT_EXPIRY_MS = 366 * 86_400_000
"""A revocation whose token's expiry nobody told; no token of ``relay token`` lives longer."""

CLOCK_MARGIN_MS = 60_000
"""An entry is removed this long after its end: another gateway's clock may be behind."""

_PAGE = 1_000
_KINDS: Mapping[bytes, Literal["token", "user"]] = {b"token": "token", b"user": "user"}

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Revocation:
    """One token, or all tokens of a user that were issued up to a moment.

    Attributes:
        kind: Which of the two.
        subject: The token's ``jti``, or the user id.
        at_ms: When it was made; a user's tokens that were issued later are good.
        until_ms: When the last token concerned has expired, so that it can be forgotten.
    """

    kind: Literal["token", "user"]
    subject: str
    at_ms: int
    until_ms: int

    def covers(self, other: Revocation) -> bool:
        """Whether nothing is lost by forgetting ``other``."""
        return (
            (self.kind, self.subject) == (other.kind, other.subject)
            and self.until_ms >= other.until_ms
            and (self.kind == "token" or self.at_ms >= other.at_ms)
        )


def revocation_of(
    kind: Literal["token", "user"], subject: str, now_ms: int, expires_s: float | None = None
) -> Revocation:
    """Make a revocation.

    Args:
        kind: A token or a user.
        subject: The ``jti`` or the user id.
        now_ms: The wall clock.
        expires_s: The token's ``exp``, or the latest of the user's tokens, where it is known.
    """
    if expires_s is None:
        return Revocation(kind, subject, now_ms, now_ms + KEPT_WITHOUT_EXPIRY_MS)
    # A token is accepted for the leeway after its expiry. However short the rest: all gateways
    # get the time to read it.
    until_ms = max(int((expires_s + LEEWAY_S) * 1000), now_ms + CLOCK_MARGIN_MS)
    return Revocation(kind, subject, now_ms, min(until_ms, LATEST_EXPIRY_S * 1000))


class RevokedTokens:
    """All revocations that are known. Pure; a look-up costs the same however many there are."""

    def __init__(self, revocations: Iterable[Revocation] = ()) -> None:
        self._tokens: dict[str, Revocation] = {}
        self._users: dict[str, Revocation] = {}
        for revocation in revocations:
            self.add(revocation)

    def __len__(self) -> int:
        return len(self._tokens) + len(self._users)

    def __iter__(self) -> Iterator[Revocation]:
        yield from self._tokens.values()
        yield from self._users.values()

    def add(self, revocation: Revocation) -> None:
        """Take one in; of several for the same subject the widest counts."""
        held = self._tokens if revocation.kind == "token" else self._users
        known = held.get(revocation.subject)
        if known is not None:
            revocation = Revocation(
                known.kind,
                known.subject,
                max(known.at_ms, revocation.at_ms),
                max(known.until_ms, revocation.until_ms),
            )
        held[revocation.subject] = revocation

    def get(self, revocation: Revocation) -> Revocation | None:
        """Give what is known about the same subject."""
        held = self._tokens if revocation.kind == "token" else self._users
        return held.get(revocation.subject)

    def includes(self, identity: Identity) -> bool:
        """Tell whether the token behind an identity was revoked.

        A token that does not say when it was issued counts as issued before its user's tokens
        were revoked: nobody can show otherwise.
        """
        if identity.jti is not None and identity.jti in self._tokens:
            return True
        user = self._users.get(identity.user_id)
        if user is None:
            return False
        return identity.issued_at_ms is None or identity.issued_at_ms <= user.at_ms


class RevocationLog:
    """The stream of revocations in Redis; its channel says that there is something new."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self.channel = keys.revocations
        self._link = link
        self._key = keys.revocations

    async def add(self, *revocations: Revocation) -> None:
        """Revoke; every gateway that is in contact with Redis knows within a second.

        Raises:
            RedisUnavailable: It may not have been kept; revoke again.
        """
        with mapped_errors(self._link.url):
            for first in range(0, len(revocations), _PAGE):
                async with self._link.client.pipeline(transaction=False) as pipe:
                    for revocation in revocations[first : first + _PAGE]:
                        pipe.xadd(self._key, _encode(revocation))
                    # Only after they can be read. A gateway that misses this looks by itself soon.
                    pipe.publish(self.channel, b"")
                    await pipe.execute()

    async def read(self, after: str) -> tuple[dict[str, Revocation | None], int]:
        """Read what came after an entry, and how many entries there are.

        Args:
            after: An entry's id, or ``-`` for all.

        Returns:
            Entries by id, None for one that cannot be understood; and the stream's length.

        Raises:
            RedisUnavailable: Redis did not answer.
        """
        found: dict[str, Revocation | None] = {}
        start = after if after == "-" else f"({after}"
        while True:
            with mapped_errors(self._link.url):
                async with self._link.client.pipeline(transaction=False) as pipe:
                    pipe.xrange(self._key, min=start, count=_PAGE)
                    pipe.xlen(self._key)
                    entries, length = await pipe.execute()
            for entry_id, fields in entries:
                found[entry_id.decode()] = _understood(entry_id.decode(), fields)
            if len(entries) < _PAGE:
                return found, length
            start = f"({entries[-1][0].decode()}"

    async def remove(self, entry_ids: Iterable[str]) -> None:
        """Forget entries.

        Raises:
            RedisUnavailable: They may still be there.
        """
        ids = list(entry_ids)
        with mapped_errors(self._link.url):
            for first in range(0, len(ids), _PAGE):
                await self._link.client.xdel(self._key, *ids[first : first + _PAGE])


def _encode(revocation: Revocation) -> dict[Any, Any]:
    return {
        "kind": revocation.kind,
        "subject": revocation.subject,
        "at_ms": revocation.at_ms,
        "until_ms": revocation.until_ms,
    }


def _understood(entry_id: str, fields: Mapping[bytes, bytes]) -> Revocation | None:
    try:
        return _decode(fields)
    except DecodingFailed as error:
        # A newer gateway's kind, perhaps: it must not keep us from the entries behind it.
        log.error("revocation not understood", entry_id=entry_id, error=str(error))
        return None


def _decode(fields: Mapping[bytes, bytes]) -> Revocation:
    try:
        return Revocation(
            _KINDS[fields[b"kind"]],
            fields[b"subject"].decode(),
            int(fields[b"at_ms"]),
            int(fields[b"until_ms"]),
        )
    except (KeyError, ValueError) as error:
        raise DecodingFailed(f"not a revocation: {error!r}") from error
