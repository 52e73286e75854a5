"""What a measurement starts, and in which size; everything ends with the block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from benchmarks.compiled import environment
from benchmarks.load import LoadClient, Target
from benchmarks.native import compile_program
from benchmarks.processes import (
    Gateway,
    Placement,
    PortServer,
    Process,
    RedisProcess,
    start_worker,
)

_Size = TypeVar("_Size")


class _Stoppable(Protocol):
    def stop(self) -> None: ...


_Started = TypeVar("_Started", bound=_Stoppable)


@dataclass(frozen=True)
class Plan:
    """How thorough a measurement is.

    Attributes:
        is_quick: Seconds instead of minutes; the figures are then good for a glance only.
        folder: For temporary files.
        profile_folder: Where profiles go; None: nothing is profiled.
        compiled: Where the relay's compiled packages are; None: gateways run from the source.
        say: Tells the user what is being measured.
    """

    is_quick: bool
    folder: Path
    placement: Placement
    say: Callable[[str], None]
    profile_folder: Path | None = None
    compiled: Path | None = None

    def size(self, full: _Size, quick: _Size) -> _Size:
        return quick if self.is_quick else full


class Stage:
    """The processes of one measurement.

    Args:
        plan: Its size.
        is_pinned: Whether gateways get the processor that the plan's placement keeps for them.
            Their cost is then clean; latencies of a whole stack are not, since the rest of it
            has to share what is left.
    """

    def __init__(self, plan: Plan, *, is_pinned: bool = True) -> None:
        self.folder = plan.folder
        self._is_pinned = is_pinned
        self._plan = plan
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self, role: str, start: Callable[[], _Started]) -> _Started:
        with self._plan.placement.of(role if self._is_pinned else "anywhere"):
            started = start()
        self._stack.callback(started.stop)
        return started

    @property
    def is_compiled(self) -> bool:
        """Whether gateways run the compiled packages."""
        return self._plan.compiled is not None

    def redis(self) -> RedisProcess:
        return self._start("rest", lambda: RedisProcess(self._plan.folder))

    def gateway(
        self,
        server: RedisProcess,
        command: Sequence[str] | None = None,
        *,
        from_source: bool = False,
    ) -> Gateway:
        is_source = from_source or command is not None
        env = environment(None if is_source else self._plan.compiled)
        return self._start("gateway", lambda: Gateway(server.url, command=command, env=env))

    def starlette(self, server: RedisProcess) -> PortServer:
        """Start the usual way: see ``reference_starlette``."""
        command = [sys.executable, "-m", "benchmarks.reference_starlette", str(server.port)]
        return self._start("gateway", lambda: PortServer("Starlette reference", command))

    def bare_handshake(self) -> PortServer:
        """Start the relay's server without the relay: see ``bare_handshake``."""
        command = [sys.executable, "-m", "benchmarks.bare_handshake"]
        return self._start("gateway", lambda: PortServer("bare handshakes", command))

    def floor(self, server: RedisProcess, mode: str) -> PortServer | None:
        """Start the C floor; None where there is no compiler."""
        program = compile_program("floor")
        if program is None:
            return None
        command = [str(program), str(server.port), mode]
        return self._start("gateway", lambda: PortServer("floor", command))

    def load(self, targets: Sequence[Target], *, is_beside: bool = False) -> LoadClient:
        """Start a load generator.

        Args:
            targets: Its connections.
            is_beside: Whether it shares the gateway's processor instead of Redis'. Redis is then
                ahead of the two, and work waits for the gateway: it is saturated.
        """
        role = "gateway" if is_beside else "rest"
        return self._start(role, lambda: LoadClient(self._plan.folder, targets))

    def worker(
        self, server: RedisProcess, reference: str, app_dir: str, concurrency: int | None = None
    ) -> Process:
        return self._start(
            "rest", lambda: start_worker(server.url, reference, app_dir, concurrency)
        )

    def large_results(self, server: RedisProcess, user: int) -> Process:
        """Start a process that publishes a large result at each ``go``."""
        command = [sys.executable, "-m", "benchmarks.large_results", server.url, str(user)]
        return self._start("rest", lambda: Process("large results", command, pipes=True))

    def bridge(self, server: RedisProcess, *arguments: Any) -> Process:
        """Start a process that publishes through the bridge; it answers ``go`` when it is done."""
        command = [sys.executable, "-m", "benchmarks.bridging", server.url]
        return self._start(
            "rest", lambda: Process("bridge", [*command, *map(str, arguments)], pipes=True)
        )

    def publisher(self, server: RedisProcess, *arguments: Any) -> Process:
        """Start the publishing process; it answers ``go`` with what it has measured."""
        command = [sys.executable, "-m", "benchmarks.publishing", server.url]
        return self._start(
            "rest",
            lambda: Process("publisher", [*command, *map(str, arguments)], pipes=True),
        )
