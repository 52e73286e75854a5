"""``relay up`` as a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import psutil

RELAY = Path(sys.executable).parent / "relay"
READY_DEADLINE_S = 60.0
END_DEADLINE_S = 40.0


def clean_environment(**variables: str) -> dict[str, str]:
    """Give this process's environment without settings of the relay, for wide output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return kept | {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"} | variables


class RelayUp:
    """A running ``relay up``; a context manager that leaves no process behind.

    Args:
        folder: The current folder of the command; holds its data by default.
        arguments: Of ``relay up``.
        variables: Environment variables beside the usual ones.
    """

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self.folder = folder
        self._output = folder / f"up-{time.monotonic_ns()}.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [RELAY, "up", *arguments],
                cwd=folder,
                env=clean_environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Signals to it must not reach the tests.
                start_new_session=True,
            )
        self.parts: list[psutil.Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.see_parts()
        self.process.kill()
        self.process.wait()
        for part in self.parts:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        psutil.wait_procs(self.parts, timeout=END_DEADLINE_S)

    @property
    def output(self) -> str:
        """What it has printed so far, on both streams."""
        return self._output.read_text(errors="replace")

    def wait_until_ready(self) -> Self:
        """Wait for the summary; fail with the output if it does not come."""
        self.wait_until_printed("Ctrl-C stops everything")
        self.see_parts()
        return self

    def wait_until_printed(self, words: str) -> None:
        """Wait until its output contains ``words``."""
        deadline = time.monotonic() + READY_DEADLINE_S
        while words not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait_until_ended(self) -> int:
        """Wait for its end; give the exit code."""
        return self.process.wait(END_DEADLINE_S)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal, wait for the end, give the exit code."""
        self.see_parts()
        self.process.send_signal(number)
        return self.wait_until_ended()

    def see_parts(self) -> None:
        """Remember the processes that it has started by now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            known = {part.pid for part in self.parts}
            started = psutil.Process(self.process.pid).children(recursive=True)
            self.parts += [part for part in started if part.pid not in known]

    def part(self, words: str) -> psutil.Process:
        """Give the part whose command line contains ``words``."""
        for part in self.parts:
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(part.cmdline())
                if words in command and not command.startswith("/bin/sh"):
                    return part
        raise AssertionError(f"no part with {words!r} in {self.parts}")

    def wait_until_parts_ended(self) -> list[str]:
        """Wait for the end of everything that it has started; give what still runs."""
        _, alive = psutil.wait_procs(self.parts, timeout=END_DEADLINE_S)
        return [" ".join(process.cmdline()) for process in alive]

    def links(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Give (user, gateway) → (address, token) of the links that it has printed."""
        found = re.findall(
            r"(\w+) on gateway (\d+)\s+(http://127\.0\.0\.1:\d+)/#token=(\S+)", self.output
        )
        return {(user, int(number)): (address, token) for user, number, address, token in found}


def run_relay(
    *arguments: str,
    folder: Path | None = None,
    timeout_s: float = 60.0,
    stdin: str = "",
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a ``relay`` command to its end."""
    return subprocess.run(
        [RELAY, *arguments],
        cwd=folder,
        env=clean_environment(**variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
