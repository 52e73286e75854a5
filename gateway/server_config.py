"""What the protocols below ASGI are given."""

from __future__ import annotations

import uvicorn

from gateway.doorkeeper import Lobby
from gateway.metrics import GatewayMetrics


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration, with the gateway's own parts.

    Attributes:
        lobby: Bounds the sockets without a whole request.
        metrics: Counts what is refused before an application hears of it.
    """

    lobby: Lobby | None = None
    metrics: GatewayMetrics | None = None
