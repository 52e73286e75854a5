"""What ``relay doctor`` makes of what it measured: pure, one function for each question.

Each finding says what is so, whether that is well, and what to do where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from relay.config import Settings, UnknownVariable, is_loopback

MIN_PUBSUB_BUFFER_BYTES = 1_048_576
"""Sixteen live messages of the largest size (64 KiB)."""

MAX_SKEW_MS = 1_000
MAX_ROUND_TRIP_MS = 50
_FULL = 0.8


class Verdict(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer of the doctor.

    Attributes:
        subject: What was looked at.
        verdict: Whether it is well.
        fact: What was found.
        remedy: What to do; empty where all is well.
    """

    subject: str
    verdict: Verdict
    fact: str
    remedy: str = ""


def check_variables(unknown: Sequence[UnknownVariable]) -> list[Finding]:
    """Name variables that no setting reads."""
    return [
        Finding(
            "Variable",
            Verdict.WARN,
            str(variable),
            f"Rename it to {variable.nearest}, or remove it."
            if variable.nearest
            else "Remove it, or compare it with the table in docs/operations.md.",
        )
        for variable in unknown
    ]


def check_token_keys(settings: Settings, *, has_local_secret: bool) -> Finding:
    """Tell whether a gateway with these settings could verify tokens."""
    subject = "Tokens"
    if settings.jwt_jwks_url:
        parts = urlsplit(settings.jwt_jwks_url)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            return Finding(
                subject,
                Verdict.WARN,
                "The key set is fetched over plain HTTP: whoever is on the way can replace it.",
                "Use the https:// address of your identity provider in RELAY_JWT_JWKS_URL.",
            )
        return Finding(subject, Verdict.OK, f"verified with the key set at {parts.hostname}")
    if settings.jwt_secret:
        count = len(settings.jwt_secret)
        return Finding(
            subject,
            Verdict.OK,
            "verified with a shared secret" if count == 1 else f"verified with {count} secrets",
        )
    if has_local_secret:
        return Finding(subject, Verdict.OK, "verified with the secret of relay up in this folder")
    return Finding(
        subject,
        Verdict.FAIL,
        "Neither RELAY_JWT_SECRET nor RELAY_JWT_JWKS_URL is set; no gateway can start.",
        "Set RELAY_JWT_SECRET to at least 32 random bytes (openssl rand -hex 32), or "
        "RELAY_JWT_JWKS_URL and RELAY_JWT_AUDIENCE to those of your identity provider.",
    )


def check_limits(settings: Settings) -> Finding:
    """Tell whether the configured limits can be reached at all."""
    if settings.max_content_chars > settings.max_frame_bytes:
        return Finding(
            "Limits",
            Verdict.WARN,
            f"A message may have {settings.max_content_chars} characters, but no frame may have "
            f"more than {settings.max_frame_bytes} bytes.",
            "Raise RELAY_MAX_FRAME_BYTES or lower RELAY_MAX_CONTENT_CHARS.",
        )
    return Finding("Limits", Verdict.OK, "fit together")


def check_version(server: Mapping[str, object]) -> Finding:
    """Judge INFO server. Versions that are too old were refused before."""
    valkey = server.get("valkey_version")
    name = f"Valkey {valkey}" if valkey else f"Redis {server.get('redis_version')}"
    if str(server.get("redis_mode", "standalone")) == "cluster":
        return Finding(
            "Version",
            Verdict.WARN,
            f"{name} in cluster mode",
            "Use a standalone Redis: this version of the relay does not follow redirections.",
        )
    return Finding("Version", Verdict.OK, name)


def check_persistence(config: Mapping[str, str], persistence: Mapping[str, object]) -> Finding:
    """Judge what a crash of Redis would cost."""
    subject = "Persistence"
    for field in ("aof_last_write_status", "rdb_last_bgsave_status"):
        if str(persistence.get(field, "ok")) != "ok":
            return Finding(
                subject,
                Verdict.FAIL,
                f"Redis could not write its data to disk ({field}: {persistence[field]}).",
                "Look into Redis' log; most often the disk is full or a folder is read-only.",
            )
    if config.get("appendonly") == "yes":
        sync = config.get("appendfsync", "everysec")
        if sync == "no":
            return Finding(
                subject,
                Verdict.WARN,
                "The append-only file is synced when the system likes; a crash of the machine "
                "loses up to 30 s.",
                "CONFIG SET appendfsync everysec",
            )
        return Finding(subject, Verdict.OK, f"append-only file, synced {sync}")
    if config.get("save"):
        return Finding(
            subject,
            Verdict.WARN,
            f"Snapshots only (save {config['save']}): a crash loses what came after the last one.",
            "CONFIG SET appendonly yes, and in redis.conf",
        )
    return Finding(
        subject,
        Verdict.WARN,
        "Nothing is written to disk: a restart of Redis loses all history and queued runs.",
        "CONFIG SET appendonly yes, and in redis.conf",
    )


