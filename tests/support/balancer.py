"""The load balancer of docker-compose.yml as a process, with its own configuration file."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.redis_server import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
SOURCE = "127.0.0.2"
"""Where the balancer calls from, so that it can be told apart from the clients of a test."""

READY_DEADLINE_S = 10.0


def find_haproxy() -> str | None:
    """Give the haproxy on PATH, or where distributions put it."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


def configuration(port: int, gateways: Sequence[str]) -> str:
    """Give the deployed configuration with this machine's addresses instead of Docker's."""
    text = CONFIGURATION.read_text()
    text = re.sub(r"^resolvers docker\n(?:[ \t].*\n|\n)*", "", text, flags=re.MULTILINE)
    text = text.replace(" resolvers docker init-addr last,libc,none", f" source {SOURCE}")
    text, binds = re.subn(r"bind :8080", f"bind 127.0.0.1:{port}", text)
    for number, url in enumerate(gateways, 1):
        name = f"gateway-{number}"
        text = text.replace(f"server {name} {name}:8080", f"server {name} {url[len('http://') :]}")
    if binds != 1 or ":8080" in text or "docker" in text.partition("\n")[2]:
        raise AssertionError(f"deploy/haproxy.cfg has another form than this expects:\n{text}")
    return text


class Balancer:
    """A running balancer; a context manager that leaves no process behind."""

    def __init__(self, folder: Path, gateways: Sequence[str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._file = folder / "haproxy.cfg"
        self._file.write_text(configuration(self.port, gateways))
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        haproxy = find_haproxy()
        assert haproxy is not None
        self._process = subprocess.Popen(  # noqa: ASYNC220
            [haproxy, "-db", "-f", self._file],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(READY_DEADLINE_S):
            while not await self._is_ready():
                assert self._process.poll() is None, "haproxy ended"
                await asyncio.sleep(0.05)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in await reader.read()
        finally:
            writer.close()
