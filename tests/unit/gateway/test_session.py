"""The conversation of one connection: what it answers, what it refuses, when it ends."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.session import (
    ABUSE_LIMIT,
    ABUSE_WINDOW_MS,
    CancelRun,
    Close,
    Effect,
    Pong,
    Refuse,
    Reply,
    Session,
    SessionLimits,
    Submit,
    VerifyToken,
)
from relay.config import SMALLEST_FRAME_LIMIT
from relay.errors import CloseCode
from relay.tokens import MAX_TOKEN_CHARS

LIMITS = SessionLimits(max_frame_bytes=2_000, max_content_chars=100, frames_per_second=20)
NOW = 1_800_000_000_000
EXPIRY = NOW + 3_600_000


@pytest.fixture
def session() -> Session:
    return Session("alice", EXPIRY, LIMITS, NOW)


def message(**changes: Any) -> str:
    fields = {"type": "user_message", "id": "1", "thread_id": "t", "content": "hello", **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


def error_of(effects: list[Effect]) -> dict[str, Any]:
    [reply] = effects
    assert isinstance(reply, Refuse)
    frame: dict[str, Any] = orjson.loads(reply.frame)
    assert (frame["type"], frame["code"]) == ("error", reply.code)
    assert isinstance(frame["retryable"], bool)
    assert frame["recovery_suggestions"]
    return frame


# --- What is understood ---


def test_any_token_can_be_refreshed_however_small_frames_must_be() -> None:
    limits = SessionLimits(SMALLEST_FRAME_LIMIT, max_content_chars=100, frames_per_second=20)
    session = Session("alice", EXPIRY, limits, NOW)
    # What clients in other languages may write as escapes, twelve bytes each.
    frame = {"type": "refresh_token", "id": "\U0001f511" * 128, "token": "x" * MAX_TOKEN_CHARS}
    assert session.receive_text(json.dumps(frame), NOW) == [
        VerifyToken(frame["id"], frame["token"])
    ]


def test_user_message_is_submitted_with_its_defaults(session: Session) -> None:
    [effect] = session.receive_text(message(), NOW)
    assert isinstance(effect, Submit)
    assert effect.message.content == "hello"
    assert effect.message.agent is None
    assert effect.message.metadata == {}


def test_cancel_ping_and_refresh_are_understood(session: Session) -> None:
    [cancel] = session.receive_text('{"type":"cancel","id":"1","run_id":"run_a"}', NOW)
    assert isinstance(cancel, CancelRun)
    assert session.receive_text('{"type":"ping","id":"2"}', NOW) == [Pong("2")]
    refresh = session.receive_text('{"type":"refresh_token","id":"3","token":"x"}', NOW)
    assert refresh == [VerifyToken("3", "x")]


# --- What is not ---


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "invalid_json", "JSON"),
        ("{", "invalid_json", "character"),
        ('{"type":"ping","id":"1"} x', "invalid_json", "JSON"),
        ('{"a": NaN}', "invalid_json", "JSON"),
        ('{"id": "\\ud800"}', "invalid_json", "JSON"),
        ("[" * 1_500, "invalid_json", "JSON"),
        ("[]", "invalid_frame", "object"),
        ('"ping"', "invalid_frame", "object"),
        ("null", "invalid_frame", "object"),
        ("{}", "invalid_frame", "type: the field is required"),
        ('{"type":"pong","id":"1"}', "unknown_type", "'pong'"),
        ('{"type":7,"id":"1"}', "unknown_type", "type"),
        ('{"type":["ping"],"id":"1"}', "unknown_type", "type"),
        ('{"type":"ping"}', "invalid_frame", "id: the field is required"),
        ('{"type":"ping","id":""}', "invalid_frame", "id: "),
        ('{"type":"ping","id":5}', "invalid_frame", "id: "),
        ('{"type":"ping","id":"%s"}' % ("x" * 129), "invalid_frame", "id: "),
        (message(thread_id=...), "invalid_frame", "thread_id: the field is required"),
        (message(thread_id=""), "invalid_frame", "thread_id: "),
        (message(content=...), "invalid_frame", "content: the field is required"),
        (message(content=""), "invalid_frame", "content: must not be empty"),
        (message(content=" \n\t "), "invalid_frame", "content: must not be empty"),
        (message(content=5), "invalid_frame", "content: "),
        (message(content=["a"]), "invalid_frame", "content: "),
        (message(agent=""), "invalid_frame", "agent: "),
        (message(metadata=[]), "invalid_frame", "metadata: "),
        (message(contnet="x"), "invalid_frame", "contnet: there is no such field"),
        (message(user_id="bob"), "invalid_frame", "user_id: there is no such field"),
        (message(channel="relay:{bob}:live"), "invalid_frame", "channel: there is no such field"),
        (message(content="x" * 101), "payload_too_large", "content: has 101 characters"),
    ],
)
def test_bad_frame_is_refused_with_its_place_and_the_next_one_works(
    session: Session, text: str, code: str, words: str
) -> None:
    frame = error_of(session.receive_text(text, NOW))
    assert frame["code"] == code
    assert words in frame["message"]
    assert session.receive_text('{"type":"ping","id":"2"}', NOW) == [Pong("2")]


def test_metadata_may_be_deep_but_not_endless(session: Session) -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(depth):
            value = {"a": value}
        return value  # type: ignore[no-any-return]

    [effect] = session.receive_text(message(metadata=nested(32)), NOW)
    assert isinstance(effect, Submit)
    refused = error_of(session.receive_text(message(metadata=nested(33)), NOW))
    assert "metadata: must not be nested deeper than 32 levels" in refused["message"]


def test_refusal_carries_the_id_where_it_is_usable(session: Session) -> None:
    assert error_of(session.receive_text(message(content=""), NOW))["id"] == "1"
    assert "id" not in error_of(session.receive_text(message(id=7), NOW))
    assert "id" not in error_of(session.receive_text("{", NOW))


def test_frame_over_the_limit_is_refused_by_bytes_not_characters(session: Session) -> None:
    fits = '{"type":"ping","id":"1"}'.ljust(2_000)
    assert session.receive_text(fits, NOW) == [Pong("1")]
    for text in (fits + " ", '{"type":"ping","id":"%s"}' % ("é" * 1_000)):
        frame = error_of(session.receive_text(text, NOW))
        assert frame["code"] == "frame_too_large"
        assert "at most 2000" in frame["message"]


def test_binary_frame_is_refused(session: Session) -> None:
    assert error_of(session.receive_binary(NOW))["code"] == "binary_not_supported"


def test_long_made_up_names_are_not_echoed_in_full(session: Session) -> None:
    assert len(error_of(session.receive_text(message(**{"x" * 1_500: 1}), NOW))["message"]) < 300
    unknown = session.receive_text(json.dumps({"type": "y" * 1_500}), NOW)
    assert len(error_of(unknown)["message"]) < 300


@settings(deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_no_text_breaks_the_session(text: str) -> None:
    session = Session("alice", EXPIRY, LIMITS, NOW)
    assert session.receive_text(text, NOW)
    assert session.receive_text('{"type":"ping","id":"2"}', NOW) == [Pong("2")]


# --- Abuse and rates ---


def test_repeated_abuse_closes_with_1008(session: Session) -> None:
    for count in range(ABUSE_LIMIT - 1):
        assert len(session.receive_text("{", NOW + count)) == 1
    effects = session.receive_text("{", NOW + ABUSE_LIMIT)
    assert isinstance(effects[0], Refuse)
    assert isinstance(effects[1], Close)
    assert effects[1].code is CloseCode.POLICY


def test_rare_mistakes_are_forgiven(session: Session) -> None:
    for count in range(50):
        moment = NOW + count * (ABUSE_WINDOW_MS // (ABUSE_LIMIT - 1) + 1)
        assert len(session.receive_text("{", moment)) == 1


def test_refused_requests_are_no_abuse(session: Session) -> None:
    for count in range(50):
        effects = session.receive_text(message(content="x" * 101), NOW + count * 100)
        assert error_of(effects)["code"] == "payload_too_large"


def test_rate_is_held_and_recovers(session: Session) -> None:
    ping = '{"type":"ping","id":"1"}'
    for _ in range(20):
        assert session.receive_text(ping, NOW) == [Pong("1")]
    refused = error_of(session.receive_text(ping, NOW))
    assert refused["code"] == "rate_limited"
    assert refused["id"] == "1"
    assert refused["retry_after_ms"] == 1_000
    assert session.receive_text(ping, NOW + 50) == [Pong("1")]
    error_of(session.receive_text(ping, NOW + 51))
    assert session.receive_text(ping, NOW + 10_000) == [Pong("1")]


def test_flood_closes_with_4429(session: Session) -> None:
    ping = '{"type":"ping","id":"1"}'
    closes = [
        effect
        for _ in range(20 + 200)
        for effect in session.receive_text(ping, NOW)
        if isinstance(effect, Close)
    ]
    assert [close.code for close in closes] == [CloseCode.LIMIT]


def test_clock_that_goes_back_does_not_break_the_rate(session: Session) -> None:
    assert session.receive_text('{"type":"ping","id":"1"}', NOW - 5_000) == [Pong("1")]


# --- The token ---


def test_expiry_is_announced_then_enforced() -> None:
    session = Session("alice", NOW + 60_000, LIMITS, NOW)
    assert session.next_due_ms == NOW + 30_000
    assert session.advance(NOW + 29_999) == []
    [warning] = session.advance(NOW + 30_000)
    assert isinstance(warning, Reply)
    assert orjson.loads(warning.frame)["type"] == "token_expiring"
    assert session.next_due_ms == NOW + 60_000
    assert session.advance(NOW + 59_999) == []
    assert session.advance(NOW + 60_000) == [Close(CloseCode.TOKEN_EXPIRED, "token expired")]


def test_token_in_its_last_seconds_is_announced_at_once() -> None:
    session = Session("alice", NOW + 5_000, LIMITS, NOW)
    assert session.next_due_ms <= NOW
    assert len(session.advance(NOW)) == 1
    assert isinstance(session.advance(NOW + 5_000)[0], Close)


def test_token_within_the_leeway_gets_what_is_left_of_it() -> None:
    session = Session("alice", NOW - 10_000, LIMITS, NOW)
    assert isinstance(session.advance(NOW)[0], Reply)
    assert session.advance(NOW + 19_999) == []
    assert isinstance(session.advance(NOW + 20_000)[0], Close)


def test_refreshed_token_moves_the_end() -> None:
    session = Session("alice", NOW + 60_000, LIMITS, NOW)
    session.advance(NOW + 30_000)
    [reply] = session.token_verified("9", "alice", NOW + 120_000, NOW + 40_000)
    assert isinstance(reply, Reply)
    frame = orjson.loads(reply.frame)
    assert (frame["type"], frame["id"]) == ("ack", "9")
    assert frame["expires_at"].endswith("Z")
    assert session.advance(NOW + 60_000) == []
    assert len(session.advance(NOW + 90_000)) == 1


def test_refreshed_token_of_another_user_changes_nothing() -> None:
    session = Session("alice", NOW + 60_000, LIMITS, NOW)
    refused = error_of(session.token_verified("9", "bob", NOW + 999_000, NOW))
    assert refused["code"] == "invalid_token"
    assert refused["id"] == "9"
    assert session.next_due_ms == NOW + 30_000
