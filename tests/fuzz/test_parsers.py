"""Whatever a client shows or sends is understood, or refused by the one error that says why.

``RELAY_FUZZ_EXAMPLES`` sets how many examples each property gets; ``make faults`` sets more.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.auth import find_credential, is_origin_allowed
from gateway.feed import parse_since
from gateway.requests import FRAME_MODELS, check_fields, parse_frame, parse_json_object
from relay.codec import Position, decode_live, decode_task
from relay.errors import DecodingFailed, RequestRefused, TokenRejected
from relay.jwks import KeySetUnreadable, keys_of_key_set
from relay.tokens import Identity, TokenVerifier, mint_token

EXAMPLES = int(os.environ.get("RELAY_FUZZ_EXAMPLES", "40"))
MANY = 20_000
SECRET = "a secret that is long enough: 0123456789"
NOW = 1_800_000_000

many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

TEXTS = st.text(max_size=40)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
FIELDS = sorted({name for model in FRAME_MODELS.values() for name in model.model_fields} | {"type"})
FRAMES = st.dictionaries(st.sampled_from(FIELDS) | TEXTS, JSON, max_size=7).flatmap(
    lambda fields: st.one_of(
        st.just(fields),
        st.sampled_from(sorted(FRAME_MODELS)).map(lambda kind: {**fields, "type": kind}),
    )
)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw what a few wrong bytes make of something right."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        change = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "end"]))
        if change == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del changed[place : place + draw(st.integers(1, 8))]
        elif change == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif change == "repeat":
            changed[place:place] = changed[place : place + 16]
        else:
            del changed[place:]
    return bytes(changed)


# --- Frames ---

GOOD_FRAME = orjson.dumps(
    {
        "type": "user_message",
        "id": "1",
        "thread_id": "t",
        "content": "é\u2028",
        "metadata": {"a": 1},
    }
)


def read(data: str | bytes) -> None:
    try:
        frame = parse_frame(parse_json_object(data))
    except RequestRefused as error:
        refused = error
    else:
        assert frame.type in FRAME_MODELS
        assert 0 < len(frame.id) <= 128
        return
    assert refused.code in ("invalid_json", "invalid_frame", "unknown_type")
    assert refused.recovery_suggestions
    # The answer must itself be a frame, and a small one.
    assert 0 < len(refused.detail.encode()) < 8_000


@many
@given(st.binary(max_size=200) | mutated(GOOD_FRAME))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    read(data)


@many
@given(FRAMES)
def test_any_fields_are_a_frame_or_refused(fields: dict[str, Any]) -> None:
    read(json.dumps(fields, ensure_ascii=True))
    for model in FRAME_MODELS.values():
        try:
            check_fields(model, fields)
        except RequestRefused as refused:
            refused.detail.encode()


# --- Positions and live messages ---


@many
@given(TEXTS | st.from_regex(r"[0-9a-z]{0,4}:?[0-9 +_.-]{0,20}", fullmatch=True))
def test_any_text_is_a_place_to_begin_or_refused(text: str) -> None:
    try:
        since = parse_since(text)
    except DecodingFailed:
        return
    assert parse_since(str(since)) == since
    if isinstance(since, Position):
        assert 0 <= since.offset < 10**16


LIVE = bytes.fromhex("9301a4653161629295010200a472756e31c4027b7d95020001a0a0")
TASK = bytes.fromhex("84a17601a7757365725f6964a161a672756e5f6964a172a56167656e74a164")


@many
@given(st.binary(max_size=80) | mutated(LIVE))
def test_any_bytes_are_a_live_message_or_refused(data: bytes) -> None:
    try:
        batch = decode_live(data)
    except DecodingFailed:
        return
    for publication in batch.publications:
        assert isinstance(publication.offset, int)
        publication.run_id.encode()


@many
@given(st.binary(max_size=80) | mutated(TASK))
def test_any_bytes_are_a_task_or_refused(data: bytes) -> None:
    try:
        task = decode_task(data)
    except DecodingFailed:
        return
    assert all(task[:3])


# --- Tokens and origins ---

VERIFIER = TokenVerifier([SECRET], issuer="app", audience="relay")
GOOD_TOKEN = mint_token(SECRET, "alice", 600, issuer="app", audience="relay", now_s=NOW)
KEY = ec.generate_private_key(ec.SECP256R1())


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def verify(token: str) -> str | None:
    """Give the user that a token proves; None where it proves nothing."""
    verifying = VERIFIER.verify(token, NOW)
    try:
        # With shared secrets it waits for nothing, and needs no loop for each example.
        verifying.send(None)
    except StopIteration as done:
        identity: Identity = done.value
        return identity.user_id
    except TokenRejected as error:
        reason = str(error)
    assert len(token) <= 8 or token not in reason
    return None


def test_the_token_that_is_mutated_below_is_valid() -> None:
    assert verify(GOOD_TOKEN) == "alice"


@many
@given(TEXTS | st.from_regex(r"[\w-]{0,9}\.[\w-]{0,9}\.[\w-]{0,9}", fullmatch=True))
def test_no_text_proves_anybody(token: str) -> None:
    assert verify(token) is None


@many
@given(mutated(GOOD_TOKEN.encode()))
def test_no_changed_token_proves_anybody_else(data: bytes) -> None:
    token = data.decode("latin-1")
    # The last character of a signature has bits that base64 does not use.
    assert verify(token) in (None, "alice")
    if token.rpartition(".")[0] != GOOD_TOKEN.rpartition(".")[0]:
        assert verify(token) is None


@many
@given(JSON, JSON)
def test_headers_and_claims_of_any_form_without_a_signature_prove_nobody(
    header: Any, claims: Any
) -> None:
    for made in (header, {"alg": "HS256", "typ": "JWT", "kid": header}, {"alg": header}):
        assert verify(f"{part(made)}.{part(claims)}.{GOOD_TOKEN.rpartition('.')[2]}") is None
        assert verify(f"{part(made)}.{part(claims)}.") is None


@many
@given(
    st.dictionaries(
        st.sampled_from(["sub", "exp", "nbf", "iat", "iss", "aud", "jti", "scope"]),
        JSON,
        max_size=6,
    )
)
def test_signed_claims_of_any_form_prove_their_user_or_nobody(claims: dict[str, Any]) -> None:
    base = {"sub": "alice", "exp": NOW + 60, "iss": "app", "aud": "relay"}
    payload = json.dumps({**base, **claims}).encode()
    user_id = verify(jwt.api_jws.encode(payload, SECRET, "HS256"))
    assert user_id is None or user_id == {**base, **claims}["sub"]
    # Another key's signature proves nothing, whatever it signs.
    assert verify(jwt.api_jws.encode(payload, KEY, "ES256")) is None
    assert verify(jwt.api_jws.encode(payload, SECRET + "x", "HS256")) is None


@many
@given(JSON | st.fixed_dictionaries({"keys": st.lists(JSON, max_size=3)}))
def test_any_document_is_a_key_set_or_unreadable(document: Any) -> None:
    try:
        keys = keys_of_key_set(json.dumps(document).encode())
    except KeySetUnreadable:
        return
    assert isinstance(list(keys), list)


HEADER_TEXTS = st.text(st.characters(max_codepoint=255), max_size=30)


@many
@given(
    st.dictionaries(st.sampled_from(["authorization", "origin", "host"]), HEADER_TEXTS),
    st.dictionaries(st.sampled_from(["ticket", "token", "since", "x"]), TEXTS),
    st.lists(HEADER_TEXTS | HEADER_TEXTS.map(lambda text: "bearer." + text), max_size=3),
)
def test_any_headers_and_query_show_a_credential_or_are_refused(
    headers: dict[str, str], query: dict[str, str], subprotocols: list[str]
) -> None:
    try:
        credential = find_credential(headers, query, subprotocols, allow_ticket=True)
    except RequestRefused:
        return
    assert "token" not in query
    assert credential.value not in repr(credential) or len(credential.value) < 8


@many
@given(HEADER_TEXTS | HEADER_TEXTS.map(lambda text: "http://" + text), HEADER_TEXTS)
def test_no_origin_passes_but_the_gateways_own(origin: str, host: str) -> None:
    if is_origin_allowed(origin, host, ()):
        assert host.lower().removesuffix(":80").removesuffix(":443") in origin.lower()


@pytest.mark.faults_full
def test_many_examples_of_all_of_these() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout=1800",
            __file__,
        ],
        env={**os.environ, "RELAY_FUZZ_EXAMPLES": str(MANY)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5_000:]
