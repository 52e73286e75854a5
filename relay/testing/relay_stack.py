"""``RelayStack``: a whole relay for one test, with its users' clients and ways to harm it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from agent_worker import Worker
from relay.config import load_settings
from relay.errors import ConfigurationError
from relay.testing.processes import ManagedProcess
from relay.testing.redis_source import SharedRedis
from relay.testing.stack import GatewayProcess, Login, Stack
from relay.testing.utility import WebSocketTestUtility

WorkerSource: TypeAlias = Worker | str


class RelayStack(Stack):
    """Gateways, workers and clients on one real Redis; gone, with all it started, after the block.

    Gateways are processes, so that they can be killed. A worker is either your ``Worker`` object,
    which runs in this process and in the test's event loop, where agents can be stepped and
    patched; or ``"module:attribute"``, which runs as a process of its own and can be killed.

    Args:
        folder: For the processes' logs.
        redis: From the fixture ``relay_redis``, or a ``RedisServer``.
        gateways: How many to start.
        workers: What to start beside them.
        app_dir: Folder in which the modules of workers are that run as processes.
        key_prefix: Prefix of the keys; each stack on one Redis needs its own.
        settings: ``RELAY_*`` variables for all of them, without the prefix.
        login: Gives the address of Redis as a ``gateway`` or a ``worker`` logs in there.
    """

    def __init__(
        self,
        folder: Path,
        redis: SharedRedis,
        *,
        gateways: int = 1,
        workers: Sequence[WorkerSource] = (),
        app_dir: Path | None = None,
        key_prefix: str = "relay",
        settings: Mapping[str, str | int] | None = None,
        login: Login | None = None,
    ) -> None:
        super().__init__(folder, redis.url, key_prefix=key_prefix, settings=settings, login=login)
        self.redis = redis
        self.clients: list[WebSocketTestUtility] = []
        self._gateway_count = gateways
        self._first_workers = list(workers)
        self._app_dir = app_dir or Path.cwd()
        self._own = contextlib.AsyncExitStack()
        self._is_redis_paused = False

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            await asyncio.gather(
                self.start_gateways(self._gateway_count),
                *(self.add_worker(worker) for worker in self._first_workers),
            )
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.resume_redis()
        try:
            left = await asyncio.gather(
                *(client.leave() for client in self.clients), return_exceptions=True
            )
            await self._own.aclose()
        finally:
            await super().__aexit__(kind, error, traceback)
        for failure in left:
            if isinstance(failure, BaseException) and error is None:
                raise failure

    # --- Workers ---

    async def add_worker(self, worker: WorkerSource, **settings: Any) -> ManagedProcess | None:
        """Start one more worker; returns when it takes tasks.

        Args:
            worker: A ``Worker``, to run in this process, or ``"module:attribute"``.
            **settings: ``RELAY_*`` variables for this one, without the prefix.

        Returns:
            Its process, if it has one of its own.
        """
        if isinstance(worker, str):
            return await self.start_worker(worker, self._app_dir, **settings)
        given = {name.lower(): value for name, value in {**self._settings, **settings}.items()}
        # As the processes, it must not depend on the shell that pytest was started from.
        own = load_settings(
            reads_environment=False,
            **{**given, "redis_url": self.redis_url_of("worker"), "key_prefix": self.key_prefix},
        )
        await self._own.enter_async_context(worker.running(own))
        return None

    # --- Clients ---

    async def client(
        self, user_id: str = "alice", *, gateway: int = 0, since: str = "active", **claims: Any
    ) -> WebSocketTestUtility:
        """Give a user's client, connected; call it again for a second tab.

        Args:
            user_id: Whose token it has.
            gateway: Which gateway it tries first; the others follow when that one is gone.
            since: Where to begin: ``active``, ``now``, ``0`` or a position.
            **claims: Of the token, as for ``token``.
        """
        urls = [*self.urls[gateway:], *self.urls[:gateway]]
        client = WebSocketTestUtility(
            f"{user_id}/{len(self.clients)}", user_id, urls, self.token(user_id, **claims), since
        )
        self.clients.append(client)
        await client.start()
        return client

    def assert_isolated(self) -> None:
        """Make sure that no client of the stack received anything of another user.

        Raises:
            AssertionError: One did; the text shows all that it received.
        """
        __tracebackhide__ = True
        for client in self.clients:
            client.assert_isolated(*self.clients)

    # --- Harm ---

    async def kill_gateway(self, number: int = 0) -> GatewayProcess:
        """Kill a gateway (SIGKILL): its connections break and it says nothing more."""
        gateway = self.gateways[number]
        await gateway.kill()
        return gateway

    async def stop_gateway(self, number: int = 0) -> GatewayProcess:
        """End a gateway as a deploy does (SIGTERM): it hands its connections over."""
        gateway = self.gateways[number]
        await gateway.terminate()
        return gateway

    async def restart_gateway(self, number: int = 0) -> GatewayProcess:
        """Start a killed or stopped gateway again, on its port; returns when it is ready."""
        gateway = self.gateways[number]
        await self.restart(gateway)
        return gateway

    async def kill_worker(self, number: int = 0) -> ManagedProcess:
        """Kill a worker that is a process of its own (SIGKILL).

        Raises:
            ConfigurationError: The workers run in this process.
        """
        if not self.workers:
            raise ConfigurationError(
                "No worker of this stack is a process of its own. Name it as 'module:attribute'."
            )
        worker = self.workers[number]
        await worker.kill()
        return worker

    def pause_redis(self) -> None:
        """Let Redis fall silent: connections stay open and nothing answers.

        The end of the stack resumes it, whatever happens before.
        """
        self.redis.pause()
        self._is_redis_paused = True

    def resume_redis(self) -> None:
        """Let Redis answer again."""
        if self._is_redis_paused:
            self.redis.resume()
            self._is_redis_paused = False
