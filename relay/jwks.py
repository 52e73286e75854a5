"""Keys that tokens are verified with, and the key set that an identity provider publishes.

A key knows the algorithms it may be used with; what a token's header claims decides nothing
but which key is looked for. So neither ``alg: none`` nor a token that is signed with a public
key as if it were a shared secret can pass (RFC 8725 sections 2.1 and 3.1).
"""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

import jwt
import orjson
from jwt.algorithms import HMACAlgorithm

from relay.errors import ConfigurationError, RelayError, RequestRefused

FETCH_TIMEOUT_S = 5.0
MAX_KEY_SET_BYTES = 1_048_576
MAX_KEYS = 100

REFRESH_AFTER_S = 300.0
"""A key set older than this is read again before it says that a token is valid."""

REFRESH_WAIT_S = 2.0
"""An issuer that takes longer than this to answer is away: the keys at hand serve."""

UNUSABLE_AFTER_S = 3_600.0
"""An issuer that is away this long no longer vouches for the keys that we hold."""

UNKNOWN_KEY_INTERVAL_S = 10.0
"""Tokens with made-up key ids cost the issuer at most one request in this time."""

_SECRET_ALGORITHMS = (("HS256", 32), ("HS384", 48), ("HS512", 64))
_CURVE_ALGORITHMS = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
_RSA_ALGORITHMS = ("RS256", "RS384", "RS512")
_MIN_RSA_BITS = 2048

SHARED_SECRET_ALGORITHMS = frozenset(name for name, _ in _SECRET_ALGORITHMS)
PUBLIC_KEY_ALGORITHMS = frozenset((*_RSA_ALGORITHMS, *_CURVE_ALGORITHMS.values(), "EdDSA"))


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key and the only algorithms that it may verify."""

    key: Any = field(repr=False)
    algorithms: tuple[str, ...]
    key_id: str | None = None


class KeySetUnreadable(RelayError):
    """The issuer's key set could not be fetched or is not one."""


def key_of_secret(secret: str) -> VerificationKey:
    """Make the key of a shared secret.

    Raises:
        ConfigurationError: It is shorter than 32 bytes, or is a public key or certificate.
    """
    raw = secret.encode()
    # RFC 7518 section 3.2: the key is at least as long as the hash.
    algorithms = tuple(name for name, least in _SECRET_ALGORITHMS if len(raw) >= least)
    if not algorithms:
        raise ConfigurationError(
            f"RELAY_JWT_SECRET holds a secret of {len(raw)} bytes; each needs at least 32. "
            "Make one with: openssl rand -hex 32"
        )
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(raw)
    except jwt.InvalidKeyError as error:
        raise ConfigurationError(
            "RELAY_JWT_SECRET holds a public key or certificate, which is no secret. Publish it "
            "as a key set and set RELAY_JWT_JWKS_URL instead."
        ) from error
    return VerificationKey(raw, algorithms)


