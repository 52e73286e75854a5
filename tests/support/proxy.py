"""A TCP proxy that breaks connections the way networks do; it runs in a thread of its own.

A cut cable sends no reset: connections stay open and bytes vanish. A proxy in front of Redis can
also lose single pub/sub messages, or the answer to a command that was carried out.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

CHUNK_BYTES = 65_536
SMALL_BUFFER_BYTES = 4_096
"""Socket buffers where the rate is limited: a megabyte in a buffer is not a slow reader."""

SMALL_SEGMENT_BYTES = 536

_START_DEADLINE_S = 10.0
_Result = TypeVar("_Result")


def reply_end(data: bytes | bytearray, start: int = 0) -> int | None:
    """Give where the RESP2 reply that begins at ``start`` ends; None while it is incomplete."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, after = data[start : start + 1], line_end + 2
    if kind in b"+-:":
        return after
    length = int(data[start + 1 : line_end])
    if kind == b"$":
        end = after if length < 0 else after + length + 2
        return end if end <= len(data) else None
    if kind != b"*":
        raise ValueError(f"not RESP2: {bytes(data[start : start + 20])!r}")
    position = after
    for _ in range(length):
        inner_end = reply_end(data, position)
        if inner_end is None:
            return None
        position = inner_end
    return position


def payload_of(message: bytes) -> bytes:
    """Give the payload of a pub/sub message, its third element."""
    # *3, $7, message, then length and name of the channel, then length and bytes of the payload.
    parts = message.split(b"\r\n", 6)
    return parts[6][:-2]


