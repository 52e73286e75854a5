"""Keeps what a worker holds: the key that shows that it lives, and the leases of its runs.

Both are renewed in one pipeline, from a thread and a connection of their own. An agent that
blocks the event loop makes its own run stall; it must not make the whole worker look dead.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import redis
import structlog
from redis.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    NoScriptError,
    RedisError,
)

from agent_worker.metrics import WorkerMetrics
from relay.errors import PublishRefused, RunEnded, StaleFence
from relay.keys import NODE_TTL_MS, WORKER_INDEX_TTL_MS, Keys, UserKeys
from relay.scripts import LogLimits, load_scripts, server_identity
from relay.thread_client import thread_client
from relay.workers import RunAtWork, WorkerCard, encode_card

ANSWER_TIMEOUT_S = 1.0
LONGEST_INTERVAL_S = 1.0
STOP_TIMEOUT_S = 3.0

REFUSALS = (AuthenticationError, NoPermissionError)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A worker's time-limited claim on a run.

    Attributes:
        user: The key names of the run's user.
        run_id: The run.
        agent: Which agent carries it out.
        since_ms: When it was claimed, by the wall clock.
        fence: Proves that the claim is this worker's.
        on_cancel: Called in the thread, with the flag's bytes, when the run is to stop.
        on_answers: Called in the thread, with their bytes, while input requests of this attempt
            have been answered: the signal that said so may have been lost.
        on_lost: Called in the thread when the run is no longer this worker's.
    """

    user: UserKeys
    run_id: str
    agent: str
    since_ms: int
    fence: str
    on_cancel: Callable[[bytes], None]
    on_answers: Callable[[bytes], None]
    on_lost: Callable[[PublishRefused], None]


