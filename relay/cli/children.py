"""The processes that ``relay up`` starts: their output, their readiness, their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import orjson

from relay.lifeline import Lifeline

_KEPT_LINES = 40
_CHUNK_BYTES = 65_536
_MAX_LINE_BYTES = 1_048_576


class Child:
    """A ``relay`` command as a process of its own.

    It is in a session of its own, so that Ctrl-C in the terminal reaches its parent only, which
    ends everything in order; and it ends when its parent is killed.

    Attributes:
        name: What people call it.
        said: The names of the log events that it has written.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        on_line: Callable[[Child, str], None],
    ) -> None:
        """Prepare a child; nothing is started yet.

        Args:
            name: What people call it.
            arguments: Of the command ``relay``.
            variables: Environment variables beside those of this process.
            on_line: Called with each line of its output.
        """
        self.name = name
        self.said: set[str] = set()
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._arguments = arguments
        self._variables = variables
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: Lifeline | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Start the process."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            # Without -P, a file of the user's current folder could stand in for any module.
            "-P",
            "-m",
            "relay",
            *self._arguments,
            env={**os.environ, **self._variables},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._lifeline = Lifeline.for_process_group(self._process.pid)
        if self._process.stdout is not None:
            self._reading = asyncio.create_task(self._read(self._process.stdout))

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code; negative: the signal that ended it."""
        return self._process.returncode if self._process else None

    async def wait(self) -> None:
        """Return when it has ended and its last words are read."""
        if self._process is not None:
            await self._process.wait()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    async def wait_until_said(self, event: str) -> None:
        """Return when it has logged ``event``."""
        while event not in self.said:
            self._changed.clear()
            await self._changed.wait()

    async def terminate(self, grace_s: float) -> None:
        """Ask it to end; kill it when the time is over."""
        if self.is_running:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.wait()
        self.kill()
        await self.wait()
        if self._lifeline is not None:
            self._lifeline.release()

    def kill(self) -> None:
        """End it at once, with whatever it has started itself."""
        if self.is_running:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _read(self, output: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await output.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            # An agent may print megabytes without a line break.
            rest = rest[-_MAX_LINE_BYTES:]
            for line in lines:
                self._take(line)
        if rest:
            self._take(rest)

    def _take(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        if (event := log_event(line)) is not None:
            self.said.add(str(event["event"]))
            self._changed.set()
        self.last_lines.append(line)
        self._on_line(self, line)


def log_event(line: str) -> dict[str, object] | None:
    """Give the fields of a log line; None for whatever else a process prints."""
    if not line.startswith("{"):
        return None
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) and "event" in fields else None


def readable(line: str) -> str:
    """Give a line of output as people read it: ``12:00:00 info gateway_ready port=8080``."""
    fields = log_event(line)
    if fields is None:
        return line
    time = str(fields.pop("timestamp", ""))[11:19]
    level = fields.pop("level", "")
    event = fields.pop("event")
    exception = fields.pop("exception", None)
    rest = " ".join(f"{name}={value}" for name, value in fields.items())
    text = " ".join(str(part) for part in (time, level, event, rest) if part)
    return f"{text}\n{exception}" if exception else text
