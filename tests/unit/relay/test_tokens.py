"""Verification of tokens: what proves an identity, and everything that must not."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import jwks
from relay.errors import ConfigurationError, RequestRefused, TokenRejected
from relay.jwks import KeySet, KeySetUnreadable, fetch_key_set, keys_of_key_set
from relay.tokens import LEEWAY_S, TokenVerifier, looks_like_token, mint_token

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "a secret that is long enough: 0123456789"
OTHER = "another secret, long enough: 9876543210 "
NOW = 1_800_000_000
LONG_SECRET = "x" * 64


def encode_part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def sign(
    claims: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", **headers: Any
) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers or None)


def claims(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"sub": "alice", "exp": NOW + 60, **changes}
    return {name: value for name, value in given.items() if value is not None}


async def reason_of(verifier: TokenVerifier, token: str, now_s: float = NOW) -> str:
    with pytest.raises(TokenRejected) as caught:
        await verifier.verify(token, now_s)
    text = str(caught.value)
    assert token not in text or not token
    for part in token.split("."):
        assert len(part) < 8 or part not in text
    return text


@pytest.fixture
def verifier() -> TokenVerifier:
    return TokenVerifier([SECRET])


# --- Shared secrets ---


async def test_minted_token_proves_its_user(verifier: TokenVerifier) -> None:
    token = mint_token(
        SECRET, "alice", 60, issuer="app", audience="relay", scopes=["relay:admin"], now_s=NOW
    )
    identity = await verifier.verify(token, NOW)
    assert identity.user_id == "alice"
    assert identity.expires_at_ms == (NOW + 60) * 1000
    assert identity.scopes == {"relay:admin"}
    assert identity.issuer == "app"
    assert identity.jti


@pytest.mark.parametrize("secret", [SECRET, OTHER])
async def test_every_secret_of_a_rotation_verifies(secret: str) -> None:
    verifier = TokenVerifier([SECRET, OTHER])
    assert (await verifier.verify(mint_token(secret, "a", 60, now_s=NOW), NOW)).user_id == "a"


async def test_wrong_key_is_refused(verifier: TokenVerifier) -> None:
    assert "signature" in await reason_of(verifier, mint_token(OTHER, "alice", 60, now_s=NOW))


async def test_changed_claims_are_refused(verifier: TokenVerifier) -> None:
    head, _, signature = sign(claims()).split(".")
    forged = f"{head}.{encode_part(claims(sub='bob'))}.{signature}"
    assert "signature" in await reason_of(verifier, forged)


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "nOnE", "", "HS1", "PS256", "ES256K", None, 7, []]
)
@pytest.mark.parametrize("signature", ["", "AAAA"])
async def test_unsigned_and_unknown_algorithms_are_refused(
    verifier: TokenVerifier, algorithm: object, signature: str
) -> None:
    token = f"{encode_part({'alg': algorithm, 'typ': 'JWT'})}.{encode_part(claims())}.{signature}"
    assert await reason_of(verifier, token)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "garbage",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "ey J.x.y",
        "ä.ö.ü",
        "\ud800.x.y",
        "." * 10,
        "é" * 10,
    ],
)
async def test_garbage_is_refused(verifier: TokenVerifier, token: str) -> None:
    await reason_of(verifier, token)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_is_a_token_by_chance(text: str) -> None:
    with pytest.raises(TokenRejected):
        asyncio.run(TokenVerifier([SECRET]).verify(text, NOW))


async def test_endless_token_is_refused_unread(verifier: TokenVerifier) -> None:
    assert "longer than" in await reason_of(verifier, "a" * 20_000 + ".b.c")


async def test_deeply_nested_claims_are_refused(verifier: TokenVerifier) -> None:
    payload = base64.urlsafe_b64encode(b"[" * 5_000).rstrip(b"=").decode()
    head = encode_part({"alg": "HS256"})
    signer = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = signer.sign(f"{head}.{payload}".encode(), SECRET.encode())
    signed = f"{head}.{payload}." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    assert "not JSON" in await reason_of(verifier, signed)


def test_weak_secret_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="31 bytes") as caught:
        TokenVerifier(["x" * 31])
    assert "xxx" not in str(caught.value)


def test_public_key_as_secret_is_a_configuration_error() -> None:
    pem = public_pem(rsa.generate_private_key(65537, 2048))
    with pytest.raises(ConfigurationError, match="public key"):
        TokenVerifier([pem.decode()])


def test_no_key_at_all_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="RELAY_JWT_SECRET"):
        TokenVerifier([])


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
async def test_longer_hash_needs_a_longer_secret(algorithm: str) -> None:
    long = TokenVerifier([LONG_SECRET])
    assert await long.verify(sign(claims(), LONG_SECRET, algorithm), NOW)
    head = encode_part({"alg": algorithm, "typ": "JWT"})
    token = f"{head}.{encode_part(claims())}.AAAA"
    assert "signature" in await reason_of(TokenVerifier([SECRET]), token)


# --- Claims ---


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"exp": None}, "exp is required"),
        ({"exp": "soon"}, "exp"),
        ({"exp": True}, "exp"),
        ({"exp": 10**30}, "exp"),
        ({"exp": NOW - LEEWAY_S}, "expired"),
        ({"nbf": NOW + LEEWAY_S + 1}, "not valid yet"),
        ({"nbf": "x"}, "nbf"),
        ({"sub": None}, "sub"),
        ({"sub": 7}, "sub"),
        ({"sub": ""}, "sub"),
        ({"sub": "x" * 257}, "sub"),
        ({"jti": 5}, "jti"),
        ({"scope": ["relay:admin"]}, "scope"),
    ],
)
async def test_bad_claim_is_named(
    verifier: TokenVerifier, changes: dict[str, Any], word: str
) -> None:
    payload = claims(**changes)
    head, body = encode_part({"alg": "HS256"}), encode_part(payload)
    signer = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = signer.sign(f"{head}.{body}".encode(), SECRET.encode())
    token = f"{head}.{body}." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    assert word in await reason_of(verifier, token)


@pytest.mark.parametrize("user_id", ["{alice}", "a:b*", "a\nb", "..", "ålice 🎈", "x" * 256])
async def test_any_printable_or_odd_user_id_survives(verifier: TokenVerifier, user_id: str) -> None:
    token = mint_token(SECRET, user_id, 60, now_s=NOW)
    assert (await verifier.verify(token, NOW)).user_id == user_id


async def test_clocks_may_differ_by_the_leeway_and_no_more(verifier: TokenVerifier) -> None:
    token = sign(claims(exp=NOW, nbf=NOW))
    assert await verifier.verify(token, NOW + LEEWAY_S - 1)
    assert await verifier.verify(token, NOW - LEEWAY_S)
    assert "expired" in await reason_of(verifier, token, NOW + LEEWAY_S)
    assert "not valid yet" in await reason_of(verifier, token, NOW - LEEWAY_S - 1)


async def test_issuer_is_checked_where_configured() -> None:
    verifier = TokenVerifier([SECRET], issuer="https://id.example.com")
    assert await verifier.verify(sign(claims(iss="https://id.example.com")), NOW)
    assert "issuer" in await reason_of(verifier, sign(claims(iss="https://evil.example.com")))
    assert "issuer" in await reason_of(verifier, sign(claims()))


async def test_audience_is_checked_where_configured() -> None:
    verifier = TokenVerifier([SECRET], audience="relay")
    assert await verifier.verify(sign(claims(aud="relay")), NOW)
    assert await verifier.verify(sign(claims(aud=["other", "relay"])), NOW)
    assert "audience" in await reason_of(verifier, sign(claims(aud="other")))
    assert "audience" in await reason_of(verifier, sign(claims()))


# --- Key sets ---


def public_pem(private: Any) -> bytes:
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def jwk(private: Any, kid: str, **more: Any) -> dict[str, Any]:
    kinds = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    algorithm = next(maker for kind, maker in kinds.items() if isinstance(private, kind))
    return {**algorithm.to_jwk(private.public_key(), as_dict=True), "kid": kid, **more}


RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


class Issuer:
    """A real HTTP server that publishes a key set, and can fail on request."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.requests = 0
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.body: bytes | None = None
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.requests += 1
                issuer.may_answer.wait(10)
                body = issuer.body or json.dumps({"keys": issuer.keys}).encode()
                self.send_response(issuer.status)
                if issuer.status == 302:
                    self.send_header("Location", "ftp://127.0.0.1/keys")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks.json"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    server = Issuer()
    yield server
    server.stop()


