"""What a reader at a terminal is told about the connection: each trouble once."""

from __future__ import annotations

from relay.cli.follow import Troubles
from relay.client import Connected, Degraded, Disconnected, SequenceHole

BACK = Connected("e:1", True, "c", "gw-2", (), {})


def test_lost_connection_is_told_once_and_its_return() -> None:
    troubles = Troubles()
    assert troubles.tell(BACK) is None
    assert troubles.tell(Disconnected("drain", 10)) == "Connection lost (drain); trying again"
    assert troubles.tell(Disconnected("refused", 10)) is None
    assert troubles.tell(BACK) == "Connected again, to gw-2"
    assert troubles.tell(Disconnected("drain", 10)) is not None


def test_holes_and_outages_are_told() -> None:
    troubles = Troubles()
    assert troubles.tell(SequenceHole("r1", 3, 6)) == "Events 3 to 5 of r1 did not arrive"
    assert "Redis" in (troubles.tell(Degraded("Redis")) or "")
    assert "again" in (troubles.tell(Degraded(None)) or "")
