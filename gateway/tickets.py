"""Tickets: what a client shows in a URL instead of its token. One use, half a minute."""

from __future__ import annotations

import re
import secrets

import orjson

from relay.errors import DecodingFailed
from relay.keys import Keys
from relay.scripts import RedisLink, mapped_errors
from relay.tokens import Identity

TICKET_TTL_S = 30

_FORM = re.compile(r"[A-Za-z0-9_-]{43}")
_RANDOM_BYTES = 32


class TicketOffice:
    """Issues tickets and redeems each of them once, on whichever gateway it is shown."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    async def issue(self, identity: Identity) -> str:
        """Make a ticket for an identity that has just been verified.

        Raises:
            RedisUnavailable: It could not be stored.
        """
        ticket = secrets.token_urlsafe(_RANDOM_BYTES)
        holder = orjson.dumps(
            {
                "user_id": identity.user_id,
                "expires_at_ms": identity.expires_at_ms,
                "jti": identity.jti,
                "scopes": sorted(identity.scopes),
                "issuer": identity.issuer,
                "issued_at_ms": identity.issued_at_ms,
            }
        )
        with mapped_errors(self._link.url):
            await self._link.client.set(self._keys.ticket(ticket), holder, ex=TICKET_TTL_S)
        return ticket

    async def redeem(self, ticket: str) -> Identity | None:
        """Give the identity behind a ticket and void it; None if it is not valid (any more).

        Raises:
            RedisUnavailable: It may have been voided all the same; the client gets a new one.
        """
        if not _FORM.fullmatch(ticket):
            return None
        with mapped_errors(self._link.url):
            holder = await self._link.client.getdel(self._keys.ticket(ticket))
        if holder is None:
            return None
        try:
            fields = orjson.loads(holder)
            return Identity(**{**fields, "scopes": frozenset(fields["scopes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise DecodingFailed(f"not a ticket: {type(error).__name__}") from error