def by_key_set(issuer: Issuer, *secrets: str) -> TokenVerifier:
    return TokenVerifier(secrets, key_set=KeySet(issuer.url), audience="relay")


def good(**changes: Any) -> dict[str, Any]:
    return claims(aud="relay", **changes)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA_KEY, "RS256"),
        (RSA_KEY, "RS512"),
        (EC_KEY, "ES256"),
        (ED_KEY, "EdDSA"),
    ],
)
async def test_public_keys_verify(issuer: Issuer, key: Any, algorithm: str) -> None:
    issuer.keys = [jwk(RSA_KEY, "r"), jwk(EC_KEY, "e"), jwk(ED_KEY, "d")]
    kid = {RSA_KEY: "r", EC_KEY: "e", ED_KEY: "d"}[key]
    verifier = by_key_set(issuer)
    token = sign(good(), key, algorithm, kid=kid)
    assert (await verifier.verify(token, NOW)).user_id == "alice"
    without_kid = sign(good(), key, algorithm)
    assert (await verifier.verify(without_kid, NOW)).user_id == "alice"
    assert issuer.requests == 1


async def test_public_key_used_as_a_shared_secret_is_refused(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "r")]
    head = encode_part({"alg": "HS256", "kid": "r"})
    body = encode_part(good())
    signer = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = signer.sign(f"{head}.{body}".encode(), public_pem(RSA_KEY))
    token = f"{head}.{body}." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    assert "shared secret" in await reason_of(by_key_set(issuer), token)
    assert "signature" in await reason_of(by_key_set(issuer, SECRET), token)


