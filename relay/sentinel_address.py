"""The address of a Redis behind Sentinel. Pure."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

SENTINEL_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Schemes of an address that names Sentinels, and those of the Redis that they name."""

SENTINEL_PORT = 26379
FORM = "redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/database]"


class SentinelAddress(NamedTuple):
    """What an address says.

    Attributes:
        sentinels: Host and port of each.
        service: What they call the master.
        redis_url: The rest of the address, as of a Redis at the first host: account, database, TLS.
        account: What Sentinels themselves want, if anything: ``username`` and ``password``.
    """

    sentinels: tuple[tuple[str, int], ...]
    service: str
    redis_url: str
    account: dict[str, str]


def parse_sentinel_url(url: str) -> SentinelAddress:
    """Read an address of the form ``FORM``.

    A Sentinel's own account is given as ``sentinel_username=`` and ``sentinel_password=``; all
    other parameters are those of ``redis://`` and ``rediss://``.

    Raises:
        ValueError: Something is missing or malformed; the text says what.
    """
    parts = urlsplit(url)
    if parts.scheme not in SENTINEL_SCHEMES:
        raise ValueError(f"an address of Sentinels has the form {FORM}")
    user_info, has_account, hosts = parts.netloc.rpartition("@")
    sentinels = tuple(_host_and_port(text) for text in hosts.split(","))
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError(f"the service's name is missing: {FORM}")
    if database and not database.isdecimal():
        raise ValueError("the part after the service's name is the database's number")
    account: dict[str, str] = {}
    query: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in ("sentinel_username", "sentinel_password"):
            account[name.removeprefix("sentinel_")] = value
        else:
            query.append((name, value))
    first_host = hosts.split(",")[0]
    redis_url = urlunsplit(
        (
            SENTINEL_SCHEMES[parts.scheme],
            f"{user_info}{has_account}{first_host}",
            f"/{database or 0}",
            urlencode(query),
            "",
        )
    )
    return SentinelAddress(sentinels, service, redis_url, account)


def _host_and_port(text: str) -> tuple[str, int]:
    try:
        place = urlsplit(f"//{text}")
        host, port = place.hostname, place.port
    except ValueError:
        raise ValueError(f"{text!r} is not a Sentinel's host and port") from None
    if not host:
        raise ValueError("a Sentinel's host is missing")
    return host, port or SENTINEL_PORT
