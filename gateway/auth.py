"""Who is connecting, and from where: credentials, tickets and origins.

Browsers cannot set headers on a WebSocket. So a token may come as a subprotocol entry, which is
a header too and is logged by nobody; or a ticket comes in the URL, which is worth nothing once
it has been used. A token in a URL would stay in logs and histories, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from gateway.doorkeeper import Doorkeeper
from gateway.tickets import TicketOffice
from relay.errors import RequestRefused, TokenRejected
from relay.tokens import Identity, TokenVerifier, looks_like_token

SUBPROTOCOL = "relay.v1"
BEARER_SUBPROTOCOL = "bearer."
ADMIN_SCOPE = "relay:admin"

_TOKEN_PARAMETERS = ("token", "access_token", "jwt", "authorization")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, slots=True)
class Credential:
    """What a client showed; not verified yet."""

    kind: Literal["token", "ticket"]
    # Not in repr: whatever prints this object must not print the secret.
    value: str

    def __repr__(self) -> str:
        return f"Credential(kind={self.kind!r})"


def find_credential(
    headers: Mapping[str, str],
    query: Mapping[str, str],
    subprotocols: Sequence[str] = (),
    *,
    allow_ticket: bool = False,
) -> Credential:
    """Find the credential that a request shows.

    Raises:
        RequestRefused: ``invalid_token``: there is none, or a token is in the URL.
    """
    if any(name.lower() in _TOKEN_PARAMETERS for name in query) or looks_like_token(
        query.get("ticket", "")
    ):
        raise RequestRefused(
            "invalid_token",
            "A token in the URL is refused: URLs are kept in logs and histories.",
            suggestions=(
                "Send the token as the header Authorization: Bearer.",
                "In a browser, offer the subprotocols relay.v1 and bearer.<token>.",
                "Or get a ticket with POST /v1/tickets, and send it as ?ticket=.",
            ),
        )
    header = headers.get("authorization")
    if header is not None:
        scheme, _, value = header.partition(" ")
        if scheme.lower() != "bearer" or not value.strip():
            raise RequestRefused(
                "invalid_token", "The Authorization header is not: Bearer <token>."
            )
        return Credential("token", value.strip())
    for entry in subprotocols:
        if entry.startswith(BEARER_SUBPROTOCOL):
            return Credential("token", entry.removeprefix(BEARER_SUBPROTOCOL))
    if allow_ticket and "ticket" in query:
        return Credential("ticket", query["ticket"])
    raise RequestRefused(
        "invalid_token",
        "The request shows no token.",
        suggestions=("Send a token as the header Authorization: Bearer.",),
    )


def is_origin_allowed(origin: str | None, host: str | None, allowed: Collection[str]) -> bool:
    """Tell whether a page of this origin may connect.

    Requests without ``Origin`` do not come from a page. Otherwise the origin is the gateway's
    own, as named by the Host header, or one of those allowed. A page that reaches us under a
    name of its own making (DNS rebinding) passes, but holds no token: tokens are not cookies.
    """
    if origin is None:
        return True
    given = origin.lower()
    if given in allowed:
        return True
    try:
        parts = urlsplit(given)
    except ValueError:
        return False
    port = _DEFAULT_PORTS.get(parts.scheme)
    if port is None or not parts.netloc or host is None:
        return False
    if given != f"{parts.scheme}://{parts.netloc}":
        return False  # An origin has no path, no query and no fragment (RFC 6454 section 6.2).
    return parts.netloc.removesuffix(port) == host.lower().removesuffix(port)


class Authenticator:
    """Turns credentials into identities.

    Args:
        verifier: For tokens.
        tickets: For tickets.
        allowed_origins: Origins beside the gateway's own.
        is_revoked: Tells whether the token behind an identity was revoked.
        door: Bounds what those may cost who have shown nothing valid.
        now_s: The wall clock.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        tickets: TicketOffice,
        allowed_origins: Collection[str],
        is_revoked: Callable[[Identity], bool],
        door: Doorkeeper,
        now_s: Callable[[], float],
    ) -> None:
        self._verifier = verifier
        self._tickets = tickets
        self._allowed_origins = frozenset(allowed_origins)
        self._is_revoked = is_revoked
        self._door = door
        self._now_s = now_s

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Hold a request to the allowed origins.

        Raises:
            RequestRefused: ``forbidden``.
        """
        origin = headers.get("origin")
        if not is_origin_allowed(origin, headers.get("host"), self._allowed_origins):
            raise RequestRefused(
                "forbidden",
                f"Pages of the origin {str(origin)[:200]} may not connect to this gateway.",
                suggestions=("Add the origin to RELAY_ALLOWED_ORIGINS.",),
            )

    async def identify_peer(
        self, connection: HTTPConnection, *, allow_ticket: bool = False
    ) -> Identity:
        """Give the identity behind a request or an upgrade: the one way in.

        Raises:
            TokenRejected, RequestRefused, RedisUnavailable: As for ``identify``; also
                ``rate_limited``: its address shows too much that is worth nothing.
        """
        credential = find_credential(
            connection.headers,
            connection.query_params,
            connection.scope.get("subprotocols", ()),
            allow_ticket=allow_ticket,
        )
        peer = connection.client.host if connection.client is not None else None
        address = self._door.address_of(peer, connection.headers.getlist("x-forwarded-for"))
        with self._door.checking(address, is_costly=credential.kind == "ticket"):
            return await self.identify(credential)

    async def identify(self, credential: Credential) -> Identity:
        """Verify a credential.

        Raises:
            TokenRejected: It is a token that proves nothing.
            RequestRefused: ``invalid_token``: a ticket that is not valid (any more);
                ``unavailable``: the issuer's keys cannot be read.
            RedisUnavailable: A ticket cannot be looked up.
        """
        if credential.kind == "token":
            return await self.verify_token(credential.value)
        identity = await self._tickets.redeem(credential.value)
        if identity is None:
            raise RequestRefused(
                "invalid_token",
                "The ticket is not valid: it has been used, or is older than 30 seconds.",
                suggestions=("Get a new ticket with POST /v1/tickets.",),
            )
        self.check_not_revoked(identity)
        return identity

    async def verify_token(self, token: str) -> Identity:
        """Verify a token.

        Raises:
            TokenRejected: It proves nothing, or was revoked.
            RequestRefused: ``unavailable``.
        """
        identity = await self._verifier.verify(token, self._now_s())
        self.check_not_revoked(identity)
        return identity

    def check_not_revoked(self, identity: Identity) -> None:
        """Make sure that the token behind an identity is still good, after time has passed.

        Raises:
            TokenRejected: It was revoked.
        """
        if self._is_revoked(identity):
            raise TokenRejected("The token was revoked.")


def require_scope(identity: Identity, scope: str) -> None:
    """Make sure that an identity may do what needs this scope.

    Raises:
        RequestRefused: ``forbidden``.
    """
    if scope not in identity.scopes:
        raise RequestRefused(
            "forbidden",
            f"This needs a token with the scope {scope}.",
            suggestions=(f"Use a token whose claim scope contains {scope}.",),
        )
