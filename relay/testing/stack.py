"""The whole stack as processes: gateways and workers, started as anybody would start them."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from relay.testing.processes import ManagedProcess
from relay.testing.redis_server import free_port
from relay.tokens import mint_token

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

READY_DEADLINE_S = 30.0
SHOWN_LINES = 60
_ASK_EVERY_S = 0.02
_ANSWER_WITHIN_S = 2.0

Login: TypeAlias = "Callable[[str, str], str]"


class GatewayProcess(ManagedProcess):
    """A gateway of its own process. Ports stay the same over restarts.

    Args:
        environment: All of its environment, but for the ports.
        folder: Its current folder, and the place of its log.
        name: Name of the log.
        port: Public port.
        admin_port: Port of metrics and operators.
    """

    def __init__(
        self, environment: Mapping[str, str], folder: Path, name: str, port: int, admin_port: int
    ) -> None:
        self.port = port
        self.admin_port = admin_port
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

    async def is_ready(self) -> bool:
        """Whether ``/readyz`` is green; a gateway that does not answer is not ready."""
        status, _ = await asyncio.to_thread(_get, self.port, "/readyz")
        return status == 200

    async def wait_ready(self, deadline_s: float = READY_DEADLINE_S) -> None:
        """Return when it is ready; fail at once when it has ended.

        Raises:
            RuntimeError: It has ended; the text has its output.
            TimeoutError: It is not ready in time.
        """
        async with asyncio.timeout(deadline_s):
            while not await self.is_ready():
                if not self.is_running:
                    raise RuntimeError(f"the gateway ended with {self.exit_code}:\n{self.log}")
                await asyncio.sleep(_ASK_EVERY_S)

    async def metrics(self) -> dict[str, float]:
        """Give the gateway's figures; those with labels by ``name{labels}``."""
        _, text = await asyncio.to_thread(_get, self.admin_port, "/metrics")
        figures = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                figures[name] = float(value)
        return figures


def _get(port: int, path: str) -> tuple[int, str]:
    """Ask a port of this machine; (0, "") where nobody answers."""
    # Plain HTTP and nothing else: what could speak TLS reads the system's certificates first.
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_WITHIN_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, HTTPException):
        return 0, ""
    finally:
        connection.close()


class Stack:
    """Gateways and workers on one Redis, ended with the ``async with`` block.

    Args:
        folder: Current folder of the processes and place of their logs.
        redis_url: Which Redis, unless a process is given another address.
        key_prefix: Prefix of the keys.
        settings: ``RELAY_*`` variables for all processes, without the prefix.
        login: Gives an address of Redis as a ``gateway`` or a ``worker`` logs in there.
    """

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        *,
        key_prefix: str = "relay",
        settings: Mapping[str, str | int] | None = None,
        login: Login | None = None,
    ) -> None:
        self.redis_url = redis_url
        self.key_prefix = key_prefix
        self.secret = secrets.token_hex(32)
        self.gateways: list[GatewayProcess] = []
        self.workers: list[ManagedProcess] = []
        self._folder = folder / "stack"
        self._settings = dict(settings or {})
        self._login = login or (lambda url, role: url)
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
        for process in self.processes:
            process.end_blocking()

    @property
    def processes(self) -> list[ManagedProcess]:
        """All gateways and workers, running or not."""
        return [*self.gateways, *self.workers]

    @property
    def urls(self) -> list[str]:
        """Addresses of all gateways, running or not."""
        return [gateway.url for gateway in self.gateways]

    def token(self, user_id: str, ttl_s: float = 3_600.0, **claims: Any) -> str:
        """Give a user's token, signed as the application's backend would sign it.

        Args:
            user_id: Whom it speaks for.
            ttl_s: How long it is valid; negative gives one that has expired.
            **claims: ``issuer``, ``audience`` or ``scopes``; and ``secret``, to sign with another.
        """
        return mint_token(claims.pop("secret", self.secret), user_id, ttl_s, **claims)

    def redis_url_of(self, role: str) -> str:
        """Give the address of Redis as a ``gateway`` or a ``worker`` has it."""
        return self._login(self.redis_url, role)

    def environment(
        self, role: str, redis_url: str | None, settings: Mapping[str, str | int]
    ) -> dict[str, str]:
        """Give a process's environment: that of the test without what would configure a relay."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        return {
            **kept,
            "RELAY_REDIS_URL": self._login(redis_url or self.redis_url, role),
            "RELAY_KEY_PREFIX": self.key_prefix,
            "RELAY_JWT_SECRET": self.secret,
            "RELAY_LOG_FORMAT": "json",
            **{
                f"RELAY_{name}": str(value)
                for name, value in {**self._settings, **settings}.items()
            },
        }

    async def start_gateways(self, count: int, **settings: Any) -> list[GatewayProcess]:
        """Start several gateways at once; return when all are ready."""
        return await asyncio.gather(*(self.start_gateway(**settings) for _ in range(count)))

    async def start_gateway(
        self, *, redis_url: str | None = None, **settings: Any
    ) -> GatewayProcess:
        """Start a gateway; return when it is ready.

        Args:
            redis_url: Another way to Redis than the stack's.
            **settings: ``RELAY_*`` variables for this one, without the prefix.
        """
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
                gateway.end_blocking()
            else:
                return gateway

    async def restart(self, gateway: GatewayProcess) -> None:
        """Start a gateway that has ended again, on its port; return when it is ready."""
        gateway.start()
        await gateway.wait_ready()

    async def start_worker(
        self, reference: str, app_dir: Path, *, redis_url: str | None = None, **settings: Any
    ) -> ManagedProcess:
        """Start a worker; return when it says that it has.

        Args:
            reference: ``module:attribute`` of the worker.
            app_dir: Folder in which the module is.
            redis_url: Another way to Redis than the stack's.
            **settings: ``RELAY_*`` variables for this one, without the prefix.
        """
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

    def last_lines(self, count: int = SHOWN_LINES) -> dict[str, str]:
        """Give the end of every process's output, by the name of its log."""
        return {
            process.log_path.name: "\n".join(process.log.splitlines()[-count:])
            for process in self.processes
        }
