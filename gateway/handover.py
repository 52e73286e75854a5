"""Carrying out a drain: connections are asked to come back elsewhere, then closed, paced."""

from __future__ import annotations

import asyncio

import structlog

from gateway.connection_pool import WebSocketConnectionPool
from gateway.drain import timetable
from gateway.server import Listener

FLUSH_LIMIT_S = 2.0
"""What a drained client gets to answer the close."""

_LOOK_EVERY_S = 0.05

log = structlog.stdlib.get_logger(__name__)


async def hand_over(pool: WebSocketConnectionPool, listener: Listener) -> None:
    """Hand all connections over; return when the clients have left, or have had their time.

    A listener that is forced to exit is left at once.
    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    connections = tuple(pool)
    log.info("draining", connections=len(connections))
    for connection, step in zip(connections, timetable(len(connections)), strict=True):
        wait_s = began_s + step.at_ms / 1000 - loop.time()
        if wait_s > 0 and not listener.force_exit:
            await asyncio.sleep(wait_s)
        connection.drain(step.after_ms)
    deadline_s = loop.time() + FLUSH_LIMIT_S
    # uvicorn's own close, which follows, cuts off a peer that has not answered yet.
    while listener.server_state.connections and not listener.force_exit:
        if loop.time() >= deadline_s:
            return
        await asyncio.sleep(_LOOK_EVERY_S)
