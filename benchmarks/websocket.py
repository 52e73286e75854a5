"""The client's side of WebSocket (RFC 6455) with no more than a benchmark needs."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
_ZERO_MASK = bytes(4)


def handshake(port: int, path: str, offer: str | None = None) -> bytes:
    """Give the request that opens a connection; ``offer`` is a list of subprotocols."""
    offered = f"Sec-WebSocket-Protocol: {offer}\r\n" if offer else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{offered}\r\n"
    ).encode()


def client_frame(opcode: int, payload: bytes) -> bytes:
    """Give a whole frame as clients send it. The mask is zero, which changes no byte."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return head + _ZERO_MASK + payload


def read_frames(buffer: bytearray) -> list[tuple[int, bytes]]:
    """Take all complete frames of a server off the buffer: opcode and payload."""
    frames: list[tuple[int, bytes]] = []
    at, size = 0, len(buffer)
    while size - at >= 2:
        length, head = buffer[at + 1] & 0x7F, 2
        if length == 126:
            if size - at < 4:
                break
            length, head = int.from_bytes(buffer[at + 2 : at + 4]), 4
        elif length == 127:
            if size - at < 10:
                break
            length, head = int.from_bytes(buffer[at + 2 : at + 10]), 10
        end = at + head + length
        if size < end:
            break
        frames.append((buffer[at] & 0x0F, bytes(buffer[at + head : end])))
        at = end
    del buffer[:at]
    return frames


class Refused(Exception):
    """The server did not upgrade the connection."""


class JsonSocket:
    """One connection over which JSON objects go both ways."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()
        self._frames: list[dict[str, Any]] = []

    @classmethod
    async def open(cls, port: int, path: str, offer: str | None = None) -> JsonSocket:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(handshake(port, path, offer))
        answer = await reader.readuntil(b"\r\n\r\n")
        status = answer.split(b"\r\n", 1)[0].decode()
        if " 101 " not in status:
            writer.close()
            raise Refused(status)
        return cls(reader, writer)

    def send(self, message: dict[str, Any]) -> None:
        self._writer.write(client_frame(TEXT, json.dumps(message).encode()))

    async def receive(self) -> dict[str, Any]:
        """Give the next object.

        Raises:
            ConnectionError: The connection was closed.
        """
        while not self._frames:
            chunk = await self._reader.read(1 << 16)
            if not chunk:
                raise ConnectionError("closed by the server")
            self._buffer += chunk
            for opcode, payload in read_frames(self._buffer):
                if opcode == TEXT:
                    self._frames.append(json.loads(payload))
                elif opcode == PING:
                    self._writer.write(client_frame(PONG, payload))
                elif opcode == CLOSE:
                    code = int.from_bytes(payload[:2])
                    raise ConnectionError(f"closed with {code}: {payload[2:].decode()}")
        return self._frames.pop(0)

    async def receive_until(self, kind: str) -> dict[str, Any]:
        """Give the next object of a type; what comes before it is dropped."""
        while True:
            message = await self.receive()
            if message.get("type") == kind:
                return message

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()
