"""The Redis users of ``deploy/acl``, as the tests' gateways and workers log in.

Every Redis of the suite has them, and everything that starts a gateway or a worker uses
``as_user``: whatever a part does without having the right to do it turns a test red.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import redis

    from relay.config import Settings

ACL_FILES = Path(__file__).parents[2] / "deploy" / "acl"
ROLES = ("gateway", "worker", "operator")

_TEST_PREFIX = "t" + 12 * "?"
"""What ``key_prefix`` gives; the files have the default prefix, which some tests use too."""


def password_of(role: str) -> str:
    """Give the password of a user in the tests."""
    return f"redis-password-of-{role}-in-tests"


def rules_of(role: str) -> list[str]:
    """Give a user's rules: those of its file, for the tests' key prefixes too, and a password."""
    first, name, *rules = (ACL_FILES / f"{role}.acl").read_text().split()
    assert (first, name) == ("user", role)
    widened = [
        re.sub("^([~&])relay:", rf"\1{_TEST_PREFIX}:", rule)
        for rule in rules
        if rule.startswith(("~relay:", "&relay:"))
    ]
    # Patterns come after resetkeys and resetchannels.
    return [*rules, *widened, f">{password_of(role)}"]


def server_options() -> list[str]:
    """Give the options of a redis-server that has the users from its start, restarts too."""
    return [word for role in ROLES for word in ("--user", role, *rules_of(role))]


def install_users(client: redis.Redis) -> None:
    """Give a running Redis the users."""
    for role in ROLES:
        client.execute_command("ACL", "SETUSER", role, *rules_of(role))  # type: ignore[no-untyped-call]


def as_user(url: str, role: str) -> str:
    """Give the address with a user of ``deploy/acl``; one with other credentials stays as it is."""
    url = as_owner(url)
    if "@" in urlsplit(url).netloc or not url.startswith(("redis://", "rediss://")):
        return url
    return url.replace("://", f"://{role}:{password_of(role)}@", 1)


def settings_as(settings: Settings, role: str) -> Settings:
    """Give the same settings with a user of ``deploy/acl``."""
    return settings.model_copy(update={"redis_url": as_user(settings.redis_url, role)})


def as_owner(url: str) -> str:
    """Give the address without a user of ``deploy/acl``: the tests themselves may do everything."""
    for role in ROLES:
        url = url.replace(f"//{role}:{password_of(role)}@", "//", 1)
    return url