async def test_symmetric_key_in_a_key_set_is_not_used(issuer: Issuer) -> None:
    shared = base64.urlsafe_b64encode(SECRET.encode()).decode()
    issuer.keys = [jwk(RSA_KEY, "r"), {"kty": "oct", "k": shared, "kid": "o"}]
    verifier = by_key_set(issuer)
    await reason_of(verifier, sign(good(), SECRET, "HS256", kid="o"))
    assert [key.key_id for key in keys_of_key_set(fetch_key_set(issuer.url))] == ["r"]


async def test_algorithm_of_another_key_type_is_refused(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "k")]
    assert "signature" in await reason_of(
        by_key_set(issuer), sign(good(), EC_KEY, "ES256", kid="k")
    )


async def test_named_algorithm_narrows_a_key(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "k", alg="RS512")]
    verifier = by_key_set(issuer)
    assert await verifier.verify(sign(good(), RSA_KEY, "RS512", kid="k"), NOW)
    await reason_of(verifier, sign(good(), RSA_KEY, "RS256", kid="k"))


def test_key_set_without_audience_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="RELAY_JWT_AUDIENCE"):
        TokenVerifier([], key_set=KeySet("https://id.example.com/jwks"))


async def test_rotated_key_is_found(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "old")]
    verifier = by_key_set(issuer)
    assert await verifier.verify(sign(good(), RSA_KEY, "RS256", kid="old"), NOW)
    issuer.keys = [jwk(EC_KEY, "new")]
    later = NOW + 11
    assert await verifier.verify(sign(good(exp=NOW + 600), EC_KEY, "ES256", kid="new"), later)
    withdrawn = sign(good(exp=NOW + 600), RSA_KEY, "RS256", kid="old")
    assert "signature" in await reason_of(verifier, withdrawn, later)


