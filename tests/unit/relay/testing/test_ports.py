"""Ports for servers that tests start, stop and start again."""

from __future__ import annotations

import socket

import pytest

from relay.testing.redis_server import free_port


@pytest.mark.parametrize("together", [1, 3])
def test_free_ports_can_be_bound(together: int) -> None:
    first = free_port(together=together)
    for port in range(first, first + together):
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
            server.listen()


def test_free_port_is_none_of_those_for_outgoing_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given_by_the_kernel = server.getsockname()[1]
    assert all(free_port() < given_by_the_kernel for _ in range(20))


def test_free_port_is_never_a_taken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port(together=2)
    monkeypatch.setattr("relay.testing.redis_server.LOWEST_PORT", first)
    monkeypatch.setattr("relay.testing.redis_server._first_outgoing_port", lambda: first + 2)
    with socket.create_server(("127.0.0.1", first)):
        assert free_port() == first + 1
    with (
        socket.create_server(("127.0.0.1", first + 1)),
        pytest.raises(OSError, match="No free TCP port was found"),
    ):
        free_port(together=2)
