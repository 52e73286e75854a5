"""Which command finds out that a key is not of its type."""

from __future__ import annotations

import pytest

from relay import key_probes
from relay.keys import UserKeys

USER = UserKeys("relay", "a:b}c")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (USER.channel, "hash"),
        (USER.threads, "hash"),
        (USER.connections, "hash"),
        (USER.run("run_1"), "hash"),
        (USER.body(7), "hash"),
        (USER.upload("f", 1, 0), "hash"),
        (USER.log, "stream"),
        (USER.texts, "sorted set"),
        (USER.runs, "sorted set"),
        (USER.text("run_1", 1, "m"), "string"),
    ],
)
def test_each_key_of_a_user_can_be_asked(key: str, kind: str) -> None:
    probe = key_probes.probe(key)
    assert probe is not None
    assert (probe.key, probe.kind, probe.command[1]) == (key, kind, key)
    assert key in key_probes.explain(probe)


def test_what_is_no_key_of_a_user_is_left_out() -> None:
    assert key_probes.probes([USER.live, "relay:agents", USER.log]) == [key_probes.probe(USER.log)]


def test_members_name_the_keys_behind_a_set() -> None:
    assert key_probes.member_keys(USER.runs, [b"run_1"]) == [USER.run("run_1")]
    texts = key_probes.member_keys(USER.texts, [b"run_1:1:m", b"run_1:2:n"])
    assert texts == [USER.text("run_1", 1, "m"), USER.text("run_1", 2, "n"), USER.run("run_1")]
    assert key_probes.list_members([USER.channel, USER.runs]) == [("ZRANGE", USER.runs, "0", "999")]