async def test_withdrawn_key_is_refused_after_a_while_without_any_request(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "old")]
    verifier = by_key_set(issuer)
    withdrawn = sign(good(exp=NOW + 600), RSA_KEY, "RS256", kid="old")
    assert await verifier.verify(withdrawn, NOW)
    issuer.keys = [jwk(EC_KEY, "new")]
    assert await verifier.verify(withdrawn, NOW + 300)
    assert "signature" in await reason_of(verifier, withdrawn, NOW + 301)


async def test_keys_serve_while_the_issuer_takes_its_time(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "REFRESH_WAIT_S", 0.05)
    issuer.keys = [jwk(RSA_KEY, "r")]
    verifier = by_key_set(issuer)
    token = sign(good(exp=NOW + 600), RSA_KEY, "RS256", kid="r")
    assert await verifier.verify(token, NOW)
    issuer.may_answer.clear()
    assert await verifier.verify(token, NOW + 301)
    issuer.may_answer.set()
    await verifier.aclose()
    assert issuer.requests == 2


async def test_unknown_key_ids_ask_the_issuer_rarely(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "r")]
    verifier = by_key_set(issuer)
    tokens = [sign(good(), EC_KEY, "ES256", kid=f"made-up-{number}") for number in range(20)]
    answers = await asyncio.gather(
        *(verifier.verify(token, NOW) for token in tokens), return_exceptions=True
    )
    assert all(isinstance(answer, TokenRejected) for answer in answers)
    for token in tokens:
        await reason_of(verifier, token, NOW + 5)
    assert issuer.requests == 1


async def test_issuer_that_is_down_is_not_the_users_fault(issuer: Issuer) -> None:
    issuer.status = 500
    verifier = by_key_set(issuer)
    token = sign(good(exp=NOW + 600), RSA_KEY, "RS256", kid="r")
    for _ in range(3):
        with pytest.raises(RequestRefused, match="unavailable"):
            await verifier.verify(token, NOW)
    assert issuer.requests == 1
    issuer.status, issuer.keys = 200, [jwk(RSA_KEY, "r")]
    assert await verifier.verify(token, NOW + 11)


async def test_known_keys_outlive_a_short_outage_of_the_issuer(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "r")]
    key_set = KeySet(issuer.url)
    verifier = TokenVerifier([], key_set=key_set, audience="relay")
    token = sign(good(exp=NOW + 10_000), RSA_KEY, "RS256", kid="r")
    assert await verifier.verify(token, NOW)
    issuer.status = 503
    assert await verifier.verify(token, NOW + 400)
    await verifier.aclose()
    assert isinstance(key_set.error, KeySetUnreadable)
    assert await verifier.verify(token, NOW + 3_000)
    await verifier.aclose()
    with pytest.raises(RequestRefused):
        await verifier.verify(token, NOW + 3_700)


@pytest.mark.parametrize(
    "document", [b"", b"[]", b'{"keys": 5}', b'{"keys": []}', b'{"keys": [7]}', b"\xff"]
)
def test_document_that_is_no_key_set_is_refused(document: bytes) -> None:
    with pytest.raises(KeySetUnreadable):
        keys_of_key_set(document)


