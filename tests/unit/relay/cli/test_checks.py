"""What the doctor makes of what it measured."""

from __future__ import annotations

from typing import Any

import pytest

from relay.cli import checks
from relay.cli.checks import Verdict
from relay.config import UnknownVariable, load_settings

SECRET = "s" * 32
BUFFERS = "normal 0 0 0 slave 268435456 67108864 60 pubsub {}"


def test_every_problem_has_a_remedy() -> None:
    findings = [
        checks.check_token_keys(settings(), has_local_secret=False),
        checks.check_limits(settings(max_content_chars=20_000, max_frame_bytes=16_384)),
        checks.check_persistence({}, {}),
        checks.check_persistence({"appendonly": "yes"}, {"aof_last_write_status": "err"}),
        *checks.check_memory({"maxmemory-policy": "allkeys-lru", "maxmemory": "9"}, {}),
        checks.check_pubsub_buffer({"client-output-buffer-limit": BUFFERS.format("0 0 0")}),
        checks.check_replication({"role": "slave"}, {}),
        checks.check_clock(5_000),
        checks.check_round_trip(None, 2),
        *checks.check_variables([UnknownVariable("RELAY_X", None)]),
    ]
    for finding in findings:
        assert (finding.verdict is Verdict.OK) == (not finding.remedy), finding


def settings(**values: Any) -> Any:
    return load_settings(env_file=None, **values)


@pytest.mark.parametrize(
    ("values", "has_local_secret", "verdict"),
    [
        ({}, False, Verdict.FAIL),
        ({}, True, Verdict.OK),
        ({"jwt_secret": SECRET}, False, Verdict.OK),
        ({"jwt_jwks_url": "https://id.example/k", "jwt_audience": "a"}, False, Verdict.OK),
        ({"jwt_jwks_url": "http://id.example/k", "jwt_audience": "a"}, False, Verdict.WARN),
        ({"jwt_jwks_url": "http://localhost/k", "jwt_audience": "a"}, False, Verdict.OK),
    ],
)
def test_token_keys(values: dict[str, str], has_local_secret: bool, verdict: Verdict) -> None:
    found = checks.check_token_keys(settings(**values), has_local_secret=has_local_secret)
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("config", "info", "verdict"),
    [
        ({"appendonly": "yes", "appendfsync": "everysec"}, {}, Verdict.OK),
        ({"appendonly": "yes", "appendfsync": "always"}, {}, Verdict.OK),
        ({"appendonly": "yes", "appendfsync": "no"}, {}, Verdict.WARN),
        ({"appendonly": "no", "save": "3600 1"}, {}, Verdict.WARN),
        ({"appendonly": "no", "save": ""}, {}, Verdict.WARN),
        ({"appendonly": "yes"}, {"aof_last_write_status": "err"}, Verdict.FAIL),
        ({"appendonly": "yes"}, {"rdb_last_bgsave_status": "err"}, Verdict.FAIL),
    ],
)
def test_persistence(config: dict[str, str], info: dict[str, str], verdict: Verdict) -> None:
    assert checks.check_persistence(config, info).verdict is verdict


@pytest.mark.parametrize(
    ("policy", "limit", "used", "verdicts"),
    [
        ("noeviction", "0", 5, (Verdict.OK, Verdict.OK)),
        ("noeviction", "100", 5, (Verdict.OK, Verdict.OK)),
        ("noeviction", "100", 90, (Verdict.OK, Verdict.WARN)),
        ("allkeys-lru", "0", 5, (Verdict.WARN, Verdict.OK)),
        ("volatile-ttl", "100", 5, (Verdict.FAIL, Verdict.OK)),
    ],
)
def test_memory(policy: str, limit: str, used: int, verdicts: tuple[Verdict, Verdict]) -> None:
    found = checks.check_memory(
        {"maxmemory-policy": policy, "maxmemory": limit}, {"used_memory": used}
    )
    assert tuple(finding.verdict for finding in found) == verdicts


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [
        ("33554432 8388608 60", Verdict.OK),
        ("33554432 0 0", Verdict.OK),
        ("0 0 0", Verdict.WARN),
        ("65536 65536 1", Verdict.WARN),
        ("33554432 1024 1", Verdict.WARN),
    ],
)
def test_pubsub_buffer(limit: str, verdict: Verdict) -> None:
    config = {"client-output-buffer-limit": BUFFERS.format(limit)}
    assert checks.check_pubsub_buffer(config).verdict is verdict


@pytest.mark.parametrize(
    ("info", "config", "verdict"),
    [
        ({"role": "master", "connected_slaves": 0}, {}, Verdict.OK),
        ({"role": "master", "connected_slaves": 1}, {"min-replicas-to-write": "1"}, Verdict.OK),
        ({"role": "master", "connected_slaves": 1}, {"min-replicas-to-write": "0"}, Verdict.WARN),
        ({"role": "slave"}, {}, Verdict.FAIL),
    ],
)
def test_replication(info: dict[str, Any], config: dict[str, str], verdict: Verdict) -> None:
    assert checks.check_replication(info, config).verdict is verdict


@pytest.mark.parametrize(
    ("skew_ms", "verdict", "words"),
    [
        (3, Verdict.OK, "3 ms"),
        (-3, Verdict.OK, "3 ms"),
        (2_500, Verdict.WARN, "2.5 s behind"),
        (-2_500, Verdict.WARN, "2.5 s ahead of"),
    ],
)
def test_clock(skew_ms: float, verdict: Verdict, words: str) -> None:
    found = checks.check_clock(skew_ms)
    assert found.verdict is verdict
    assert words in found.fact


@pytest.mark.parametrize(
    ("round_trip_ms", "verdict"), [(0.4, Verdict.OK), (80, Verdict.WARN), (None, Verdict.FAIL)]
)
def test_round_trip(round_trip_ms: float | None, verdict: Verdict) -> None:
    assert checks.check_round_trip(round_trip_ms, 2).verdict is verdict


def test_version_names_valkey_and_cluster() -> None:
    assert (
        checks.check_version({"valkey_version": "8.0", "redis_version": "7.2"}).fact == "Valkey 8.0"
    )
    assert checks.check_version({"redis_version": "7.0", "redis_mode": "cluster"}).remedy
