"""The usual way: a Starlette WebSocket route in front of redis-py's PubSub.

As in the guides: each connection subscribes to its user's channel and passes on what comes.
No tokens, positions, history, budgets or metrics. Prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

import redis.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect


def make_app(redis_port: int) -> Starlette:
    client = redis.asyncio.Redis(port=redis_port, max_connections=20_000)

    async def forward(websocket: WebSocket, pubsub: redis.asyncio.client.PubSub) -> None:
        async for message in pubsub.listen():
            if message["type"] == "message":
                await websocket.send_text(message["data"].decode())

    async def serve_user(websocket: WebSocket) -> None:
        async with client.pubsub() as pubsub:
            await pubsub.subscribe(websocket.path_params["channel"])
            await websocket.accept()
            forwarding = asyncio.create_task(forward(websocket, pubsub))
            try:
                while True:
                    await websocket.receive_text()
            except WebSocketDisconnect:
                pass
            finally:
                forwarding.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await forwarding

    return Starlette(routes=[WebSocketRoute("/ws/{channel}", serve_user)])


def main() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(make_app(int(sys.argv[1])), log_level="warning", access_log=False)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
