"""The stack of ``relay up``: started in order, watched, ended in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

from rich.text import Text

from relay.cli import console
from relay.cli.children import Child, log_event, readable
from relay.client.http import problem_detail
from relay.config import Settings, hide_password
from relay.embedded import EmbeddedRedis
from relay.errors import RelayError
from relay.scripts import RedisLink

READY_TIMEOUT_S = 30.0
WORKER_GRACE_S = 3
STOP_TIMEOUT_S = 15.0

_POLL_S = 0.05
_ANSWER_TIMEOUT_S = 3.0
_SHOWN_LINES = 12


class StackFailed(RelayError):
    """A part did not come up. The text says which one, and its last words."""


@dataclass(frozen=True, slots=True)
class StackPlan:
    """What to start.

    Attributes:
        redis_dir: Data folder of a Redis of our own; None uses ``settings.redis_url``.
        app_dir: Where the worker's module is.
    """

    settings: Settings
    redis_dir: Path | None
    ports: list[int]
    admin_ports: list[int]
    secret: str = field(repr=False)
    worker: str
    app_dir: Path
    default_agent: str | None


class Stack:
    """Redis, gateways and a worker as processes of this one."""

    def __init__(self, plan: StackPlan, *, verbose: bool) -> None:
        self._plan = plan
        self._verbose = verbose
        self._redis = EmbeddedRedis(plan.redis_dir) if plan.redis_dir is not None else None
        self._gateways: list[Child] = []
        self._worker: Child | None = None
        self._is_stopping = False

    @property
    def redis_url(self) -> str:
        """Where the Redis of the stack is."""
        return self._redis.url if self._redis is not None else self._plan.settings.redis_url

    @property
    def redis_description(self) -> str:
        """What Redis it is, for people."""
        if self._redis is not None:
            return f"{self._redis.server}"
        return hide_password(self.redis_url)

    async def start(self, on_step: Callable[[str], None]) -> None:
        """Start everything; return when it is ready.

        Raises:
            RelayError: A part did not come up; the text says which, why and what to do.
        """
        if self._redis is not None:
            on_step("Starting Redis")
            await self._redis.start()
        else:
            on_step("Looking for Redis")
            link = RedisLink(self.redis_url, max_connections=2)
            try:
                await link.check()
            finally:
                await link.aclose()
        on_step("Starting gateways and worker")
        self._make_children()
        for child in self._children():
            await child.start()
        await self._wait_until_ready()

    async def _wait_until_ready(self) -> None:
        ready = asyncio.create_task(self._all_ready())
        broken = asyncio.create_task(self.wait_until_broken())
        try:
            await asyncio.wait(
                {ready, broken}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if broken.done():
                raise StackFailed(broken.result())
            if not ready.done():
                raise StackFailed(
                    f"Not ready after {READY_TIMEOUT_S:.0f} s: {await self._describe_waiting()}"
                )
        finally:
            broken.cancel()
            ready.cancel()
            await asyncio.wait({ready, broken})

    async def _all_ready(self) -> None:
        async with asyncio.TaskGroup() as waiting:
            for port in self._plan.ports:
                waiting.create_task(_until_ready(port))
            if self._worker is not None:
                waiting.create_task(self._worker.wait_until_said("worker_started"))

    async def wait_until_broken(self) -> str:
        """Return when a part has ended by itself; say which one and its last words."""
        waiting = {asyncio.create_task(child.wait()): child for child in self._children()}
        redis = self._redis
        tasks: set[asyncio.Task[None]] = set(waiting)
        if redis is not None:
            tasks.add(asyncio.create_task(redis.wait_until_ended()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        for task in done:
            if task in waiting:
                return _last_words(waiting[task])
        log = "\n".join(redis.last_log_lines(_SHOWN_LINES)) if redis is not None else ""
        return f"Redis has ended by itself. Everything stops. Its last words:\n{log}"

    async def stop(self) -> None:
        """End everything, in order.

        First the worker, so that clients see how its runs end; then the gateways, which tell
        their clients; then Redis, which writes what it holds.
        """
        self._is_stopping = True
        if self._worker is not None:
            await self._worker.terminate(WORKER_GRACE_S + STOP_TIMEOUT_S)
        await asyncio.gather(*(child.terminate(STOP_TIMEOUT_S) for child in self._gateways))
        if self._redis is not None:
            await self._redis.stop()

    def kill(self) -> None:
        """Do not wait for gateways and worker any longer. Redis still writes what it holds."""
        for child in self._children():
            child.kill()

    def _children(self) -> list[Child]:
        return [*self._gateways, *([self._worker] if self._worker is not None else [])]

    def _make_children(self) -> None:
        plan = self._plan
        variables = {
            "RELAY_REDIS_URL": self.redis_url,
            "RELAY_KEY_PREFIX": plan.settings.key_prefix,
            "RELAY_JWT_SECRET": ",".join(plan.settings.secrets) or plan.secret,
            "RELAY_WORKER_GRACE_S": str(WORKER_GRACE_S),
            # That a worker is ready is read from its log.
            "RELAY_LOG_FORMAT": "json",
            "RELAY_LOG_LEVEL": "debug" if plan.settings.log_level == "debug" else "info",
        }
        origins = [
            f"http://{host}:{port}" for port in plan.ports for host in ("127.0.0.1", "localhost")
        ]
        serving = {
            **variables,
            "RELAY_HOST": "127.0.0.1",
            "RELAY_ALLOWED_ORIGINS": ",".join([*plan.settings.allowed_origins, *origins]),
        }
        if plan.default_agent is not None:
            serving["RELAY_DEFAULT_AGENT"] = plan.default_agent
        pairs = zip(plan.ports, plan.admin_ports, strict=True)
        self._gateways = [
            Child(
                f"gateway {number}",
                ["gateway", f"--port={port}", f"--admin-port={admin_port}"],
                serving,
                self._show,
            )
            for number, (port, admin_port) in enumerate(pairs, 1)
        ]
        self._worker = Child(
            "worker", ["worker", plan.worker, f"--app-dir={plan.app_dir}"], variables, self._show
        )

    async def _describe_waiting(self) -> str:
        parts = []
        for child, port in zip(self._gateways, self._plan.ports, strict=True):
            reason = await asyncio.to_thread(_why_not_ready, port)
            if reason is not None:
                parts.append(f"{child.name} ({reason})")
        if self._worker is not None and "worker_started" not in self._worker.said:
            parts.append(f"worker ({_joined(self._worker) or 'it says nothing'})")
        return ", ".join(parts) or "it is now; try again"

    def _show(self, child: Child, line: str) -> None:
        fields = log_event(line)
        is_error = fields is not None and fields.get("level") in ("error", "critical")
        if self._verbose or (is_error and not self._is_stopping):
            for part in readable(line).splitlines():
                console.err.print(
                    Text.assemble((f"{child.name:<10}", "name"), " ", part), soft_wrap=True
                )


async def _until_ready(port: int) -> None:
    while await asyncio.to_thread(_why_not_ready, port) is not None:  # noqa: ASYNC110 (no event of ours)
        await asyncio.sleep(_POLL_S)


def _why_not_ready(port: int) -> str | None:
    """Ask a gateway; None when it is ready."""
    url = f"http://127.0.0.1:{port}/readyz"
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=_ANSWER_TIMEOUT_S):
            return None
    except HTTPError as refused:
        with refused:
            return problem_detail(refused.read()) or f"HTTP {refused.code}"
    except (URLError, OSError) as error:
        return str(getattr(error, "reason", error))


def _last_words(child: Child) -> str:
    return (
        f"The {child.name} has ended by itself ({_exit(child.exit_code)}). Everything stops. "
        f"Its last words:\n{_joined(child) or '(none)'}"
    )


def _joined(child: Child) -> str:
    return "\n".join(readable(line) for line in list(child.last_lines)[-_SHOWN_LINES:])


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"exit code {code}"
