"""Control frames of ``relay.v1`` as bytes. Event frames are spliced by ``relay.codec``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from relay.errors import RequestRefused
from relay.events import format_timestamp


def connection_established(
    *,
    connection_id: str,
    user_id: str,
    node: str,
    position: str,
    recovered: bool,
    runs: Sequence[Mapping[str, Any]],
    agents: Sequence[Mapping[str, Any]],
    heartbeat_ms: int,
    limits: Mapping[str, int],
    now_ms: int,
) -> bytes:
    """The first frame of every connection: all that a reloaded page needs to draw itself."""
    return orjson.dumps(
        {
            "type": "connection_established",
            "connection_id": connection_id,
            "user_id": user_id,
            "node": node,
            "position": position,
            "recovered": recovered,
            "runs": runs,
            "agents": agents,
            "heartbeat_ms": heartbeat_ms,
            "limits": limits,
            "server_time": format_timestamp(now_ms),
        }
    )


def heartbeat(position: str, now_ms: int) -> bytes:
    """A sign of life, and a position to resume from where events are rare."""
    return orjson.dumps(
        {"type": "heartbeat", "position": position, "server_time": format_timestamp(now_ms)}
    )


def ack(frame_id: str, **fields: Any) -> bytes:
    """The answer to a request that was carried out."""
    return orjson.dumps({"type": "ack", "id": frame_id, **fields})


def refreshed(frame_id: str, expires_at_ms: int) -> bytes:
    """The answer to ``refresh_token``."""
    return ack(frame_id, expires_at=format_timestamp(expires_at_ms))


def error(refused: RequestRefused, frame_id: str | None = None) -> bytes:
    """The answer to a request that was refused and changed nothing."""
    frame: dict[str, Any] = {"type": "error"}
    if frame_id is not None:
        frame["id"] = frame_id
    frame |= {
        "code": refused.code,
        "message": refused.detail,
        "retryable": refused.retryable,
        "recovery_suggestions": refused.recovery_suggestions,
    }
    if refused.retry_after_ms is not None:
        frame["retry_after_ms"] = refused.retry_after_ms
    return orjson.dumps(frame)


def reset(position: str, reason: str, runs: Sequence[Mapping[str, Any]]) -> bytes:
    """History has been lost: drop all state of runs, what follows replaces it."""
    return orjson.dumps({"type": "reset", "position": position, "reason": reason, "runs": runs})


def degraded(reason: str, since_ms: int) -> bytes:
    """Events may be late until the end of this is announced; none is lost."""
    return orjson.dumps({"type": "degraded", "reason": reason, "since": format_timestamp(since_ms)})


def degraded_ended() -> bytes:
    """Events are delivered live again."""
    return orjson.dumps({"type": "degraded", "ended": True})


def reconnect(after_ms: int, reason: str) -> bytes:
    """This gateway is about to close the connection: come back, to it or another one."""
    return orjson.dumps({"type": "reconnect", "after_ms": after_ms, "reason": reason})


def token_expiring(expires_at_ms: int) -> bytes:
    """Send ``refresh_token`` before this time, or the connection is closed with 4401."""
    return orjson.dumps({"type": "token_expiring", "expires_at": format_timestamp(expires_at_ms)})


def pong(frame_id: str, position: str) -> bytes:
    """The answer to ``ping``."""
    return orjson.dumps({"type": "pong", "id": frame_id, "position": position})
