"""Starts the whole product as a newcomer does, asks it one question, and ends it with Ctrl-C.

By default it starts ``make run`` in this checkout; with ``--up`` the ``relay up`` of an
installation. No Docker engine can be reached from inside. Exits with 0 only if every step
worked and no process is left. Standard library only: nothing but Python has to be there.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
START_DEADLINE_S = 600.0  # With an installation of all dependencies inside.
STOP_DEADLINE_S = 30.0
QUESTION = "How does a client resume after a lost connection?"
LINK = re.compile(r"(http://\S+)/#token=(\S+)")
MARK = "RELAY_TEST_SMOKE"


class SmokeFailed(Exception):
    """A step did not do what it must."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[smoke] {text}", flush=True)


class Started:
    """The product under test: its output, and every process that belongs to it."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        self.lines: list[str] = []
        self._fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A session of its own, as a terminal gives it: Ctrl-C goes to all of its group.
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def await_links(self) -> list[tuple[str, str]]:
        """Give (address, token) of each printed link, when the summary is complete."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            try:
                line = self._fresh.get(timeout=1)
            except queue.Empty:
                continue
            if line is None:
                raise SmokeFailed(
                    f"it ended with exit code {self.process.wait()} before it was ready"
                )
            if "Ctrl-C" in line:
                return [match for text in self.lines for match in LINK.findall(text)]
        raise SmokeFailed(f"it printed no address within {START_DEADLINE_S:.0f} s")

    def interrupt(self) -> int:
        """Send Ctrl-C; give the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise SmokeFailed(f"it did not end within {STOP_DEADLINE_S:.0f} s of Ctrl-C") from error

    def processes(self) -> dict[int, str]:
        """Give the processes that were started from it and still exist, wherever they went."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # Ended meanwhile, or somebody else's.
            if self._mark.encode() in environment:
                found[int(folder.name)] = command
        return found

    def kill(self) -> None:
        """End whatever is left, so that a failure leaves the machine clean."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            # A log is no place for a token, not even for that of a stack about to end.
            print("    " + re.sub(r"#token=\S+", "#token=…", line), end="", flush=True)
            self._fresh.put(line)
        self._fresh.put(None)


@contextmanager
def started(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[Started]:
    """Start the product; make sure that it is gone afterwards."""
    product = Started(command, folder, environment)
    try:
        yield product
    finally:
        product.kill()


def get(url: str) -> tuple[int, str, str]:
    """Give status, content type and body."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def check_gateway(address: str) -> None:
    """Make sure that a gateway is ready and serves the page."""
    status, _, _ = get(f"{address}/readyz")
    if status != 200:
        raise SmokeFailed(f"{address}/readyz answers {status}")
    status, kind, body = get(f"{address}/")
    if status != 200 or not kind.startswith("text/html") or "<html" not in body:
        raise SmokeFailed(f"{address}/ is not the page: {status} {kind}")
    say(f"{address} is ready and serves the page")


def ask(relay: Path, address: str, token: str, environment: dict[str, str]) -> None:
    """Send one question from the terminal and make sure that it is answered."""
    command = [str(relay), "send", QUESTION, "--agent", "docs", "--url", address, "--token", token]
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0 or len(done.stdout.strip()) < 20:
        raise SmokeFailed(f"relay send: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    say(f"an answer of {len(done.stdout)} characters after {time.monotonic() - begin:.1f} s")


def check_end(product: Started, *, is_make: bool) -> None:
    """Send Ctrl-C and make sure that everything ended, quietly."""
    code = product.interrupt()
    # make reports the interrupt as its own end, whatever the command behind it did.
    allowed = {0, 2, 130, -signal.SIGINT} if is_make else {0}
    if code not in allowed:
        raise SmokeFailed(f"after Ctrl-C the exit code is {code}")
    if any("Traceback" in line for line in product.lines):
        raise SmokeFailed("it printed a traceback")
    if left := product.processes():
        raise SmokeFailed(f"processes are left after Ctrl-C: {left}")
    say(f"ended by Ctrl-C (exit code {code}); nothing is left")


def smoke(relay: Path, *, is_make: bool) -> None:
    """Run all steps."""
    with tempfile.TemporaryDirectory(prefix="relay-smoke-") as scratch:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("RELAY_")
        }
        environment["DOCKER_HOST"] = f"unix://{scratch}/no-docker-here.sock"
        options = ["--port", "0", "--data-dir", f"{scratch}/data"]
        if is_make:
            command, folder = ["make", "run", f"ARGS={' '.join(options)}"], ROOT
        else:
            command, folder = [str(relay), "up", *options], Path(scratch)
        say(" ".join(command))
        with started(command, folder, environment) as product:
            links = product.await_links()
            gateways = sorted({address for address, _ in links})
            if len(gateways) != 2:
                raise SmokeFailed(f"two gateways should have links, not {gateways}")
            for address in gateways:
                check_gateway(address)
            for address, token in links[:2]:
                ask(relay, address, token, environment)
            check_end(product, is_make=is_make)


def main() -> None:
    """Read the command line, run the steps, exit with 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--relay", type=Path, default=ROOT / ".venv/bin/relay")
    parser.add_argument("--up", action="store_true", help="start `relay up` instead of `make run`")
    arguments = parser.parse_args()
    try:
        smoke(arguments.relay, is_make=not arguments.up)
    except SmokeFailed as error:
        say(f"FAILED: {error}")
        sys.exit(1)
    say("passed")


if __name__ == "__main__":
    main()
