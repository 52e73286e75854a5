"""What a tick writes: one write for each socket, in order, of frames that were built once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from gateway.direct import DirectTransport, TickWriter
from gateway.metrics import GatewayMetrics
from gateway.wire import text_frame
from relay.codec import Publication
from relay.events import Kind


class Socket:
    """Takes everything at once, and notes each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def set_write_buffer_limits(self, *, high: int, low: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


class Silent:
    """A connection above that is told nothing of interest."""

    has_room = True

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def open_transport(socket: Socket, ticks: TickWriter) -> DirectTransport:
    transport = DirectTransport(
        cast("asyncio.Transport", socket),
        Silent(),
        ticks,
        set(),
        max_bytes=1_000,
        budget_bytes=1_000_000,
    )
    transport.begin(b"", is_clogged=False)
    return transport


async def test_a_tick_is_one_write_for_each_socket_in_order() -> None:
    metrics = GatewayMetrics()
    ticks = TickWriter(metrics)
    sockets = [Socket(), Socket()]
    tabs = [open_transport(socket, ticks) for socket in sockets]
    events = [
        Publication(offset, offset, Kind.EVENT, "run_1", b'{"type":"custom"}')
        for offset in range(1, 6)
    ]
    for event in events:
        for tab in tabs:
            tab.write(event)
    assert sockets[0].writes == sockets[1].writes == []

    await asyncio.sleep(0)

    frames = [
        text_frame(b'{"offset":%d,"seq":%d,"type":"custom"}' % (offset, offset))
        for offset in range(1, 6)
    ]
    assert sockets[0].writes == sockets[1].writes == [b"".join(frames)]
    assert metrics.delivered_events == metrics.sent_frames == 10


async def test_tabs_share_a_frame_that_was_built_once() -> None:
    ticks = TickWriter(GatewayMetrics())
    sockets = [Socket(), Socket()]
    tabs = [open_transport(socket, ticks) for socket in sockets]
    event = Publication(1, 1, Kind.EVENT, "run_1", b'{"type":"custom"}')
    for tab in tabs:
        tab.write(event)
    await asyncio.sleep(0)
    assert sockets[0].writes[0] is sockets[1].writes[0] is event.wire


async def test_what_comes_while_a_tick_is_written_waits_for_the_next() -> None:
    ticks = TickWriter(GatewayMetrics())
    socket = Socket()
    tab = open_transport(socket, ticks)
    for text in (b"{}", b"[]"):
        tab.send(text, "")
        await asyncio.sleep(0)
    assert socket.writes == [text_frame(b"{}"), text_frame(b"[]")]
