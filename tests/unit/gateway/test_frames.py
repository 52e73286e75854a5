"""Control frames: one JSON object each, with exactly the documented fields."""

from __future__ import annotations

import orjson

from gateway import frames
from relay.errors import RequestRefused

NOW = 1_763_870_400_123


def test_fields_of_every_control_frame() -> None:
    established = frames.connection_established(
        connection_id="c", user_id="alice", node="n", position="e:5", recovered=False, runs=[],
        agents=[{"name": "a", "description": "d"}], heartbeat_ms=15_000,
        limits={"max_frame_bytes": 1}, now_ms=NOW,
    )  # fmt: skip
    assert orjson.loads(established) == {
        "type": "connection_established",
        "connection_id": "c",
        "user_id": "alice",
        "node": "n",
        "position": "e:5",
        "recovered": False,
        "runs": [],
        "agents": [{"name": "a", "description": "d"}],
        "heartbeat_ms": 15_000,
        "limits": {"max_frame_bytes": 1},
        "server_time": "2025-11-23T04:00:00.123Z",
    }
    cases = {
        frames.heartbeat("e:5", NOW): ["type", "position", "server_time"],
        frames.ack("1", run_id="r", duplicate=False): ["type", "id", "run_id", "duplicate"],
        frames.refreshed("1", NOW): ["type", "id", "expires_at"],
        frames.reset("e:5", "lost", []): ["type", "position", "reason", "runs"],
        frames.degraded("away", NOW): ["type", "reason", "since"],
        frames.degraded_ended(): ["type", "ended"],
        frames.reconnect(5, "drain"): ["type", "after_ms", "reason"],
        frames.token_expiring(NOW): ["type", "expires_at"],
        frames.pong("1", "e:5"): ["type", "id", "position"],
    }
    for frame, names in cases.items():
        assert list(orjson.loads(frame)) == names


def test_error_has_an_id_only_where_the_request_had_one() -> None:
    refused = RequestRefused("thread_busy", retry_after_ms=5)
    with_id, without = frames.error(refused, "7"), frames.error(refused)
    names = ["code", "message", "retryable", "recovery_suggestions", "retry_after_ms"]
    assert list(orjson.loads(with_id)) == ["type", "id", *names]
    assert list(orjson.loads(without)) == ["type", *names]
