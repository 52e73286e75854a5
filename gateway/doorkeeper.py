"""Who is at the door and has not shown a valid token yet: bounded, in number and in what it costs.

Nobody needs a token to open a socket, to send half a request, or to guess tokens. So what each of
them may take is limited before anything is looked up, and the memory for it is bounded.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Protocol

from relay.errors import RequestRefused, TokenRejected

Network = IPv4Network | IPv6Network

MAX_CHECKS = 512
"""Credentials that are looked up at the same time; each may wait for Redis or for an issuer."""

MAX_ADDRESSES = 10_000
"""Addresses whose failures are remembered; the one that failed longest ago is forgotten."""

CHECK_RETRY_MS = 2_000

_IN_BRACKETS_OR_WITH_PORT = re.compile(r"\[([^\[\]]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+")


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """What clients may do before they are known.

    Attributes:
        waiting: Sockets without a whole request, of all clients.
        waiting_per_address: Of one address; a trusted proxy has many clients and is exempt.
        failures_per_minute: Credentials of one address that turn out to be worth nothing; so many
            may come at once.
        trusted_proxies: Whose ``X-Forwarded-For`` is believed.
    """

    waiting: int
    waiting_per_address: int
    failures_per_minute: int
    trusted_proxies: tuple[Network, ...] = ()


def address_of(peer: str | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """Give the address that a request comes from, as far as that can be believed.

    Each proxy appends the address that it was called from. So the list is read from its end, for as
    long as the one who wrote the entry is trusted; anything before that may be made up.

    Args:
        peer: Who holds the other end of the socket; None on a Unix socket.
        forwarded: The values of ``X-Forwarded-For``, in order.
        trusted: The proxies.

    Returns:
        An address without a port; of IPv6 the /64 network, which one client has whole.
    """
    address = _parsed(peer or "")
    if address is None:
        return peer or ""
    entries = [entry.strip() for value in forwarded for entry in value.split(",")]
    while entries and any(address in network for network in trusted):
        before = _parsed(_without_port(entries.pop()))
        if before is None:
            break
        address = before
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, 64), strict=False))
    return str(address)


def is_trusted(peer: str | None, trusted: Sequence[Network]) -> bool:
    """Tell whether the other end of a socket is a proxy that is trusted."""
    address = _parsed(peer or "")
    return address is not None and any(address in network for network in trusted)


def _without_port(entry: str) -> str:
    """Give the address in an entry: some proxies append the client's port, and put IPv6 in [ ]."""
    match = _IN_BRACKETS_OR_WITH_PORT.fullmatch(entry)
    return (match[1] or match[2]) if match else entry


# Who connects does so again, and each proxy's address stands in each of its requests.
@lru_cache(maxsize=256)
def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class Waiting(Protocol):
    """A socket that has not sent a whole request."""

    def turn_away(self) -> None:
        """Close it, to make room for a newer one."""


class Lobby:
    """The sockets without a whole request. When one too many comes, the oldest has to go.

    The oldest, not the newest: whoever means it sends a request at once, and whoever only holds
    sockets open thus loses them to those who come after.
    """

    def __init__(self, limits: DoorLimits) -> None:
        self._limits = limits
        self._waiting: OrderedDict[Waiting, str | None] = OrderedDict()
        self._by_address: dict[str, OrderedDict[Waiting, None]] = {}
        self.turned_away = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, socket: Waiting, peer: str | None) -> None:
        """Take note of a socket that has been accepted, or waits for its next request."""
        key = None if is_trusted(peer, self._limits.trusted_proxies) else address_of(peer, (), ())
        if socket in self._waiting:
            return
        own = self._by_address.get(key or "", OrderedDict())
        if len(own) >= self._limits.waiting_per_address:
            self._turn_away(next(iter(own)))
        elif len(self._waiting) >= self._limits.waiting:
            self._turn_away(next(iter(self._waiting)))
        self._waiting[socket] = key
        if key is not None:
            self._by_address.setdefault(key, OrderedDict())[socket] = None

    def leave(self, socket: Waiting) -> None:
        """A request is here whole, or the socket is gone; harmless if it has left already."""
        key = self._waiting.pop(socket, None)
        if key is not None:
            own = self._by_address[key]
            del own[socket]
            if not own:
                del self._by_address[key]

    def _turn_away(self, socket: Waiting) -> None:
        self.leave(socket)
        self.turned_away += 1
        socket.turn_away()


class Doorkeeper:
    """Bounds the checks of credentials, and the failures of each address.

    An address that fails too often gets 429 for what would cost a trip to Redis, and for tokens
    that are worth nothing. A valid token gets in all the same: many users may share an address
    with somebody who guesses, or be behind a proxy that is not configured.

    Args:
        limits: How much.
        now_s: A clock that never jumps.
    """

    def __init__(self, limits: DoorLimits, now_s: Callable[[], float]) -> None:
        self._limits = limits
        self._now_s = now_s
        self._checks = 0
        self._per_s = limits.failures_per_minute / 60
        self._burst = float(limits.failures_per_minute)
        # By address: failures not yet forgiven, and when they were counted.
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()

    @property
    def checks(self) -> int:
        """Credentials that are being checked now."""
        return self._checks

    @property
    def addresses(self) -> int:
        """Addresses whose failures are remembered."""
        return len(self._failures)

    def address_of(self, peer: str | None, forwarded: Sequence[str]) -> str:
        """Give the address that a request comes from."""
        return address_of(peer, forwarded, self._limits.trusted_proxies)

    @contextmanager
    def checking(self, address: str, *, is_costly: bool) -> Iterator[None]:
        """Check a credential within the block; its failure is counted.

        Args:
            address: Whose.
            is_costly: Whether the check needs Redis.

        Raises:
            RequestRefused: ``rate_limited``: the address fails too often; ``unavailable``: too
                many checks are under way.
        """
        if is_costly and self._is_over(address):
            raise self._too_often(address)
        if self._checks >= MAX_CHECKS:
            raise RequestRefused(
                "unavailable",
                "Too many clients are being let in at this moment.",
                suggestions=("Try again in a few seconds.",),
                retry_after_ms=CHECK_RETRY_MS,
            )
        self._checks += 1
        try:
            yield
        except (TokenRejected, RequestRefused) as error:
            if isinstance(error, TokenRejected) or error.code == "invalid_token":
                self.note_failure(address)
                if self._is_over(address):
                    raise self._too_often(address) from None
            raise
        finally:
            self._checks -= 1

    def note_failure(self, address: str) -> None:
        """Count a credential that is worth nothing."""
        if not address:
            return
        self._failures[address] = (self._left(address) + 1, self._now_s())
        self._failures.move_to_end(address)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)

    def _left(self, address: str) -> float:
        count, at_s = self._failures.get(address, (0.0, 0.0))
        return max(0.0, count - (self._now_s() - at_s) * self._per_s)

    def _is_over(self, address: str) -> bool:
        return address in self._failures and self._left(address) > self._burst

    def _too_often(self, address: str) -> RequestRefused:
        wait_s = (self._left(address) - self._burst) / self._per_s
        return RequestRefused(
            "rate_limited",
            "Too many tokens and tickets from this address were not valid.",
            suggestions=(
                "Wait, then connect with a valid token.",
                "Behind a proxy, set RELAY_TRUSTED_PROXIES, so that its clients are told apart.",
            ),
            retry_after_ms=max(1_000, int(wait_s * 1000)),
        )
