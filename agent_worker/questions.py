"""What an attempt asks its user: asked, waited for, and closed on every way out."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import structlog

from agent_worker.errands import Errands
from relay import clock
from relay.errors import InputDenied, InputExpired, InvalidEvent, RelayError
from relay.events import EventType, format_timestamp

if TYPE_CHECKING:
    from agent_worker.outlet import Outlet

InputKind = Literal["approval", "text", "choice"]

DEFAULT_TIMEOUT_S = 300.0
LONGEST_TIMEOUT_S = 7 * 86_400.0

RECHECK_S = 1.0
"""How long after the expiry the reaper is asked again to enforce it: clocks differ."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class InputReply:
    """What became of an input request: ``answered`` with a value, ``denied``, or ``expired``."""

    outcome: str
    value: Any
    by: str


class Questions:
    """The input requests of one attempt.

    The request's expiry is enforced in Redis, by the reaper: whatever happens to this process, the
    user is told, and an answer that came in time counts.

    Args:
        outlet: Where they are published.
        errands: How the reaper is told when a request expires.
    """

    def __init__(self, outlet: Outlet, errands: Errands) -> None:
        self._outlet = outlet
        self._errands = errands
        self._waiting: dict[str, asyncio.Future[InputReply]] = {}

    async def ask(
        self,
        kind: InputKind,
        prompt: str,
        schema: Mapping[str, Any] | None,
        timeout_s: float,
    ) -> Any:
        """Ask, and give the answer's value.

        Raises:
            InputDenied: The user refused to answer.
            InputExpired: No answer came in time.
            InvalidEvent: A part of the question is not allowed; it reached nobody.
        """
        _require_timeout(timeout_s)
        _require_schema(schema)
        request_id = f"req_{secrets.token_hex(8)}"
        reply = await self._reply(request_id, kind, prompt, schema, timeout_s)
        if reply.outcome == "answered":
            return reply.value
        if reply.outcome == "denied":
            raise InputDenied(request_id)
        raise InputExpired(request_id)

    async def _reply(
        self,
        request_id: str,
        kind: InputKind,
        prompt: str,
        schema: Mapping[str, Any] | None,
        timeout_s: float,
    ) -> InputReply:
        expires_ms = clock.now_ms() + round(timeout_s * 1000)
        waiting: asyncio.Future[InputReply] = asyncio.get_running_loop().create_future()
        # Known before it is published: the answer may overtake the acknowledgement.
        self._waiting[request_id] = waiting
        try:
            await self._outlet.publish(
                EventType.INPUT_REQUESTED,
                {
                    "request_id": request_id,
                    "prompt": prompt,
                    "schema": None if schema is None else dict(schema),
                    "expires_at": format_timestamp(expires_ms),
                    "kind": kind,
                },
            )
            await self._outlet.flush()
            await self._errands.look_no_later(expires_ms)
            while not waiting.done():
                left_s = max(0.0, (expires_ms - clock.now_ms()) / 1000) + RECHECK_S
                await asyncio.wait({waiting}, timeout=left_s)
                if not waiting.done():
                    await self._errands.look_no_later(clock.now_ms())
            return waiting.result()
        except asyncio.CancelledError:
            await self._withdraw(request_id)
            raise
        finally:
            del self._waiting[request_id]

    def close(self) -> None:
        """Let whoever still waits be cancelled: the attempt is over, no answer comes any more."""
        for waiting in self._waiting.values():
            waiting.cancel()

    async def _withdraw(self, request_id: str) -> None:
        """Close a request that nobody waits for any more; an answer that came before counts."""
        try:
            await self._outlet.withdraw_input(request_id)
        except RelayError as refusal:
            # Whoever ends the run closes it; the cancellation must go on.
            _log.debug("input_not_withdrawn", request_id=request_id, reason=str(refusal))

    def receive(self, request_id: str, answer: Mapping[str, Any]) -> None:
        """Take what became of a request; ignored where nobody waits for it."""
        waiting = self._waiting.get(request_id)
        if waiting is None or waiting.done():
            return
        self._outlet.input_closed(request_id)
        reply = InputReply(
            str(answer.get("outcome")), answer.get("value"), str(answer.get("by", "user"))
        )
        waiting.set_result(reply)


def choice_schema(choices: Sequence[Any]) -> dict[str, Any]:
    """Give the schema that allows exactly these values.

    Raises:
        InvalidEvent: There are none.
    """
    if isinstance(choices, str) or not choices:
        raise InvalidEvent("input_requested: choices must be a list of at least one value")
    return {"enum": list(choices)}


def _require_timeout(timeout_s: object) -> None:
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not (is_number and math.isfinite(timeout_s) and 0 < timeout_s <= LONGEST_TIMEOUT_S):  # type: ignore[arg-type, operator]
        raise InvalidEvent(
            f"input_requested: timeout_s={timeout_s!r} is not allowed. Allowed: seconds, more "
            "than 0, at most a week."
        )


def _require_schema(schema: Mapping[str, Any] | None) -> None:
    if schema is None:
        return
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InvalidEvent(f"input_requested: schema: {error.message}") from None
