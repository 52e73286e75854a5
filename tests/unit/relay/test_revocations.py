"""Which tokens a set of revocations covers."""

from __future__ import annotations

from relay.revocations import (
    CLOCK_MARGIN_MS,
    KEPT_WITHOUT_EXPIRY_MS,
    Revocation,
    RevokedTokens,
    revocation_of,
)
from relay.tokens import LATEST_EXPIRY_S, LEEWAY_S, Identity

NOW = 1_000_000


def identity(user_id: str = "alice", jti: str | None = None, at_ms: int | None = None) -> Identity:
    return Identity(user_id, NOW * 2, jti=jti, issued_at_ms=at_ms)


def test_token_is_revoked_by_its_id_whoever_shows_it() -> None:
    revoked = RevokedTokens([revocation_of("token", "x", NOW)])
    assert revoked.includes(identity(jti="x"))
    assert not revoked.includes(identity(jti="y"))
    assert not revoked.includes(identity())
    # The names of users and of tokens have nothing to do with each other.
    assert not revoked.includes(identity("x"))


def test_users_tokens_are_revoked_up_to_the_moment() -> None:
    revoked = RevokedTokens([revocation_of("user", "alice", NOW)])
    assert revoked.includes(identity(at_ms=NOW))
    assert revoked.includes(identity(at_ms=None))
    assert not revoked.includes(identity(at_ms=NOW + 1))
    assert not revoked.includes(identity("bob", at_ms=NOW))
    assert not revoked.includes(identity("bob", jti="alice"))


def test_widest_of_several_counts_in_any_order() -> None:
    late, long = Revocation("user", "alice", NOW, 2 * NOW), Revocation("user", "alice", 1, 3 * NOW)
    for order in ([late, long], [long, late]):
        [held] = RevokedTokens(order)
        assert (held.at_ms, held.until_ms) == (NOW, 3 * NOW)
        assert held.covers(late)
        assert held.covers(long)
    assert not late.covers(long)
    assert not long.covers(late)


def test_revocation_is_kept_as_long_as_the_token_would_be_taken() -> None:
    assert revocation_of("token", "x", NOW).until_ms == NOW + KEPT_WITHOUT_EXPIRY_MS
    assert revocation_of("token", "x", NOW, 5_000).until_ms == (5_000 + LEEWAY_S) * 1000
    # Whatever has expired stays long enough for everybody to read it.
    assert revocation_of("token", "x", NOW, 0).until_ms == NOW + CLOCK_MARGIN_MS
    assert revocation_of("token", "x", NOW, LATEST_EXPIRY_S).until_ms == LATEST_EXPIRY_S * 1000
