"""Secrets stay where they are needed: not in repr, metrics, answers or logs.

What all other tests log is searched when the session ends (``tests/support/secrets_watch.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import structlog

from agent_worker import AgentWebSocketBridge, Worker
from gateway.app import Gateway, running_gateway
from gateway.requests import RefreshToken
from gateway.session import VerifyToken
from gateway.tickets import TicketOffice
from relay.client import RelayClient
from relay.config import Settings, load_settings
from relay.errors import ConfigurationError, RedisMisconfigured, RedisUnavailable
from relay.jwks import KeySet, key_of_secret
from relay.keys import Keys
from relay.scripts import RedisLink
from relay.tokens import TokenVerifier, mint_token
from tests.integration.gateway_support import http, tab
from tests.support.acl import as_user, password_of
from tests.support.secrets_watch import find_secrets, remember

SECRET = remember("a secret of this file: at least thirty-two bytes", "the secret of test_secrets")
PASSWORD = remember("a-password-of-this-file", "the password of test_secrets")
ROOT = Path(__file__).parents[2]
REDIS = f"redis://gateway:{PASSWORD}@127.0.0.1:1/0"


def assert_hidden(text: str) -> None:
    for secret in (SECRET, PASSWORD):
        assert secret not in text
    assert find_secrets(text) == []


def settings_with_secrets(**overrides: object) -> Settings:
    given = {"redis_url": REDIS, "jwt_secret": SECRET, "port": 0, "admin_port": 0, **overrides}
    return load_settings(env_file=None, **given)


async def test_no_object_shows_its_secrets() -> None:
    settings, token = settings_with_secrets(), mint_token(SECRET, "alice", 60)
    link = RedisLink(settings.redis_url)
    verifier = TokenVerifier([SECRET])
    identity = await verifier.verify(token, time.time())
    try:
        for thing in (
            settings,
            settings.jwt_secret,
            link,
            link.client,
            verifier,
            vars(verifier),
            identity,
            key_of_secret(SECRET),
            KeySet("https://id.example/jwks"),
            TicketOffice(link, Keys()),
            Gateway(settings),
            vars(Gateway(settings)).get("settings"),
            RelayClient("http://127.0.0.1:1", token),
            AgentWebSocketBridge(settings),
            Worker(),
            RefreshToken(type="refresh_token", id="1", token=token),
            VerifyToken("1", token),
        ):
            for shown in (repr(thing), str(thing), f"{thing!r:>10}"):
                assert_hidden(shown)
        assert_hidden(settings.model_dump_json(exclude={"redis_url"}))
    finally:
        await link.aclose()


@pytest.mark.parametrize(
    "url",
    [
        REDIS,
        f"redis://:{PASSWORD}@127.0.0.1:1/0",
        f"redis://127.0.0.1:1/0?password={PASSWORD}",
        f"redis://gateway:{PASSWORD}@127.0.0.1:1/0?timeout=x",
        f"unix:///no/such.sock?password={PASSWORD}",
        f"redis://gateway:{PASSWORD}@h@127.0.0.1:1/0",
    ],
)
async def test_no_error_about_redis_shows_the_password(url: str) -> None:
    try:
        link = RedisLink(url, timeout_s=0.5)
    except RedisMisconfigured as error:
        assert_hidden(str(error))
        return
    try:
        with pytest.raises((RedisUnavailable, RedisMisconfigured)) as caught:
            await link.check()
    finally:
        await link.aclose()
    assert_hidden(str(caught.value))


@pytest.mark.parametrize(
    "given",
    [
        {"redis_url": f"amqp://me:{PASSWORD}@host"},
        {"redis_url": f"{PASSWORD}@host"},
        {"jwt_secret": f"{SECRET},short"},
        {"redis_url": REDIS, "port": 99_999, "jwt_secret": SECRET},
    ],
)
def test_no_error_about_settings_shows_a_secret(given: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(env_file=None, **given)
    assert_hidden(str(caught.value))
    assert "short" not in str(caught.value)


async def test_metrics_and_answers_of_a_gateway_show_no_secret(
    redis_url: str, key_prefix: str
) -> None:
    settings = settings_with_secrets(redis_url=as_user(redis_url, "gateway"), key_prefix=key_prefix)
    async with running_gateway(settings) as gateway:
        admin_token = mint_token(SECRET, "alice", 60, scopes=["relay:admin"])
        texts = []
        async with (
            tab(gateway, secret=SECRET) as alice,
            http(gateway, None) as client,
            httpx.AsyncClient(base_url=gateway.admin_url, trust_env=False) as operator,
        ):
            bad = await alice.ask(type="refresh_token", token=mint_token("x" * 32, "alice", 60))
            assert bad["type"] == "error"
            texts.append(str(bad))
            operator.headers["Authorization"] = f"Bearer {admin_token}"
            asked = [
                (operator, path, {})
                for path in ("/metrics", "/readyz", "/v1/admin/stats", "/v1/admin/dead-letters")
            ]
            asked += [
                (client, path, header)
                for path in ("/healthz", "/readyz", "/v1/runs", f"/v1/runs/{admin_token}")
                for header in ({}, {"Authorization": "Bearer nonsense.of.mine"})
            ]
            for asking, path, header in asked:
                answer = await asking.get(path, headers=header)
                texts.append(answer.text)
            texts.append((await client.get("/v1/ws", params={"token": admin_token})).text)
        assert any("relay_" in text for text in texts)
        for text in texts:
            assert_hidden(text)
            assert password_of("gateway") not in text
            assert "nonsense.of.mine" not in text


def test_watch_finds_what_it_is_for() -> None:
    token = mint_token(SECRET, "alice", 60)
    for leak in (
        f"Authorization: Bearer {token}",
        f'{{"token": "{token}"}}',
        "connecting to redis://gateway:hunter2@redis:6379/0",
        f"the password {PASSWORD} is wrong",
        "GET /v1/ws?ticket=" + "A" * 43,
    ):
        found = find_secrets(leak)
        assert len(found) == 1, leak
        # What it says goes into a log too.
        assert token not in found[0]
        assert "hunter2" not in found[0]
        assert PASSWORD not in found[0]
    for harmless in (
        "redis://gateway:***@127.0.0.1:6379/0",
        "redis://127.0.0.1:6379/0",
        f"http://127.0.0.1:8080/#token={token}",
        "eyJ is how they begin",
    ):
        assert find_secrets(harmless) == []


def test_watch_fails_a_session_whose_tests_run_in_other_processes(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests.support.secrets_watch import SecretsWatch\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(SecretsWatch(config))\n"
    )
    # A secret without a form, so that only the process that runs the test knows it.
    (tmp_path / "test_it.py").write_text(
        "from tests.support.secrets_watch import remember\n"
        "def test_it():\n"
        "    print(remember('shibboleth', 'their secret'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "--numprocesses", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "their secret" in done.stdout
    assert "shibboleth" not in done.stdout


def test_log_lines_of_errors_show_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RedisUnavailable(f"{RedisLink(REDIS)!r} does not answer")
    except RedisUnavailable:
        structlog.get_logger().exception("failed", settings=settings_with_secrets())
    assert_hidden(capsys.readouterr().out)