def keys_of_key_set(document: bytes) -> list[VerificationKey]:
    """Read a JSON Web Key Set; keys of kinds that we do not use are left out.

    Raises:
        KeySetUnreadable: It is not a key set, or no key in it can verify a signature.
    """
    try:
        entries = orjson.loads(document)["keys"]
        keys = [key for entry in entries[:MAX_KEYS] if (key := _key_of_jwk(entry))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise KeySetUnreadable(f"not a JSON Web Key Set: {type(error).__name__}") from error
    if not keys:
        raise KeySetUnreadable("the key set has no RSA, EC or Ed25519 key for signatures")
    return keys


def _key_of_jwk(entry: dict[str, Any]) -> VerificationKey | None:
    if entry.get("use", "sig") != "sig":
        return None
    algorithms = _algorithms_of_jwk(entry)
    if not algorithms:
        return None
    try:
        key = jwt.PyJWK(entry, algorithms[0]).key
    except jwt.PyJWTError:
        # One key of a future or broken form must not lock out the users of all others.
        return None
    if getattr(key, "key_size", _MIN_RSA_BITS) < _MIN_RSA_BITS and entry["kty"] == "RSA":
        return None
    key_id = entry.get("kid")
    return VerificationKey(key, algorithms, key_id if isinstance(key_id, str) else None)


def _algorithms_of_jwk(entry: dict[str, Any]) -> tuple[str, ...]:
    """The key's type decides; ``alg`` may only narrow it. Symmetric keys are not public keys."""
    kind, curve = entry.get("kty"), entry.get("crv")
    possible: tuple[str, ...] = ()
    if kind == "RSA":
        possible = _RSA_ALGORITHMS
    elif kind == "EC" and curve in _CURVE_ALGORITHMS:
        possible = (_CURVE_ALGORITHMS[curve],)
    elif kind == "OKP" and curve == "Ed25519":
        possible = ("EdDSA",)
    named = entry.get("alg")
    if named is None:
        return possible
    return (named,) if named in possible else ()


def fetch_key_set(url: str) -> bytes:
    """Read the key set's document. Blocks for at most about ``FETCH_TIMEOUT_S``.

    Raises:
        KeySetUnreadable: No answer in time, an error status, or too large.
    """
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310
    # Without the handlers for file: and ftp:, which a redirect could otherwise lead to.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    try:
        with opener.open(request, timeout=FETCH_TIMEOUT_S) as answer:
            document: bytes = answer.read(MAX_KEY_SET_BYTES + 1)
    except urllib.error.HTTPError as error:
        # It is also the response, and keeps the connection.
        error.close()
        raise KeySetUnreadable(f"{url} answered with status {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise KeySetUnreadable(f"{url} could not be read: {error}") from error
    if len(document) > MAX_KEY_SET_BYTES:
        raise KeySetUnreadable(f"{url} is larger than {MAX_KEY_SET_BYTES} bytes")
    return document


class KeySet:
    """The keys behind one address: cached, read again off the event loop, never in a storm.

    Args:
        url: Where the key set is.
        fetch: Reads the document; runs in a thread.
    """

    def __init__(self, url: str, fetch: Callable[[str], bytes] = fetch_key_set) -> None:
        self._url = url
        self._fetch = fetch
        self._keys: list[VerificationKey] = []
        self._fetched_s: float | None = None
        self._tried_s: float | None = None
        self._reading: asyncio.Task[None] | None = None
        self._error: KeySetUnreadable | None = None

    @property
    def error(self) -> KeySetUnreadable | None:
        """Why the last attempt to read the key set failed, or None."""
        return self._error

    async def find(self, key_id: str | None, now_s: float) -> Sequence[VerificationKey]:
        """Give the keys that may have signed a token with this key id; all if it names none.

        Raises:
            RequestRefused: ``unavailable``: the issuer does not answer, so that nobody can say
                whether the token is valid.
        """
        if self._age_s(now_s) > REFRESH_AFTER_S:
            # A key that was withdrawn long ago must not let in whoever comes first.
            self._read(now_s)
            if self._reading is not None:
                await asyncio.wait([self._reading], timeout=REFRESH_WAIT_S)
        found = self._matching(key_id)
        if self._is_usable(now_s) and found:
            return found
        # Unknown: the issuer may have rotated its keys since we looked.
        self._read(now_s)
        if self._reading is not None:
            await asyncio.shield(self._reading)
        if not self._is_usable(now_s):
            raise RequestRefused(
                "unavailable",
                "The keys that verify tokens cannot be read from their issuer right now.",
                retry_after_ms=int(UNKNOWN_KEY_INTERVAL_S * 1000),
            )
        return self._matching(key_id)

    async def aclose(self) -> None:
        """Wait for the read that may be under way; at most its own timeout."""
        if self._reading is not None:
            await asyncio.wait([self._reading])

    def _age_s(self, now_s: float) -> float:
        return float("inf") if self._fetched_s is None else now_s - self._fetched_s

    def _is_usable(self, now_s: float) -> bool:
        return self._age_s(now_s) < UNUSABLE_AFTER_S

    def _matching(self, key_id: str | None) -> list[VerificationKey]:
        if key_id is None:
            return self._keys
        return [key for key in self._keys if key.key_id in (key_id, None)]

    def _read(self, now_s: float) -> None:
        """Start reading, unless it is under way or was tried a moment ago."""
        if self._reading is not None:
            return
        if self._tried_s is not None and now_s - self._tried_s < UNKNOWN_KEY_INTERVAL_S:
            return
        self._tried_s = now_s
        self._reading = asyncio.create_task(self._reread(now_s), name="read-key-set")
        self._reading.add_done_callback(self._read_done)

    async def _reread(self, now_s: float) -> None:
        try:
            document = await asyncio.to_thread(self._fetch, self._url)
            self._keys = keys_of_key_set(document)
        except KeySetUnreadable as error:
            # The keys at hand go on serving until they are too old; see ``find``.
            self._error = error
        else:
            self._error = None
            self._fetched_s = now_s

    def _read_done(self, _: asyncio.Task[None]) -> None:
        self._reading = None
