from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from relay.keys import MAX_USER_ID_CHARS, Keys, encode_user

USER_IDS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("{}:*%\n\0 é"),
    min_size=1,
    max_size=MAX_USER_ID_CHARS,
)


@given(USER_IDS, USER_IDS)
def test_two_users_never_share_a_name(one: str, other: str) -> None:
    assume(one != other)
    assert encode_user(one) != encode_user(other)
    assert Keys("p").user(one).live != Keys("p").user(other).live


@given(USER_IDS)
def test_nothing_that_could_name_another_key_survives(user_id: str) -> None:
    encoded = encode_user(user_id)
    assert encoded.isascii()
    assert not set(encoded) & set("{}:*?[] \r\n\0/\\")


@given(USER_IDS, st.text("abcdef0123456789_", min_size=1))
def test_all_keys_of_a_user_share_one_hash_tag(user_id: str, run_id: str) -> None:
    user = Keys("p").user(user_id)
    names = [user.channel, user.log, user.texts, user.live, user.runs, user.threads]
    names += [user.connections, user.run(run_id), user.body(3), user.text(run_id, 1, "m1")]
    tag = "{" + encode_user(user_id) + "}"
    assert all(name.startswith(f"p:{tag}:") and name.count("{") == 1 for name in names)
    assert len(set(names)) == len(names)
    # The scripts find the other keys by the channel's name without its last word.
    assert user.channel == user.base + "channel"


@pytest.mark.parametrize("user_id", ["", "a" * (MAX_USER_ID_CHARS + 1), "\ud800"])
def test_impossible_user_ids_are_refused(user_id: str) -> None:
    with pytest.raises(ValueError, match="a user id"):
        encode_user(user_id)
