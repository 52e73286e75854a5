"""Processes that a test starts, pauses and kills, with their output in a file."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from typing import TYPE_CHECKING

from relay.lifeline import Lifeline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

EXIT_DEADLINE_S = 30.0


class ManagedProcess:
    """One child process, which ends with this one. Its output goes to ``log_path``.

    Args:
        command: What to run.
        environment: All of its environment.
        folder: Its current folder.
        log_path: Where stdout and stderr go, also over several starts.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log_path: Path,
    ) -> None:
        self.log_path = log_path
        self._command = list(command)
        self._environment = dict(environment)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: Lifeline | None = None

    @property
    def pid(self) -> int:
        """The process id; also of a process that has ended, until the next start."""
        if self._process is None:
            raise RuntimeError("the process has not been started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended; a paused process is running."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        """All output so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        """Start it; whether it serves is for the caller to find out."""
        if self.is_running:
            raise RuntimeError("the process is running already")
        self._release()
        with self.log_path.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must reach pytest first.
            self._process = subprocess.Popen(  # noqa: S603 (the test says what to run)
                self._command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Nothing of a test outlives it, even if pytest itself is killed.
        self._lifeline = Lifeline.for_process_group(self._process.pid, grace_s=1)

    def pause(self) -> None:
        """Freeze it (SIGSTOP): its sockets stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def ask_to_end(self) -> None:
        """Send SIGTERM and do not wait."""
        self._signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Kill it (SIGKILL) and wait until it is gone."""
        if self.is_running:
            self._signal(signal.SIGKILL)
        await self.wait()

    async def terminate(self, deadline_s: float = EXIT_DEADLINE_S) -> int:
        """Ask it to end, wait until it has, and give the exit code."""
        self.ask_to_end()
        return await self.wait(deadline_s)

    async def wait(self, deadline_s: float = EXIT_DEADLINE_S) -> int:
        """Wait for its end and give the exit code."""
        if self._process is None:
            raise RuntimeError("the process has not been started")
        code = await asyncio.to_thread(self._process.wait, deadline_s)
        self._release()
        return code

    def end_blocking(self) -> None:
        """Kill it, whatever its state, and reap it."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(EXIT_DEADLINE_S)
        self._release()

    def _release(self) -> None:
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            lifeline.release()

    def _signal(self, number: signal.Signals) -> None:
        if not self.is_running or self._process is None:
            raise RuntimeError("the process is not running")
        self._process.send_signal(number)
