"""Signals from gateways to this worker. They only hurry: what counts is in the run's hash."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import structlog

from agent_worker.stops import CancelAsked, cancel_asked
from relay.errors import RedisUnavailable
from relay.scripts import RedisLink
from relay.subscriber import Subscriber

_log = structlog.get_logger(__name__)


class SignalListener:
    """Listens on the worker's own channel.

    Args:
        link: Which Redis.
        channel: The worker's channel.
        on_cancel: Called with a run id when somebody asks for that run to stop.
        on_answer: Called with a run id, a request id and the answer when one of the run's input
            requests was resolved.
    """

    def __init__(
        self,
        link: RedisLink,
        channel: str,
        on_cancel: Callable[[str, CancelAsked], None],
        on_answer: Callable[[str, str, Mapping[str, Any]], None],
    ) -> None:
        self._link = link
        self._channel = channel
        self._on_cancel = on_cancel
        self._on_answer = on_answer
        self._has_begun = asyncio.Event()
        self._last_error: str | None = None
        self._subscriber = Subscriber(
            link,
            on_message=self._receive,
            on_lost=self._lose,
            on_confirmed=self._confirm,
        )

    @property
    def is_connected(self) -> bool:
        """Whether signals arrive at the moment."""
        return self._subscriber.is_connected

    @property
    def last_error(self) -> str | None:
        """What happened when signals were last lost; None if they never were."""
        failure = self._subscriber.failure
        if failure is not None:
            return f"Signals arrive no more, by a defect: {failure!r}. Start this process again."
        return self._last_error

    async def start(self) -> None:
        """Listen; return when Redis has confirmed that nothing is missed from here on.

        Raises:
            RedisUnavailable: It did not, or cannot be reached.
            RedisMisconfigured: It refuses us.
        """
        self._subscriber.subscribe(self._channel.encode())
        await self._subscriber.start()
        try:
            async with asyncio.timeout(self._link.timeout_s):
                await self._has_begun.wait()
        except TimeoutError:
            raise RedisUnavailable(
                "Redis accepts connections, but did not confirm a subscription in time."
            ) from None

    async def aclose(self) -> None:
        """Stop listening."""
        await self._subscriber.aclose()

    def _receive(self, channel: bytes, payload: bytes) -> None:
        try:
            fields = orjson.loads(payload)
            kind, run_id = fields["kind"], fields["run_id"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            _log.warning("signal_not_readable", channel=channel.decode(), reason=repr(error))
            return
        if kind == "cancel" and isinstance(run_id, str):
            self._on_cancel(run_id, cancel_asked(fields))
        elif kind == "input" and isinstance(fields.get("answer"), dict):
            self._on_answer(run_id, str(fields.get("request_id")), fields["answer"])
        else:
            # A newer gateway may know signals that this worker does not.
            _log.info("signal_ignored", kind=str(kind)[:64])

    def _lose(self) -> None:
        # The next renewal of the leases brings what was signalled meanwhile: flags and answers.
        self._last_error = "Redis closed the connection on which signals arrive, or fell silent."
        _log.warning("signals_lost")

    def _confirm(self, _channel: bytes) -> None:
        self._has_begun.set()
