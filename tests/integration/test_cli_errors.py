"""Whatever is wrong at the start: one sentence on stderr, exit code 1, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import OwnRedis
from tests.support.redis_server import free_port
from tests.support.stack_process import run_relay

SECRET = "s" * 32


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["gateway"], {}, "neither RELAY_JWT_SECRET nor RELAY_JWT_JWKS_URL is set"),
        (["gateway"], {"RELAY_JWT_SECRET": "short"}, "RELAY_JWT_SECRET=(hidden) is not allowed"),
        (["gateway"], {"RELAY_JWT_JWKS_URL": "https://id.example"}, "RELAY_JWT_AUDIENCE"),
        (["gateway", "--port", "99999"], {"RELAY_JWT_SECRET": SECRET}, "RELAY_PORT=99999"),
        (["gateway"], {"RELAY_HEARTBEAT_MS": "never"}, "RELAY_HEARTBEAT_MS='never'"),
        (["worker", "nothing_here:worker"], {}, "There is no module 'nothing_here'"),
        (["worker", "nothing_here"], {}, "MODULE:ATTR"),
        (["token"], {"RELAY_JWT_SECRET": SECRET}, "--user ID"),
        (["token", "--user", "alice"], {}, "There is no secret"),
        (["token", "--user", "x" * 300], {"RELAY_JWT_SECRET": SECRET}, "is not allowed"),
        (["send", "hi"], {"RELAY_JWT_SECRET": SECRET}, "--user"),
        (["send", "hi", "--user", "x" * 300], {"RELAY_JWT_SECRET": SECRET}, "is not allowed"),
        (["tail", "--user", "alice"], {}, "There is no secret"),
        (
            ["send", "hi", "--user", "a", "--url", "ftp://h"],
            {"RELAY_JWT_SECRET": SECRET},
            "is not the address of a relay",
        ),
        (["up", "--redis-url", "amqp://h"], {}, "RELAY_REDIS_URL='amqp://h' is not allowed"),
    ],
)
def test_mistake_is_one_sentence(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], words: str
) -> None:
    done = run_relay(*arguments, folder=tmp_path, **variables)
    assert done.returncode == 1
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert SECRET not in done.stderr


def test_gateway_that_does_not_answer_is_told_at_once_and_at_last(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = run_relay(
        "send", "hi", "--user", "a", "--url", url, folder=tmp_path, RELAY_JWT_SECRET=SECRET
    )
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first.startswith("Warning: Not connected (")
    assert "Connect call failed" in first
    assert last.startswith(f"Error: No gateway could be reached at {url}")


def test_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    done = run_relay("--debug", "token", "--user", "alice", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


async def test_wrong_password_of_redis_is_named(tmp_path: Path, own_redis: OwnRedis) -> None:
    server = await own_redis(password="right")
    url = server.url.replace("right", "wrong")
    variables = {"RELAY_JWT_SECRET": SECRET, "RELAY_PORT": "0", "RELAY_ADMIN_PORT": "0"}
    done = run_relay("gateway", "--redis-url", url, folder=tmp_path, **variables)
    assert done.returncode == 1
    assert "password" in done.stderr
    assert "wrong" not in done.stderr.partition("@")[0]
    assert "Traceback" not in done.stderr


async def test_doctor_names_what_is_wrong_with_redis(tmp_path: Path, own_redis: OwnRedis) -> None:
    server = await own_redis(
        options={"maxmemory-policy": "allkeys-lru", "maxmemory": "100mb", "save": ""}
    )
    done = run_relay(
        "doctor", "--json", "--redis-url", server.url, folder=tmp_path, RELAY_JWT_SECRETS="x"
    )
    found = {
        finding["subject"]: finding
        for finding in map(json.loads, done.stdout.splitlines())
        if finding["verdict"] != "ok"
    }
    assert done.returncode == 1
    assert set(found) == {"Variable", "Tokens", "Persistence", "Eviction"}
    assert found["Eviction"]["verdict"] == "fail"
    assert "noeviction" in found["Eviction"]["remedy"]
    assert found["Persistence"]["verdict"] == "warn"
    assert "RELAY_JWT_SECRET" in found["Variable"]["remedy"]


def test_doctor_without_redis_says_how_to_get_one(tmp_path: Path) -> None:
    done = run_relay("doctor", "--redis-url", "redis://127.0.0.1:1/0", folder=tmp_path)
    assert done.returncode == 1
    assert "does not answer" in done.stdout
    assert "→ Start Redis" in done.stdout
    assert "Traceback" not in done.stderr
