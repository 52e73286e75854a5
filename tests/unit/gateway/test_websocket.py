"""Which upgrades are taken as h11 read them; what the others get is tested on real sockets."""

from __future__ import annotations

import h11
import pytest

from gateway.websocket import MAX_HEADERS, MAX_LINE_BYTES, can_read


def upgrade(
    *headers: tuple[str, bytes], target: str = "/v1/ws", method: str = "GET"
) -> h11.Request:
    return h11.Request(method=method, target=target, headers=[("Host", "x"), *headers])


def test_usual_upgrade_is_taken() -> None:
    assert can_read(upgrade(("Upgrade", b"websocket"), ("Cookie", b"a=1;\tb=2")))


@pytest.mark.parametrize(
    "request_",
    [
        upgrade(method="POST"),
        upgrade(target="/v1/ws?x=" + "x" * MAX_LINE_BYTES),
        upgrade(("X-Long", b"x" * MAX_LINE_BYTES)),
        upgrade(*[("X-Many", b"x")] * MAX_HEADERS),
        upgrade(("Content-Length", b"5")),
        upgrade(("Transfer-Encoding", b"chunked")),
        upgrade(("X-Control", b"a\x01")),
        # Legal, but decoded by each version of the websockets library in its own way.
        upgrade(("Cookie", "place=café".encode())),
        upgrade(("Cookie", b"place=caf\xe9")),
    ],
    ids=["POST", "target", "long", "many", "body", "chunked", "control", "utf-8", "latin-1"],
)
def test_unusual_upgrade_goes_through_every_check(request_: h11.Request) -> None:
    assert not can_read(request_)
