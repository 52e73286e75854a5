"""Ports for servers that tests start, stop and start again."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from relay.testing.redis_server import free_port


@pytest.mark.parametrize("together", [1, 3])
def test_free_ports_can_be_bound(together: int) -> None:
    first = free_port(together=together)
    for port in range(first, first + together):
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
            server.listen()


def test_free_port_is_none_of_those_for_outgoing_connections(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ports = tmp_path / "ip_local_port_range"
    monkeypatch.setattr("relay.testing.redis_server.OUTGOING_PORTS", ports)
    for text, first in (("30000\t60999\n", 30_000), ("1024 65535\n", 25_000)):
        ports.write_text(text)
        assert all(20_000 <= free_port() < first for _ in range(20))


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