def check_memory(config: Mapping[str, str], memory: Mapping[str, object]) -> list[Finding]:
    """Judge what happens when Redis is full."""
    policy = config.get("maxmemory-policy", "noeviction")
    limit = int(config.get("maxmemory", "0") or 0)
    used = int(str(memory.get("used_memory", 0)))
    findings = []
    if policy == "noeviction":
        findings.append(Finding("Eviction", Verdict.OK, "noeviction"))
    else:
        findings.append(
            Finding(
                "Eviction",
                Verdict.FAIL if limit else Verdict.WARN,
                f"maxmemory-policy is {policy}: a full Redis would drop runs and history at "
                "random, silently.",
                "CONFIG SET maxmemory-policy noeviction, and in redis.conf",
            )
        )
    if not limit:
        findings.append(
            Finding("Memory", Verdict.OK, f"{_megabytes(used)} in use, no limit of its own")
        )
    elif used > limit * _FULL:
        findings.append(
            Finding(
                "Memory",
                Verdict.WARN,
                f"{_megabytes(used)} of {_megabytes(limit)} in use; a full Redis refuses events.",
                "Raise maxmemory, or keep less with RELAY_LOG_MAX_AGE_S and RELAY_LOG_MAX_EVENTS.",
            )
        )
    else:
        findings.append(
            Finding("Memory", Verdict.OK, f"{_megabytes(used)} of {_megabytes(limit)} in use")
        )
    return findings


def check_pubsub_buffer(config: Mapping[str, str]) -> Finding:
    """Judge how much a gateway may lag behind before Redis cuts it off."""
    subject = "Pub/sub buffer"
    limits = _output_buffer_limits(config.get("client-output-buffer-limit", "")).get("pubsub")
    if limits is None:
        return Finding(subject, Verdict.OK, "as Redis has it")
    hard, soft, seconds = limits
    setting = "CONFIG SET client-output-buffer-limit 'pubsub 33554432 8388608 60'"
    if hard == 0:
        return Finding(
            subject,
            Verdict.WARN,
            "Unlimited: a gateway that does not read could fill Redis' memory.",
            setting,
        )
    if min(hard, soft or hard) < MIN_PUBSUB_BUFFER_BYTES:
        return Finding(
            subject,
            Verdict.WARN,
            f"Only {min(hard, soft or hard)} bytes: in a burst Redis would cut gateways off, and "
            "they would catch up from history again and again.",
            setting,
        )
    return Finding(
        subject, Verdict.OK, f"{_megabytes(hard)}, or {_megabytes(soft)} for {seconds} s"
    )


def check_replication(replication: Mapping[str, object], config: Mapping[str, str]) -> Finding:
    """Judge what a failover would cost."""
    subject = "Replication"
    if str(replication.get("role", "master")) != "master":
        return Finding(
            subject,
            Verdict.FAIL,
            "This is a replica; it takes no writes.",
            "Point RELAY_REDIS_URL at the primary.",
        )
    replicas = int(str(replication.get("connected_slaves", 0)))
    if not replicas:
        return Finding(subject, Verdict.OK, "no replicas")
    if int(config.get("min-replicas-to-write", "0") or 0) == 0:
        return Finding(
            subject,
            Verdict.WARN,
            f"{replicas} connected, but a primary that lost all of them would go on taking "
            "writes, and a failover would lose those.",
            "CONFIG SET min-replicas-to-write 1 and min-replicas-max-lag 10",
        )
    return Finding(subject, Verdict.OK, f"{replicas} connected, writes need at least one")


def check_clock(skew_ms: float) -> Finding:
    """Judge how far this machine's clock is from Redis' clock (positive: Redis is ahead)."""
    if abs(skew_ms) <= MAX_SKEW_MS:
        return Finding("Clock", Verdict.OK, f"{abs(skew_ms):.0f} ms from Redis' clock")
    direction = "behind" if skew_ms > 0 else "ahead of"
    return Finding(
        "Clock",
        Verdict.WARN,
        f"This machine is {abs(skew_ms) / 1000:.1f} s {direction} Redis: tokens expire at the "
        "wrong time, and timestamps of one run contradict each other.",
        "Switch on time synchronisation (NTP) on both machines.",
    )


def check_round_trip(round_trip_ms: float | None, timeout_s: float) -> Finding:
    """Judge the way of a message through Redis' pub/sub."""
    subject = "Round trip"
    if round_trip_ms is None:
        return Finding(
            subject,
            Verdict.FAIL,
            f"A message that was published did not come back within {timeout_s:.0f} s.",
            "Check whether a proxy or an ACL rule (&channel patterns) stands between this "
            "machine and Redis' pub/sub.",
        )
    if round_trip_ms > MAX_ROUND_TRIP_MS:
        return Finding(
            subject,
            Verdict.WARN,
            f"{round_trip_ms:.0f} ms through pub/sub; every event takes at least that long.",
            "Move gateways and workers nearer to Redis, or look for what slows it: "
            "redis-cli --latency",
        )
    return Finding(subject, Verdict.OK, f"{round_trip_ms:.1f} ms through pub/sub")


def _output_buffer_limits(text: str) -> dict[str, tuple[int, int, int]]:
    """Read ``normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60``."""
    words = text.split()
    return {
        words[at]: (int(words[at + 1]), int(words[at + 2]), int(words[at + 3]))
        for at in range(0, len(words) - 3, 4)
    }


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1_048_576:.1f} MiB"