@dataclass(eq=False)
class Link:
    """One proxied connection."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_pubsub: bool = False
    is_blackholed: bool = False
    loses_reply: bool = False
    pending: bytearray = field(default_factory=bytearray)

    def abort(self) -> None:
        """Reset both sides."""
        self.client.transport.abort()
        self.server.transport.abort()


class TcpProxy:
    """Passes connections on to one address, until told to do worse.

    Start and stop it with ``with``. Every method may be called from any thread and has taken
    effect when it returns.

    Args:
        port: Where to pass connections on to, on loopback.
        bytes_per_s: Most bytes towards each client, with small buffers; None is unlimited.
    """

    def __init__(self, port: int, *, bytes_per_s: float | None = None) -> None:
        self.port = 0
        self.passed = 0
        self._target = port
        self._bytes_per_s = bytes_per_s
        self._delay_s = 0.0
        self._links: set[Link] = set()
        self._takes_connections = True
        self._is_blackhole = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_START_DEADLINE_S):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    # --- What a test may do ---

    @property
    def url(self) -> str:
        """The proxy's address for clients of HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def cut(self, *, pubsub_only: bool = False) -> int:
        """Reset connections; new ones are passed on as before. Gives how many were cut."""
        return self._do(lambda: self._cut(pubsub_only))

    def refuse(self) -> None:
        """Reset all connections, and every new one at once."""

        def act() -> None:
            self._takes_connections = False
            self._cut(False)

        self._do(act)

    def accept(self) -> None:
        """Take new connections again, and pass bytes on in them."""

        def act() -> None:
            self._takes_connections = True
            self._is_blackhole = False

        self._do(act)

    def blackhole(self, *, pubsub_only: bool = False) -> int:
        """Swallow all bytes of the connections that exist, both ways, without a reset.

        Args:
            pubsub_only: Only of those with a subscription; otherwise new connections are
                swallowed too, until ``accept``.
        """

        def act() -> int:
            self._is_blackhole = not pubsub_only
            chosen = [link for link in self._links if link.is_pubsub or not pubsub_only]
            for link in chosen:
                link.is_blackholed = True
            return len(chosen)

        return self._do(act)

    def retarget(self, port: int) -> None:
        """Pass new connections on to another port, as a failover does."""
        self._set("_target", port)

    def delay(self, seconds: float) -> None:
        """Hold every piece of data back for so long, both ways."""
        self._set("_delay_s", seconds)

    def limit(self, bytes_per_s: float | None) -> None:
        """Change the rate towards each client."""
        self._set("_bytes_per_s", bytes_per_s)

    # --- The thread ---

    def _set(self, name: str, value: object) -> None:
        self._do(lambda: setattr(self, name, value))

    def _do(self, action: Callable[[], _Result]) -> _Result:
        async def act() -> _Result:
            return action()

        return self._await(act())

    def _await(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_DEADLINE_S)

    def _cut(self, pubsub_only: bool) -> int:
        chosen = [link for link in self._links if link.is_pubsub or not pubsub_only]
        for link in chosen:
            link.abort()
        return len(chosen)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _serve(self) -> None:
        listener = socket.socket()
        if self._bytes_per_s is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(self._accept, sock=listener)
        self.port = listener.getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._cut(False)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not self._takes_connections:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, server_writer, is_blackholed=self._is_blackhole)
        self._links.add(link)
        pumps = [
            asyncio.create_task(self._pump_up(link, reader, server_writer)),
            asyncio.create_task(self._pump_down(link, server_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if not link.is_blackholed:
                await self._close_gently(link)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            link.abort()
            self._links.discard(link)

    async def _close_gently(self, link: Link) -> None:
        """Pass an orderly end on, so that the last bytes are not overtaken by a reset."""
        for writer in (link.client, link.server):
            writer.close()
        for writer in (link.client, link.server):
            try:
                async with asyncio.timeout(1.0):
                    await writer.wait_closed()
            except (OSError, TimeoutError):
                continue

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        upstream = socket.socket()
        upstream.setblocking(False)
        if self._bytes_per_s is not None:
            # Before the connection is made: the window is agreed upon in the handshake.
            upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            # The server's kernel buffers some dozens of segments, and a segment on loopback has
            # 64 KiB: without this, megabytes wait where no application sees them.
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT_BYTES)
        try:
            await self._loop.sock_connect(upstream, ("127.0.0.1", self._target))
        except OSError:
            upstream.close()
            raise
        limit = SMALL_BUFFER_BYTES if self._bytes_per_s is not None else CHUNK_BYTES
        return await asyncio.open_connection(sock=upstream, limit=limit)

    async def _pump_up(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await _read(reader, CHUNK_BYTES):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            self._look_up(link, data)
            if not link.is_blackholed:
                writer.write(data)
                await _drain(writer)

    async def _pump_down(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            rate = self._bytes_per_s
            size = CHUNK_BYTES if rate is None else max(64, min(SMALL_BUFFER_BYTES, int(rate / 10)))
            data = await _read(reader, size)
            if not data:
                return
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            data = self._look_down(link, data)
            if data and not link.is_blackholed:
                writer.write(data)
                await _drain(writer)
                self.passed += len(data)
            if rate is not None:
                await asyncio.sleep(len(data) / rate)

    def _look_up(self, link: Link, data: bytes) -> None:
        """See what a client sends."""

    def _look_down(self, link: Link, data: bytes) -> bytes:
        """See what the server sends; gives what is passed on."""
        return data


class RedisProxy(TcpProxy):
    """Stands between a process and Redis, and understands as much RESP2 as it needs.

    Attributes:
        swallowed: The payloads of the live messages that were lost.
    """

    def __init__(self, port: int, *, seed: int = 0) -> None:
        super().__init__(port)
        self.swallowed: list[bytes] = []
        self._share = 0.0
        self._random = random.Random(seed)
        self._replies_to_lose = 0
        self._lost_command = b""

    @property
    def redis_url(self) -> str:
        """The proxy's address for clients of Redis."""
        return f"redis://127.0.0.1:{self.port}/0"

    def swallow_messages(self, share: float) -> None:
        """Lose this share of the live messages, silently. Other channels are left alone."""
        self._set("_share", share)

    def lose_next_reply(self, command: bytes = b"EVALSHA", count: int = 1) -> None:
        """Let Redis carry a command out, swallow the answer, and reset the connection."""

        def act() -> None:
            self._lost_command = command
            self._replies_to_lose = count

        self._do(act)

    @property
    def replies_to_lose(self) -> int:
        """How many answers are still to be lost."""
        return self._do(lambda: self._replies_to_lose)

    def _look_up(self, link: Link, data: bytes) -> None:
        if b"SUBSCRIBE" in data:
            link.is_pubsub = True
        if self._replies_to_lose and not link.is_pubsub and self._lost_command in data:
            self._replies_to_lose -= 1
            link.loses_reply = True

    def _look_down(self, link: Link, data: bytes) -> bytes:
        if link.loses_reply:
            link.abort()
            return b""
        if not link.is_pubsub:
            return data
        pending = link.pending
        pending += data
        kept: list[bytes] = []
        start = 0
        while (end := reply_end(pending, start)) is not None:
            reply = bytes(pending[start:end])
            if self._is_swallowed(reply):
                self.swallowed.append(payload_of(reply))
            else:
                kept.append(reply)
            start = end
            if start == len(pending):
                break
        del pending[:start]
        return b"".join(kept)

    def _is_swallowed(self, reply: bytes) -> bool:
        is_live = reply.startswith(b"*3\r\n$7\r\nmessage\r\n") and b"}:live\r\n" in reply[:400]
        return is_live and self._random.random() < self._share


async def _read(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.read(size)
    except OSError:
        return b""


async def _drain(writer: asyncio.StreamWriter) -> None:
    try:
        await writer.drain()
    except OSError:
        return
