"""Credentials and origins: what counts as shown, and which pages may connect."""

from __future__ import annotations

import pytest

from gateway.auth import Credential, find_credential, is_origin_allowed
from relay.errors import RequestRefused
from relay.tokens import mint_token

TOKEN = mint_token("a secret that is long enough for this", "alice", 60)


def test_header_goes_before_subprotocol_before_ticket() -> None:
    header, entries, query = {"authorization": "bearer  a.b.c "}, ["relay.v1", "bearer.d.e.f"], {
        "ticket": "t"
    }  # fmt: skip
    found = find_credential(header, query, entries, allow_ticket=True)
    assert (found.kind, found.value) == ("token", "a.b.c")
    found = find_credential({}, query, entries, allow_ticket=True)
    assert (found.kind, found.value) == ("token", "d.e.f")
    found = find_credential({}, query, ["relay.v1"], allow_ticket=True)
    assert (found.kind, found.value) == ("ticket", "t")


def test_ticket_counts_only_where_it_may() -> None:
    with pytest.raises(RequestRefused, match="no token"):
        find_credential({}, {"ticket": "t"})


@pytest.mark.parametrize("name", ["token", "TOKEN", "access_token", "jwt", "authorization"])
def test_token_in_the_url_is_refused_beside_a_good_header(name: str) -> None:
    with pytest.raises(RequestRefused, match="URL") as caught:
        find_credential({"authorization": f"Bearer {TOKEN}"}, {name: "x"})
    assert caught.value.http_status == 401


def test_token_in_the_tickets_place_is_refused() -> None:
    with pytest.raises(RequestRefused, match="URL"):
        find_credential({}, {"ticket": TOKEN}, allow_ticket=True)


def test_credential_is_not_printed() -> None:
    assert TOKEN not in repr(Credential("token", TOKEN))


@pytest.mark.parametrize(
    ("origin", "host", "is_allowed"),
    [
        (None, "relay.example", True),
        ("https://relay.example", "relay.example", True),
        ("https://relay.example", "relay.example:443", True),
        ("http://relay.example:80", "relay.example", True),
        ("HTTPS://Relay.Example", "relay.EXAMPLE", True),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("https://chat.example.com", "relay.example", True),
        ("http://127.0.0.1:8081", "127.0.0.1:8080", False),
        ("https://relay.example.evil.example", "relay.example", False),
        ("https://evil.example/relay.example", "relay.example", False),
        ("https://evil.example", "relay.example", False),
        ("http://chat.example.com", "relay.example", False),
        ("file://", "", False),
        ("chrome-extension://abc", "abc", False),
        ("null", "null", False),
        ("", "", False),
        ("https://", "", False),
        ("http://[::1", "[::1", False),
        ("https://relay.example", None, False),
    ],
)
def test_origins(origin: str | None, host: str | None, is_allowed: bool) -> None:
    assert is_origin_allowed(origin, host, {"https://chat.example.com"}) is is_allowed
