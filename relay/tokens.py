"""Tokens: who is connecting, verified; and tokens made for tests and the command line.

A token is a signed JWT whose ``sub`` is the user. There is no other way in.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import secrets as random_source
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jwt
import orjson

from relay.errors import ConfigurationError, TokenRejected
from relay.jwks import (
    PUBLIC_KEY_ALGORITHMS,
    SHARED_SECRET_ALGORITHMS,
    KeySet,
    VerificationKey,
    key_of_secret,
)
from relay.keys import encode_user

LEEWAY_S = 30
"""By how much the clocks of issuer and gateway may differ. Fixed, so that nobody widens it."""

MAX_TOKEN_CHARS = 8_000
LATEST_EXPIRY_S = 253_402_300_799
"""End of the year 9999: the last moment that a timestamp can show."""

_FORM = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_MAX_CLAIM_CHARS = 256
_MAX_KNOWN_HEADERS = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token speaks for.

    Attributes:
        user_id: The token's ``sub``; every byte that a connection sees belongs to this user.
        expires_at_ms: The token's ``exp``.
        jti: The token's own id, if it has one.
        scopes: What it permits beyond the user's own runs, from ``scope``.
        issuer: The token's ``iss``, if it has one.
        issued_at_ms: The token's ``iat``, if it has one.
    """

    user_id: str
    expires_at_ms: int
    jti: str | None = None
    scopes: frozenset[str] = frozenset()
    issuer: str | None = None
    issued_at_ms: int | None = None


def looks_like_token(text: str) -> bool:
    """Tell whether a text has the form of a JWT, valid or not."""
    return _FORM.fullmatch(text) is not None


class _Header(NamedTuple):
    """What a token's header says."""

    algorithm: str
    key_id: str | None


class TokenVerifier:
    """Verifies tokens with shared secrets, a published key set, or both.

    Args:
        secrets: Shared secrets; all of them verify, so that they can be rotated.
        key_set: Public keys of an issuer.
        issuer: Required ``iss``; None accepts any.
        audience: Required member of ``aud``; None accepts any.

    Raises:
        ConfigurationError: There is nothing to verify with, a secret is weak, or a key set
            comes without an audience.
    """

    def __init__(
        self,
        secrets: Sequence[str] = (),
        *,
        key_set: KeySet | None = None,
        issuer: str | None = None,
        audience: str | None = None,
    ) -> None:
        if not secrets and key_set is None:
            raise ConfigurationError(
                "Neither RELAY_JWT_SECRET nor RELAY_JWT_JWKS_URL is set, so no token could be "
                "verified. Set one of them."
            )
        if key_set is not None and audience is None:
            raise ConfigurationError(
                "RELAY_JWT_JWKS_URL needs RELAY_JWT_AUDIENCE: without it, tokens that were issued "
                "for other applications would be accepted."
            )
        self._secret_keys = [key_of_secret(secret) for secret in secrets]
        self._key_set = key_set
        self._issuer = issuer
        self._audience = audience
        # An issuer's tokens have one header in common. One that has been read and checked in full,
        # in a token whose signature was valid, need not be read and checked again. Only issuers
        # can add to it.
        self._known_headers: dict[str, _Header] = {}

    async def verify(self, token: str, now_s: float) -> Identity:
        """Give the identity that a token proves.

        Raises:
            TokenRejected: It proves nothing; the text says why and never contains the token.
            RequestRefused: ``unavailable``: the issuer's keys cannot be read.
        """
        _check_form(token)
        header_text = token.partition(".")[0]
        known = self._known_headers.get(header_text)
        header = known or _read_header(token)
        keys = await self._find_keys(header.algorithm, header.key_id, now_s)
        for key in keys:
            if header.algorithm in key.algorithms:
                payload = _signed_payload(key, token, known)
                if payload is not None:
                    if known is None:
                        self._remember(header_text, header)
                    claims = _claims_of(payload)
                    return identity_of(claims, self._issuer, self._audience, now_s)
        raise TokenRejected("The token's signature is not valid: it was signed with another key.")

    async def aclose(self) -> None:
        """Release what a key set may hold."""
        if self._key_set is not None:
            await self._key_set.aclose()

    def _remember(self, header_text: str, header: _Header) -> None:
        if len(self._known_headers) >= _MAX_KNOWN_HEADERS:
            # Keys were rotated for long, or an issuer writes something new into each header.
            self._known_headers.clear()
        self._known_headers[header_text] = header

    async def _find_keys(
        self, algorithm: str, key_id: str | None, now_s: float
    ) -> Sequence[VerificationKey]:
        if algorithm in SHARED_SECRET_ALGORITHMS:
            if not self._secret_keys:
                raise TokenRejected("Tokens signed with a shared secret are not accepted here.")
            return self._secret_keys
        if self._key_set is None:
            raise TokenRejected("Only tokens signed with a shared secret are accepted here.")
        return await self._key_set.find(key_id, now_s)


def _check_form(token: str) -> None:
    if len(token) > MAX_TOKEN_CHARS:
        raise TokenRejected(f"The token is longer than {MAX_TOKEN_CHARS} characters.")
    if not looks_like_token(token):
        raise TokenRejected("This is not a JSON Web Token: three base64url parts with dots.")


