"""Who is not known yet: how many there may be, and how often they may fail."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from gateway import doorkeeper
from gateway.doorkeeper import Doorkeeper, DoorLimits, Lobby, address_of
from relay.errors import RequestRefused, TokenRejected

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        # Whoever is no proxy of ours may write what they like.
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.1.1.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.1.1.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        ("10.1.1.1", ["1.1.1.1", "198.51.100.1, 10.2.2.2"], "198.51.100.1"),
        ("10.1.1.1", ["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
        ("10.1.1.1", [], "10.1.1.1"),
        ("10.1.1.1", ["198.51.100.1, unknown"], "10.1.1.1"),
        ("10.1.1.1", ["198.51.100.1, "], "10.1.1.1"),
        ("::ffff:10.1.1.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        # One customer's network: its addresses cost nothing.
        ("2001:db8:1:2:3:4:5:6", [], "2001:db8:1:2::/64"),
        ("fd00::1", ["2001:db8:1:2::77"], "2001:db8:1:2::/64"),
        # Some proxies write the port too, such as the application gateway of Azure.
        ("10.1.1.1", ["198.51.100.1:5678"], "198.51.100.1"),
        ("10.1.1.1", ["198.51.100.1:5678, 10.2.2.2:80"], "198.51.100.1"),
        ("fd00::1", ["[2001:db8:1:2::77]:443"], "2001:db8:1:2::/64"),
        ("fd00::1", ["[2001:db8:1:2::77], [fd00::2]:80"], "2001:db8:1:2::/64"),
        ("10.1.1.1", ["198.51.100.1:http"], "10.1.1.1"),
        ("10.1.1.1", ["[198.51.100.1"], "10.1.1.1"),
        (None, ["198.51.100.1"], ""),
        ("a unix socket", ["198.51.100.1"], "a unix socket"),
    ],
)
def test_address_is_believed_as_far_as_proxies_are_trusted(
    peer: str | None, forwarded: list[str], address: str
) -> None:
    assert address_of(peer, forwarded, PROXIES) == address


class Socket:
    def __init__(self) -> None:
        self.is_turned_away = False

    def turn_away(self) -> None:
        self.is_turned_away = True


def lobby(waiting: int, per_address: int) -> Lobby:
    return Lobby(DoorLimits(waiting, per_address, 60, PROXIES))


def test_oldest_socket_has_to_go_when_one_too_many_waits() -> None:
    room = lobby(3, 3)
    sockets = [Socket() for _ in range(6)]
    for number, socket in enumerate(sockets):
        room.enter(socket, f"192.0.2.{number}")
        room.enter(socket, f"192.0.2.{number}")
    assert [socket.is_turned_away for socket in sockets] == [True] * 3 + [False] * 3
    assert (len(room), room.turned_away) == (3, 3)
    for socket in sockets:
        room.leave(socket)
        room.leave(socket)
    assert len(room) == 0
    assert not room._by_address


def test_address_that_holds_many_sockets_loses_its_own() -> None:
    room = lobby(10, 2)
    patient = Socket()
    room.enter(patient, "192.0.2.1")
    flood = [Socket() for _ in range(8)]
    for socket in flood:
        room.enter(socket, "192.0.2.2")
    assert not patient.is_turned_away
    assert [socket.is_turned_away for socket in flood] == [True] * 6 + [False] * 2


def test_proxy_may_hold_as_many_sockets_as_its_clients() -> None:
    room = lobby(5, 2)
    sockets = [Socket() for _ in range(5)]
    for socket in sockets:
        room.enter(socket, "10.0.0.1")
    assert not any(socket.is_turned_away for socket in sockets)
    assert not room._by_address


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def fail(door: Doorkeeper, address: str, *, is_costly: bool = False) -> str:
    try:
        with door.checking(address, is_costly=is_costly):
            raise TokenRejected("worth nothing")
    except TokenRejected:
        return "rejected"
    except RequestRefused as error:
        return "too often" if error.http_status == 429 and error.retry_after_ms else str(error)


def test_address_that_fails_too_often_is_told_to_wait_and_forgiven_in_time() -> None:
    clock = Clock()
    door = Doorkeeper(DoorLimits(1, 1, 6), clock)
    assert [fail(door, "a") for _ in range(8)] == ["rejected"] * 6 + ["too often"] * 2
    with pytest.raises(RequestRefused), door.checking("a", is_costly=True):
        pytest.fail("the look-up was made")
    # A good token is let in from there all the same, and others are not concerned.
    with door.checking("a", is_costly=False):
        pass
    assert fail(door, "b") == "rejected"
    clock.now_s += 30
    with door.checking("a", is_costly=True):
        pass
    assert fail(door, "a") == "rejected"
    assert door.checks == 0


def test_tickets_that_are_not_valid_count_and_other_refusals_do_not() -> None:
    door = Doorkeeper(DoorLimits(1, 1, 1), Clock())
    for _ in range(5):
        with pytest.raises(RequestRefused, match="away"), door.checking("a", is_costly=True):
            raise RequestRefused("unavailable", "away")
    assert door.addresses == 0
    for status in (401, 429):
        with pytest.raises(RequestRefused) as caught, door.checking("a", is_costly=True):
            raise RequestRefused("invalid_token")
        assert caught.value.http_status == status


def test_memory_for_addresses_and_the_checks_at_once_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doorkeeper, "MAX_ADDRESSES", 5)
    monkeypatch.setattr(doorkeeper, "MAX_CHECKS", 1)
    door = Doorkeeper(DoorLimits(1, 1, 2), Clock())
    for number in range(50):
        fail(door, f"192.0.2.{number}")
    assert door.addresses == 5
    fail(door, "")
    assert door.addresses == 5
    with door.checking("a", is_costly=False):
        with pytest.raises(RequestRefused) as caught, door.checking("b", is_costly=False):
            pytest.fail("one too many")
        assert caught.value.http_status == 503
        assert caught.value.retry_after_ms
