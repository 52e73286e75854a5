"""Answers to what agents ask their users: checked, then resolved by compare-and-set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import orjson

from relay import clock
from relay.codec import RunEnvelope, text_of
from relay.columns import Columns, lifecycle_columns
from relay.errors import DecodingFailed, RequestRefused
from relay.events import EventType
from relay.keys import Keys
from relay.lifecycle import ENDED
from relay.scripts import RedisLink, mapped_errors

_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class InputAnswer:
    """What a user says to an input request: a value, or a denial."""

    value: Any = None
    is_denied: bool = False


async def answer_input(
    link: RedisLink,
    keys: Keys,
    user_id: str,
    run_id: str,
    request_id: str,
    answer: InputAnswer,
    *,
    by: str = "user",
) -> None:
    """Answer an open input request of the user's run. The first answer wins.

    The answer that won may be given again, until the run is tried again: it is taken as it was
    the first time, and its worker is told again.

    Raises:
        RequestRefused: ``unknown_run``, ``run_ended``, ``unknown_request`` (answered otherwise,
            or expired), ``invalid_frame`` (the value does not fit; the request stays open).
        RedisUnavailable: Whether it was answered is unknown; answering again tells.
    """
    user = keys.user(user_id)
    for _ in range(_ATTEMPTS):
        with mapped_errors(link.url):
            stored = await link.client.hmget(
                user.run(run_id), ["attempt", "thread", "agent", "open_inputs"]
            )
        attempt, thread, agent, open_inputs = (text_of(part) for part in stored)
        if not attempt:
            raise RequestRefused("unknown_run")
        asked = orjson.loads(open_inputs or "{}").get(request_id)
        if asked is not None:
            check_answer(orjson.loads(asked), answer)
        envelope = RunEnvelope(run_id, int(attempt), thread, user_id, agent)
        resolved: dict[str, Any] = {
            "request_id": request_id,
            "outcome": "denied" if answer.is_denied else "answered",
            "by": by,
        }
        if not answer.is_denied:
            resolved["value"] = answer.value
        columns = lifecycle_columns(envelope, EventType.INPUT_RESOLVED, clock.now_ms(), resolved)
        if await resolve_input(link, keys, envelope, request_id, resolved, columns):
            return
    raise RequestRefused("internal", "The run changes too quickly to be answered. Try again.")


def check_answer(asked: Mapping[str, Any], answer: InputAnswer) -> None:
    """Hold a value against what the agent asked for.

    Raises:
        RequestRefused: ``invalid_frame``, with what would be accepted.
    """
    if answer.is_denied:
        return
    kind, schema = asked.get("kind"), asked.get("schema")
    if kind == "approval" and not isinstance(answer.value, bool):
        raise RequestRefused("invalid_frame", "An approval's value is true or false.")
    if kind == "text" and schema is None and not isinstance(answer.value, str):
        raise RequestRefused("invalid_frame", "This request asks for a text.")
    if schema is None:
        return
    try:
        jsonschema.validate(answer.value, schema)
    except jsonschema.ValidationError as error:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise RequestRefused("invalid_frame", f"value{where}: {error.message}") from None
    except jsonschema.SchemaError as error:
        raise RequestRefused(
            "internal", f"The agent's schema cannot be used: {error.message}"
        ) from None


async def resolve_input(
    link: RedisLink,
    keys: Keys,
    envelope: RunEnvelope,
    request_id: str,
    resolved: Mapping[str, Any],
    event: Columns,
) -> bool:
    """Resolve an open request and wake the worker that waits for it.

    Where it is resolved in this way already, only the worker is woken: the first time may have
    ended before that, or before its caller knew.

    Returns:
        False if the run is in another attempt than the event says: build it again.

    Raises:
        RequestRefused: ``unknown_run``, ``run_ended``, ``unknown_request``.
    """
    answer = {name: resolved[name] for name in ("outcome", "value", "by") if name in resolved}
    call = link.call(
        "resolve",
        keys.user(envelope.user_id),
        envelope.run_id,
        envelope.run_id,
        request_id,
        envelope.attempt,
        orjson.dumps(answer),
        *event,
    )
    [reply] = await link.run([call])
    match [text_of(part) for part in reply]:
        case ["ok", worker_id, _]:
            await _wake(link, keys, worker_id, envelope, request_id, answer)
            return True
        case ["answered", _, stored, worker_id] if _is_same(stored, answer):
            await _wake(link, keys, worker_id, envelope, request_id, answer)
            return True
        case ["changed", _]:
            return False
        case ["ended" | "answered", status, *_] if status in ENDED:
            raise RequestRefused("run_ended", f"The run has already ended: {status}.")
        case ["closed"] | ["answered", *_]:
            raise RequestRefused("unknown_request")
        case ["unknown"]:
            raise RequestRefused("unknown_run")
        case other:
            raise DecodingFailed(f"resolve answered {other!r}")


def _is_same(stored: str, answer: Mapping[str, Any]) -> bool:
    """Whether two answers are the same JSON, in whichever order its fields stand."""
    try:
        known = orjson.loads(stored)
    except ValueError as error:
        raise DecodingFailed(f"a run's hash cannot be read: {error}") from error
    # Not by ==, for which 1 is true.
    first, again = (orjson.dumps(one, option=orjson.OPT_SORT_KEYS) for one in (known, answer))
    return first == again


async def _wake(
    link: RedisLink,
    keys: Keys,
    worker_id: str,
    envelope: RunEnvelope,
    request_id: str,
    answer: Mapping[str, Any],
) -> None:
    """Tell the run's worker. The answer in the run's hash is what counts."""
    if not worker_id:
        return
    signal = {
        "kind": "input",
        "user_id": envelope.user_id,
        "run_id": envelope.run_id,
        "request_id": request_id,
        "answer": answer,
    }
    with mapped_errors(link.url):
        await link.client.publish(keys.worker(worker_id), orjson.dumps(signal))