def _read_header(token: str) -> _Header:
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        # The library's exceptions may quote what they could not read.
        raise TokenRejected("The token's header cannot be read.") from None
    algorithm = header.get("alg")
    allowed = SHARED_SECRET_ALGORITHMS | PUBLIC_KEY_ALGORITHMS
    if not isinstance(algorithm, str) or algorithm not in allowed:
        raise TokenRejected(
            f"The token's algorithm is not allowed. Allowed: {', '.join(sorted(allowed))}."
        )
    # The library has checked that a key id is text.
    return _Header(algorithm, header.get("kid"))


def _signed_payload(key: VerificationKey, token: str, known: _Header | None) -> bytes | None:
    """Give what a token says, if this key signed it.

    Args:
        key: It may be used with the algorithm of the token's header.
        token: It has a token's form.
        known: Its header, where the library has accepted the same before: what is left to be
            checked is what no other token shares.
    """
    try:
        if known is None:
            payload: bytes = jwt.api_jws.decode(token, key.key, algorithms=list(key.algorithms))
            return payload
        signed, _, signature = token.encode().rpartition(b".")
        payload = _decoded(signed.partition(b".")[2])
        algorithm = jwt.get_algorithm_by_name(known.algorithm)
        # The key needs no preparation: it is of this algorithm, and was checked when it was read.
        return payload if algorithm.verify(signed, key.key, _decoded(signature)) else None
    except jwt.InvalidSignatureError:
        return None
    except (jwt.PyJWTError, ValueError, TypeError):
        raise TokenRejected("The token cannot be read.") from None


def _decoded(segment: bytes) -> bytes:
    """Give the bytes of a base64url text without padding, which has one form only.

    Raises:
        ValueError: It is not of that form (RFC 4648, sections 3.5 and 5).
    """
    decoded = base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != segment:
        raise binascii.Error("not canonical")
    return decoded


def _claims_of(payload: bytes) -> dict[str, Any]:
    try:
        claims = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise TokenRejected("The token's claims are not JSON.") from None
    if not isinstance(claims, dict):
        raise TokenRejected("The token's claims are not a JSON object.")
    return claims


def identity_of(
    claims: dict[str, Any], issuer: str | None, audience: str | None, now_s: float
) -> Identity:
    """Check the claims of a token whose signature is valid (RFC 7519 section 4.1).

    Raises:
        TokenRejected: A claim is missing, of the wrong type, or not what it must be.
    """
    expires_s = _time_claim(claims, "exp")
    if expires_s is None:
        raise TokenRejected("The token has no expiry: the claim exp is required.")
    if now_s >= expires_s + LEEWAY_S:
        raise TokenRejected("The token has expired.")
    not_before_s = _time_claim(claims, "nbf")
    if not_before_s is not None and now_s < not_before_s - LEEWAY_S:
        raise TokenRejected("The token is not valid yet (nbf).")
    issued_s = _time_claim(claims, "iat")
    if issued_s is not None and now_s < issued_s - LEEWAY_S:
        # It would outlive every revocation of its user's tokens until then.
        raise TokenRejected("The token was issued in the future (iat).")
    if issuer is not None and claims.get("iss") != issuer:
        raise TokenRejected("The token comes from another issuer than the one trusted here (iss).")
    if audience is not None and not _has_audience(claims.get("aud"), audience):
        raise TokenRejected("The token was issued for another audience (aud).")
    return Identity(
        user_id=_user_of(claims),
        expires_at_ms=int(expires_s * 1000),
        jti=_text_claim(claims, "jti"),
        scopes=frozenset((_text_claim(claims, "scope") or "").split()),
        issuer=_text_claim(claims, "iss"),
        issued_at_ms=None if issued_s is None else int(issued_s * 1000),
    )


def _time_claim(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= LATEST_EXPIRY_S:
        raise TokenRejected(f"The token's claim {name} is not a time in seconds.")
    return float(value)


def _text_claim(claims: dict[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > 4 * _MAX_CLAIM_CHARS):
        raise TokenRejected(f"The token's claim {name} is not a text of reasonable length.")
    return value


def _has_audience(value: object, audience: str) -> bool:
    return value == audience or (isinstance(value, list) and audience in value)


def _user_of(claims: dict[str, Any]) -> str:
    user_id = claims.get("sub")
    if not isinstance(user_id, str):
        raise TokenRejected("The token names no user: the claim sub is required, as text.")
    try:
        encode_user(user_id)
    except ValueError as error:
        raise TokenRejected(f"The token's claim sub is no user id: {error}.") from error
    return user_id


def mint_token(
    secret: str,
    user_id: str,
    ttl_s: float,
    *,
    issuer: str | None = None,
    audience: str | None = None,
    scopes: Sequence[str] = (),
    now_s: float | None = None,
) -> str:
    """Make a token, signed with HS256, as an application's backend would.

    Args:
        secret: At least 32 bytes.
        user_id: Whom the token speaks for.
        ttl_s: How long it is valid; negative gives one that has expired, for tests.
        issuer: ``iss``.
        audience: ``aud``.
        scopes: Joined to ``scope``.
        now_s: Time of issue; the current time by default.

    Raises:
        ConfigurationError: The secret is too weak.
        ValueError: The user id is not one.
    """
    encode_user(user_id)
    key = key_of_secret(secret)
    issued_s = time.time() if now_s is None else now_s
    claims: dict[str, Any] = {
        "sub": user_id,
        "iat": int(issued_s),
        "exp": issued_s + ttl_s,
        "jti": random_source.token_hex(12),
    }
    if issuer is not None:
        claims["iss"] = issuer
    if audience is not None:
        claims["aud"] = audience
    if scopes:
        claims["scope"] = " ".join(scopes)
    return jwt.encode(claims, key.key, algorithm="HS256")
