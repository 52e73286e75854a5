"""Shows that a worker lives: its key, renewed each second from a thread and connection of its own.

An agent that blocks the event loop makes its own run stall; it must not make the whole worker
look dead. So nothing here depends on the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from agent_worker import metrics
from relay.keys import NODE_TTL_MS

RENEW_INTERVAL_S = 1.0
ANSWER_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 3.0

_log = structlog.get_logger(__name__)


class Presence:
    """Holds a key with a time to live for as long as the process can reach Redis.

    Args:
        redis_url: Where Redis is.
        key: The worker's key.
        value: What the key says about the worker.
        on_absent: Called, in the thread, when a renewal found the key gone: Redis was emptied,
            restarted without its data, or away for longer than the key lives.
    """

    def __init__(
        self, redis_url: str, key: str, value: bytes, on_absent: Callable[[], None]
    ) -> None:
        self._redis_url = redis_url
        self._key = key
        self._value = value
        self._on_absent = on_absent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name=key, daemon=True)

    def start(self) -> None:
        """Write the key for the first time and keep it from then on."""
        self._thread.start()

    def stop(self) -> None:
        """Remove the key and end the thread. Blocks for at most three seconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _renew_until_stopped(self) -> None:
        client = redis.Redis.from_url(
            self._redis_url,
            socket_timeout=ANSWER_TIMEOUT_S,
            socket_connect_timeout=ANSWER_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=1,
        )
        with client:
            is_first = True
            is_away = False
            while not self._stop.is_set():
                try:
                    before = client.set(self._key, self._value, px=NODE_TTL_MS, get=True)
                except RedisError as error:
                    metrics.REDIS_FAILURES.labels("presence").inc()
                    if not is_away:
                        _log.warning("worker_presence_lost", reason=str(error))
                    is_away = True
                else:
                    if is_away:
                        _log.info("worker_presence_restored")
                    if before is None and not is_first:
                        self._on_absent()
                    is_first = is_away = False
                self._stop.wait(RENEW_INTERVAL_S)
            self._remove(client)

    def _remove(self, client: redis.Redis) -> None:
        try:
            client.delete(self._key)
        except RedisError as error:
            # It expires by itself within seconds.
            _log.debug("worker_presence_not_removed", reason=str(error))
