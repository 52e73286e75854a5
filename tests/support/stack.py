"""The whole stack as processes: gateways and workers, started as anybody would start them."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import secrets
import sys
from typing import TYPE_CHECKING, Self

import httpx

from relay.tokens import mint_token
from tests.support.acl import as_user
from tests.support.processes import ManagedProcess
from tests.support.redis_server import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

READY_DEADLINE_S = 30.0
SHOWN_LINES = 60
_ASK_EVERY_S = 0.05


class GatewayProcess(ManagedProcess):
    """A gateway of its own process. Ports stay the same over restarts."""

    def __init__(
        self, environment: Mapping[str, str], folder: Path, name: str, port: int, admin_port: int
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        super().__init__(
            [sys.executable, "-m", "relay", "gateway"],
            environment={
                **environment,
                "RELAY_PORT": str(port),
                "RELAY_ADMIN_PORT": str(admin_port),
            },
            folder=folder,
            log_path=folder / f"{name}.log",
        )

    def _ask(self, base_url: str) -> httpx.AsyncClient:
        # Plain HTTP: reading the system's certificates for every question would hold up the loop
        # that all clients of a test share for 40 ms each time.
        return httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=2.0, verify=False)

    async def is_ready(self) -> bool:
        """Whether ``/readyz`` is green; a gateway that does not answer is not ready."""
        async with self._ask(self.url) as client:
            try:
                return (await client.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

    async def wait_ready(self, deadline_s: float = READY_DEADLINE_S) -> None:
        """Return when it is ready; fail at once when it has ended."""
        async with asyncio.timeout(deadline_s):
            while not await self.is_ready():
                if not self.is_running:
                    raise RuntimeError(f"the gateway ended with {self.exit_code}:\n{self.log}")
                await asyncio.sleep(_ASK_EVERY_S)

    async def metrics(self) -> dict[str, float]:
        """Give the gateway's figures; those with labels by ``name{labels}``."""
        async with self._ask(self.admin_url) as client:
            answer = await client.get("/metrics")
        figures = {}
        for line in answer.text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                figures[name] = float(value)
        return figures


class Stack:
    """Gateways and workers on one Redis, ended with the ``async with`` block.

    When the block raises, the last lines of every process's output are printed.

    Args:
        folder: Current folder of the processes and place of their logs.
        redis_url: Which Redis, unless a process is given another address.
        key_prefix: Prefix of the keys.
        settings: ``RELAY_*`` variables for all processes, without the prefix.
    """

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        *,
        key_prefix: str = "relay",
        settings: Mapping[str, str | int] | None = None,
    ) -> None:
        self.redis_url = redis_url
        self.key_prefix = key_prefix
        self.secret = secrets.token_hex(32)
        self.gateways: list[GatewayProcess] = []
        self.workers: list[ManagedProcess] = []
        self._folder = folder / "stack"
        self._settings = dict(settings or {})
        self._numbers = itertools.count()

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        processes = [*self.gateways, *self.workers]
        for process in processes:
            process.end_blocking()
        if error is not None:
            self.show_logs()

    @property
    def urls(self) -> list[str]:
        """Addresses of all gateways, running or not."""
        return [gateway.url for gateway in self.gateways]

    def token(self, user_id: str, ttl_s: float = 3_600.0) -> str:
        """Give a user's token, signed as the application's backend would sign it."""
        return mint_token(self.secret, user_id, ttl_s)

    def environment(
        self, role: str, redis_url: str | None, settings: Mapping[str, str | int]
    ) -> dict[str, str]:
        """Give a process's environment: that of the test without what would configure a relay."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        return {
            **kept,
            "RELAY_REDIS_URL": as_user(redis_url or self.redis_url, role),
            "RELAY_KEY_PREFIX": self.key_prefix,
            "RELAY_JWT_SECRET": self.secret,
            "RELAY_LOG_FORMAT": "json",
            **{
                f"RELAY_{name}": str(value)
                for name, value in {**self._settings, **settings}.items()
            },
        }

    async def start_gateways(self, count: int, **settings: str | int) -> list[GatewayProcess]:
        """Start several gateways at once; return when all are ready."""
        return await asyncio.gather(*(self.start_gateway(**settings) for _ in range(count)))

    async def start_gateway(
        self, *, redis_url: str | None = None, **settings: str | int
    ) -> GatewayProcess:
        """Start a gateway; return when it is ready."""
        while True:
            gateway = GatewayProcess(
                self.environment("gateway", redis_url, settings),
                self._folder,
                f"gateway-{next(self._numbers)}",
                free_port(),
                free_port(),
            )
            self.gateways.append(gateway)
            gateway.start()
            try:
                await gateway.wait_ready()
            except RuntimeError:
                # A port that was free can be taken before the gateway binds it.
                if "in use" not in gateway.log:
                    raise
                self.gateways.remove(gateway)
            else:
                return gateway

    async def restart(self, gateway: GatewayProcess) -> None:
        """Start a gateway that has ended again, on its port; return when it is ready."""
        gateway.start()
        await gateway.wait_ready()

    async def start_worker(
        self, reference: str, app_dir: Path, *, redis_url: str | None = None, **settings: str | int
    ) -> ManagedProcess:
        """Start a worker; return when it says that it has."""
        worker = ManagedProcess(
            [sys.executable, "-m", "relay", "worker", reference, "--app-dir", str(app_dir)],
            environment=self.environment("worker", redis_url, settings),
            folder=self._folder,
            log_path=self._folder / f"worker-{len(self.workers)}.log",
        )
        self.workers.append(worker)
        worker.start()
        await self.wait_worker_started(worker)
        return worker

    async def wait_worker_started(self, worker: ManagedProcess, *, times: int = 1) -> None:
        """Wait until a worker has started for the given time since its log began."""
        async with asyncio.timeout(READY_DEADLINE_S):
            while worker.log.count("worker_started") < times:
                if not worker.is_running:
                    raise RuntimeError(f"the worker ended with {worker.exit_code}:\n{worker.log}")
                await asyncio.sleep(_ASK_EVERY_S)

    def show_logs(self) -> None:
        """Print the end of every process's output; pytest shows it with the failure."""
        for process in [*self.gateways, *self.workers]:
            lines = process.log.splitlines()
            print(f"--- {process.log_path.name}: last {SHOWN_LINES} of {len(lines)} lines")
            print("\n".join(lines[-SHOWN_LINES:]))

    def assert_no_defects(self, *, except_for: str | None = None) -> None:
        """Fail if a process logged an error: a defect that clients happened not to notice.

        Args:
            except_for: Name of an event that the test has provoked.
        """
        for process in [*self.gateways, *self.workers]:
            for line in process.log.splitlines():
                is_error = re.search(r'"level": ?"(error|critical)"', line) is not None
                is_provoked = except_for is not None and f'"event": "{except_for}"' in line
                is_defect = (is_error and not is_provoked) or "Traceback" in line
                assert not is_defect, (process.log_path.name, line)
