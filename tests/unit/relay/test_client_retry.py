"""What the Python client does after a lost or refused connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.client.http import http_address, problem_detail
from relay.client.state import (
    BACKOFF_CAP_MS,
    FIRST_TRY_WITHIN_MS,
    ConnectionEnded,
    Retry,
    Stop,
    after_close,
    after_refusal,
    backoff_ms,
)
from relay.errors import CloseCode

chances = st.floats(0, 1)
failures = st.integers(0, 10_000)


@given(chance=chances)
def test_first_try_is_within_300_ms(chance: float) -> None:
    assert 0 <= backoff_ms(0, chance) <= FIRST_TRY_WITHIN_MS


@given(failures=failures, chance=chances)
def test_backoff_has_a_ceiling_and_no_floor(failures: int, chance: float) -> None:
    assert 0 <= backoff_ms(failures, chance) <= BACKOFF_CAP_MS
    assert backoff_ms(failures, 0) == 0


def test_backoff_doubles_up_to_its_ceiling() -> None:
    ceilings = [backoff_ms(number, 1) for number in range(1, 9)]
    assert ceilings == [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000]


@pytest.mark.parametrize("code", [CloseCode.TOKEN_EXPIRED, CloseCode.FORBIDDEN, CloseCode.POLICY])
def test_closes_that_mean_stay_away(code: CloseCode) -> None:
    step = after_close(code, "why", failures=0, asked_ms=None, chance=0.5)
    assert isinstance(step, Stop)
    assert step.error.code == code
    assert "(why)" in str(step.error)


@pytest.mark.parametrize("code", [code for code in CloseCode if code.may_reconnect] + [None, 1006])
def test_all_other_closes_mean_come_back_soon(code: int | None) -> None:
    step = after_close(code, "", failures=0, asked_ms=None, chance=1)
    assert step == Retry(FIRST_TRY_WITHIN_MS)


def test_every_close_code_is_decided_as_the_table_says() -> None:
    for code in CloseCode:
        step = after_close(code, "", failures=0, asked_ms=None, chance=0)
        assert isinstance(step, Retry) == code.may_reconnect


@pytest.mark.parametrize("code", list(CloseCode))
def test_another_token_makes_up_for_the_old_one_only(code: CloseCode) -> None:
    step = after_close(code, "", failures=0, asked_ms=None, chance=0, renews_token=True)
    assert isinstance(step, Retry) == (code.may_reconnect or code == CloseCode.TOKEN_EXPIRED)


def test_draining_gateway_says_when_to_come_back() -> None:
    step = after_close(CloseCode.DRAIN, "drain", failures=0, asked_ms=250, chance=0)
    assert step == Retry(250)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426])
def test_refusals_that_will_not_change(status: int) -> None:
    step = after_refusal(status, "It is so.", "7", failures=3, chance=1)
    assert isinstance(step, Stop)
    assert isinstance(step.error, ConnectionEnded)
    assert step.error.code == status
    assert "It is so." in str(step.error)


@pytest.mark.parametrize("status", [429, 503, 500, 502, 504])
def test_refusals_that_pass(status: int) -> None:
    assert after_refusal(status, "", None, failures=1, chance=1) == Retry(1_000)


@given(chance=chances, failures=failures)
def test_retry_after_is_never_undercut(chance: float, failures: int) -> None:
    step = after_refusal(429, "", "7", failures=failures, chance=chance)
    assert isinstance(step, Retry)
    assert step.delay_ms >= 7_000


@pytest.mark.parametrize("header", ["soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", ""])
def test_retry_after_that_is_no_number_is_ignored(header: str) -> None:
    assert after_refusal(503, "", header, failures=0, chance=0) == Retry(0)


def test_retry_after_of_a_year_is_not_believed() -> None:
    step = after_refusal(503, "", "31536000", failures=0, chance=0)
    assert step == Retry(300_000)


# --- Addresses and problem documents ---


@pytest.mark.parametrize(
    ("given_address", "address"),
    [
        ("http://h:8080", "http://h:8080"),
        ("http://h:8080/", "http://h:8080"),
        ("ws://h/v1/ws", "http://h"),
        ("wss://h/relay/v1/ws", "https://h/relay"),
        ("h:8080", "http://h:8080"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://[::1]:1", "https://[::1]:1"),
    ],
)
def test_addresses_in_every_form(given_address: str, address: str) -> None:
    assert http_address(given_address) == address


@pytest.mark.parametrize("address", ["redis://h", "", "http://", "ftp://h"])
def test_addresses_of_something_else(address: str) -> None:
    with pytest.raises(ConnectionEnded, match="is not the address of a relay"):
        http_address(address)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"detail": "d", "title": "t"}', "d"),
        (b'{"title": "t"}', "t"),
        (b"[]", ""),
        (b"<html>", ""),
        (b"", ""),
    ],
)
def test_detail_of_a_refusal(body: bytes, detail: str) -> None:
    assert problem_detail(body) == detail