def test_short_rsa_key_and_broken_key_are_left_out() -> None:
    entries = [
        {"kty": "RSA", "n": "!!", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256"},
        jwk(ED_KEY, "d"),
    ]
    keys = keys_of_key_set(json.dumps({"keys": entries}).encode())
    assert [key.key_id for key in keys] == ["d"]


def test_redirect_to_another_scheme_is_refused(issuer: Issuer) -> None:
    issuer.status = 302
    with pytest.raises(KeySetUnreadable):
        fetch_key_set(issuer.url)


def test_huge_document_is_refused(issuer: Issuer) -> None:
    issuer.body = b"x" * 1_100_000
    with pytest.raises(KeySetUnreadable, match="larger"):
        fetch_key_set(issuer.url)


def test_form_of_a_token_is_recognised() -> None:
    assert looks_like_token(mint_token(SECRET, "alice", 60))
    assert not looks_like_token("q3nD9c0zJ0xQmW2b8vT4yUoK6sPa1LeR7iHfXgZjN5k")


async def test_time_of_issue_is_kept_and_may_not_lie_in_the_future() -> None:
    verifier = TokenVerifier([SECRET])
    identity = await verifier.verify(mint_token(SECRET, "alice", 60, now_s=1_000), 1_000)
    assert identity.issued_at_ms == 1_000_000
    early = mint_token(SECRET, "alice", 600, now_s=1_000 + LEEWAY_S)
    await verifier.verify(early, 1_000)
    with pytest.raises(TokenRejected, match="in the future"):
        await verifier.verify(mint_token(SECRET, "alice", 600, now_s=1_001 + LEEWAY_S), 1_000)


@st.composite
def changed_tokens(draw: st.DrawFn) -> str:
    """Give a token whose header may be that of a good one, with parts of any kind behind it."""
    good_parts = sign(claims()).split(".")
    others = st.sampled_from(
        [*good_parts, *sign(claims(sub="bob"), "another secret: 0123456789abcdefg").split(".")]
    )
    text = st.text("ABab01-_", max_size=6)
    changed = st.builds(lambda part, end: part[: len(part) - len(end)] + end, others, text)
    parts = [draw(st.just(good_parts[0]) | others)]
    parts += [draw(others | changed | text) for _ in range(2)]
    return ".".join(parts)


@given(changed_tokens())
async def test_header_seen_before_lets_nobody_in_who_was_out(token: str) -> None:
    acquainted, fresh = TokenVerifier([SECRET]), TokenVerifier([SECRET])
    assert (await acquainted.verify(sign(claims()), NOW)).user_id == "alice"
    answers = []
    for verifier in (acquainted, fresh):
        try:
            answers.append((await verifier.verify(token, NOW)).user_id)
        except TokenRejected:
            answers.append("nobody")
    assert answers[0] == answers[1]


async def test_header_seen_before_needs_a_signature_of_one_of_the_secrets() -> None:
    old, new = SECRET, "a newer secret, also long enough: 0123456789"
    verifier = TokenVerifier([new, old])
    await verifier.verify(sign(claims(), old), NOW)
    for secret in (old, new):
        assert (await verifier.verify(sign(claims(sub="bob"), secret), NOW)).user_id == "bob"
    assert "signature" in await reason_of(verifier, sign(claims(), "x" * 40))


async def test_token_whose_last_bits_are_changed_is_refused_though_its_header_is_known(
    verifier: TokenVerifier,
) -> None:
    token = sign(claims())
    await verifier.verify(token, NOW)
    # 32 bytes are 43 characters; the last one has two bits that stand for nothing.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]
    assert "read" in await reason_of(verifier, twin)


@pytest.mark.parametrize(
    ("key", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256"), (ED_KEY, "EdDSA")]
)
async def test_header_seen_before_needs_a_signature_of_the_issuers_key(
    issuer: Issuer, key: Any, algorithm: str
) -> None:
    issuer.keys = [jwk(key, "k")]
    verifier = by_key_set(issuer)
    tokens = {user: sign(good(sub=user), key, algorithm, kid="k") for user in ("alice", "bob")}
    for user, token in tokens.items():
        assert (await verifier.verify(token, NOW)).user_id == user
    forged = tokens["alice"].rpartition(".")[0] + "." + tokens["bob"].rpartition(".")[2]
    assert "signature" in await reason_of(verifier, forged)


async def test_issuer_may_write_something_new_into_each_header(verifier: TokenVerifier) -> None:
    for number in range(200):
        token = sign(claims(), serial=number)
        assert (await verifier.verify(token, NOW)).user_id == "alice"