class LeaseKeeper:
    """Renews a worker's key and the leases of its runs.

    Args:
        redis_url: Where Redis is.
        keys: Key names.
        worker_id: The worker; its key says what it is and what it runs.
        card: What stays the same about it.
        lease_ms: How long a lease holds without being renewed.
        limits: What the scripts keep of each user's history.
        metrics: Where failures are counted.
        on_absent: Called, in the thread, when a renewal found the key gone: Redis was emptied,
            restarted without its data, or away for longer than the key lives.
    """

    def __init__(
        self,
        redis_url: str,
        keys: Keys,
        worker_id: str,
        card: WorkerCard,
        *,
        lease_ms: int,
        limits: LogLimits,
        metrics: WorkerMetrics,
        on_absent: Callable[[], None],
    ) -> None:
        self._redis_url = redis_url
        self._worker_id = worker_id
        self._key = keys.worker(worker_id)
        self._index = keys.workers
        self._card = card
        self._lease_ms = lease_ms
        self._bounds = (limits.max_events, limits.max_age_ms, limits.max_bytes)
        self._metrics = metrics
        self._on_absent = on_absent
        self._script = load_scripts()["renew"]
        # Three chances within a lease, also where one of them waits for an answer in vain.
        self._interval_s = min(LONGEST_INTERVAL_S, lease_ms / 4000)
        # Reentrant: a run that is let go by the garbage collector may be so in any line, also here.
        self._lock = threading.RLock()
        self._leases: list[Lease] = []
        self._instance = ""
        self._is_first = True
        self._is_away = False
        # Written by the thread, read by whoever wants to know how it is: one assignment each.
        self._contact_s = time.monotonic()
        self._last_error: str | None = None
        self._is_refused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._renew_until_stopped, name=self._key, daemon=True
        )

    @property
    def silence_s(self) -> float:
        """How long Redis has not answered; 0 while it answers as it should."""
        silence_s = time.monotonic() - self._contact_s
        is_late = silence_s > self._interval_s + 2 * ANSWER_TIMEOUT_S
        return silence_s if self._is_away or is_late else 0.0

    @property
    def is_refused(self) -> bool:
        """Whether Redis answers, but lets us do nothing: a wrong password, or missing rights."""
        return self._is_refused

    @property
    def last_error(self) -> str | None:
        """Why the last renewal that failed did so; None if none has."""
        return self._last_error

    def start(self) -> None:
        """Write the key for the first time and keep it from then on."""
        self._thread.start()

    def stop(self) -> None:
        """Remove the key and end the thread. Blocks for at most three seconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def hold(self, lease: Lease) -> None:
        """Renew this lease from now on."""
        with self._lock:
            self._leases.append(lease)

    def release(self, lease: Lease) -> None:
        """Renew this lease no more. Doing it twice changes nothing."""
        with self._lock:
            self._leases = [held for held in self._leases if held is not lease]

    def _renew_until_stopped(self) -> None:
        with thread_client(
            self._redis_url, timeout_s=ANSWER_TIMEOUT_S, on_connect=self._on_connect
        ) as client:
            while not self._stop.is_set():
                try:
                    self._renew(client)
                except RedisError as error:
                    self._metrics.redis_failures.labels("leases").inc()
                    self._last_error = str(error)
                    self._is_refused = isinstance(error, REFUSALS)
                    if not self._is_away:
                        _log.warning("leases_not_renewed", reason=str(error))
                    self._is_away = True
                self._stop.wait(self._interval_s)
            self._remove(client)

    def _on_connect(self, connection: AbstractConnection) -> None:
        connection.on_connect()  # type: ignore[no-untyped-call]
        connection.send_command(  # type: ignore[no-untyped-call]
            "INFO", "replication", check_health=False
        )
        self._instance = server_identity(connection.read_response())

    def _renew(self, client: redis.Redis) -> None:
        # First, because it makes the connection: the scripts are told which server that is.
        with self._lock:
            leases = list(self._leases)
        before = self._show(client, leases)
        if self._is_away:
            _log.info("leases_renewed_again")
        if before is None and not self._is_first:
            self._on_absent()
        self._is_first = self._is_away = self._is_refused = False
        self._contact_s = time.monotonic()
        if leases:
            self._renew_leases(client, leases)

    def _show(self, client: redis.Redis, leases: list[Lease]) -> bytes | None:
        """Write the worker's key; give what it held before."""
        runs = [
            RunAtWork(lease.user.user_id, lease.run_id, lease.agent, lease.since_ms)
            for lease in leases
        ]
        now_ms = time.time_ns() // 1_000_000
        with client.pipeline(transaction=False) as pipe:
            pipe.set(self._key, encode_card(self._card, runs), px=NODE_TTL_MS, get=True)
            pipe.zadd(self._index, {self._worker_id: now_ms})
            if self._is_first:
                # Whoever was killed cannot leave by itself.
                pipe.zremrangebyscore(self._index, 0, now_ms - WORKER_INDEX_TTL_MS)
            before, *indexed = pipe.execute(raise_on_error=False)
        if isinstance(before, RedisError):
            raise before
        for reply in indexed:
            if isinstance(reply, RedisError):
                # Operators do not see us then. That must not cost a run its lease.
                _log.debug("worker_not_indexed", reason=str(reply))
        return cast("bytes | None", before)

    def _renew_leases(self, client: redis.Redis, leases: list[Lease]) -> None:
        answers = self._send(client, leases)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            client.script_load(self._script.source)
            answers = self._send(client, leases)
        for lease, answer in zip(leases, answers, strict=True):
            self._receive(lease, answer)

    def _send(self, client: redis.Redis, leases: list[Lease]) -> list[Any]:
        with client.pipeline(transaction=False) as pipe:
            for lease in leases:
                pipe.execute_command(  # type: ignore[no-untyped-call]
                    "EVALSHA", self._script.sha, *self._arguments(lease)
                )
            return pipe.execute(raise_on_error=False)

    def _arguments(self, lease: Lease) -> tuple[str | int, ...]:
        user = lease.user
        channel = (user.channel, user.log, user.texts, user.live, user.runs, user.threads)
        keys = (*channel, user.run(lease.run_id))
        shared = (self._instance, secrets.token_hex(6), *self._bounds)
        return (len(keys), *keys, *shared, lease.run_id, lease.fence, self._lease_ms)

    def _receive(self, lease: Lease, answer: Any) -> None:
        if isinstance(answer, RedisError):
            _log.error("lease_not_renewed", run_id=lease.run_id, reason=str(answer))
            return
        match answer:
            case [b"ok", cancel, answers]:
                if cancel:
                    lease.on_cancel(cancel)
                if answers not in (b"", b"{}"):
                    lease.on_answers(answers)
            case [b"ended", status]:
                self._lose(lease, RunEnded(lease.run_id, status.decode()))
            case [b"stale"]:
                self._lose(lease, StaleFence(f"run {lease.run_id}: the attempt was superseded"))
            case _:
                self._lose(lease, PublishRefused(f"run {lease.run_id}: Redis does not know it"))

    def _lose(self, lease: Lease, refusal: PublishRefused) -> None:
        self.release(lease)
        lease.on_lost(refusal)

    def _remove(self, client: redis.Redis) -> None:
        try:
            client.delete(self._key)
            client.zrem(self._index, self._worker_id)
        except RedisError as error:
            # It expires by itself within seconds.
            _log.debug("worker_key_not_removed", reason=str(error))
