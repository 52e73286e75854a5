"""An address of Sentinels: what it gives, and what it says when it is wrong."""

import pytest

from relay.config import hide_password, load_settings
from relay.errors import ConfigurationError
from relay.sentinel_address import SentinelAddress, parse_sentinel_url


def test_everything_that_an_address_may_have() -> None:
    assert parse_sentinel_url(
        "rediss+sentinel://worker:p%40ss@a.example:26380,b.example,[::1]:7/main/2"
        "?ssl_ca_certs=%2Fca.pem&sentinel_username=watch&sentinel_password=s%26cret"
    ) == SentinelAddress(
        (("a.example", 26380), ("b.example", 26379), ("::1", 7)),
        "main",
        "rediss://worker:p%40ss@a.example:26380/2?ssl_ca_certs=%2Fca.pem",
        {"username": "watch", "password": "s&cret"},
    )


def test_the_least_that_an_address_has() -> None:
    address = parse_sentinel_url("redis+sentinel://localhost/mymaster")
    assert address == ((("localhost", 26379),), "mymaster", "redis://localhost/0", {})


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis+sentinel://localhost:26379", "the service's name is missing"),
        ("redis+sentinel://localhost:26379/", "the service's name is missing"),
        ("redis+sentinel:///mymaster", "host is missing"),
        ("redis+sentinel://a:1,,b:2/mymaster", "host is missing"),
        ("redis+sentinel://a:port/mymaster", "'a:port' is not a Sentinel's host and port"),
        ("redis+sentinel://a:99999/mymaster", "'a:99999' is not a Sentinel's host and port"),
        ("redis+sentinel://a/mymaster/first", "the database's number"),
    ],
)
def test_a_malformed_address_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_sentinel_url(url)
    with pytest.raises(ConfigurationError, match=reason):
        load_settings(env_file=None, redis_url=url)


def test_another_scheme_is_refused_with_the_form() -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel://\[user"):
        parse_sentinel_url("redis://localhost/0")


def test_no_password_is_shown() -> None:
    shown = hide_password("redis+sentinel://u:one@a:1,b:2/m?sentinel_password=two")
    assert shown == "redis+sentinel://u:***@a:1,b:2/m?sentinel_password=***"
