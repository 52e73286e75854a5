"""Settings: what is allowed, how wrong values are named, and that the documents say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from relay.config import (
    Settings,
    describe_settings,
    find_unknown_variables,
    hide_password,
    load_settings,
    variable_name,
)
from relay.errors import ConfigurationError

SECRET = "s" * 32
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("RELAY_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def problem(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    return str(caught.value)


def test_defaults_are_complete() -> None:
    settings = load_settings()
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.port == 8080
    assert settings.jwt_secret == ()
    assert settings.lease_ms == 15_000


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().port = 1  # type: ignore[misc]


def test_options_win_over_variables_and_variables_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "RELAY_PORT=1\nRELAY_HOST=file\nRELAY_KEY_PREFIX=file\nOTHER=x\n"
    )
    monkeypatch.setenv("RELAY_PORT", "2")
    monkeypatch.setenv("RELAY_HOST", "variable")
    settings = load_settings(port=3, host=None)
    assert (settings.port, settings.host, settings.key_prefix) == (3, "variable", "file")


def test_arguments_alone_where_the_environment_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("RELAY_HOST=file\n")
    monkeypatch.setenv("RELAY_LEASE_MS", "60000")
    monkeypatch.setenv("RELAY_WORKER_METRICS_PORT", "9100")
    settings = load_settings(reads_environment=False, port=3, worker_metrics_port=None)
    assert settings == load_settings(
        reads_environment=False, port=3, lease_ms=15_000, host="127.0.0.1"
    )
    assert settings.worker_metrics_port is None
    monkeypatch.setenv("RELAY_PORT", "2")
    with pytest.raises(ConfigurationError, match="RELAY_PORT=70000 is not allowed"):
        load_settings(reads_environment=False, port=70_000)


def test_empty_variables_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_JWT_SECRET", "")
    monkeypatch.setenv("RELAY_PORT", "")
    assert load_settings().port == 8080


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = problem(
        monkeypatch, RELAY_PORT="abc", RELAY_LEASE_MS="1", RELAY_KEY_PREFIX="a{b}", RELAY_HOST=" "
    )
    assert text.startswith("4 settings are wrong:")
    assert "RELAY_PORT='abc' is not allowed. Allowed: a whole number from 0 to 65535" in text
    assert "RELAY_LEASE_MS='1' is not allowed. Allowed: a whole number from 500 to 600000" in text
    assert "RELAY_KEY_PREFIX='a{b}'" in text
    assert "RELAY_HOST=' '" in text


def test_one_wrong_value_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = problem(monkeypatch, RELAY_LOG_LEVEL="loud")
    assert text == "RELAY_LOG_LEVEL='loud' is not allowed. Allowed: debug, info, warning or error."


def test_wrong_option_is_named_as_its_variable() -> None:
    with pytest.raises(ConfigurationError, match="RELAY_PORT=70000 is not allowed"):
        load_settings(port=70_000)


def test_unknown_option_is_a_defect_of_the_caller() -> None:
    with pytest.raises(TypeError, match="prt"):
        load_settings(prt=1)


# --- Secrets ---


def test_several_secrets_for_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_JWT_SECRET", f"{'a' * 32} , {'b' * 40},")
    assert load_settings().secrets == ("a" * 32, "b" * 40)


def test_weak_secret_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = problem(monkeypatch, RELAY_JWT_SECRET=f"{SECRET},tooshort")
    assert "RELAY_JWT_SECRET=(hidden) is not allowed" in text
    assert "8 bytes" in text
    assert "at least 32 bytes" in text
    assert "tooshort" not in text
    assert SECRET not in text


def test_secret_is_measured_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_JWT_SECRET", "é" * 16)
    assert load_settings().secrets == ("é" * 16,)


def test_secrets_do_not_appear_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_JWT_SECRET", SECRET)
    monkeypatch.setenv("RELAY_REDIS_URL", "redis://:hunter2@h/0")
    settings = load_settings()
    for text in (repr(settings), str(settings)):
        assert SECRET not in text
        assert "hunter2" not in text
    assert settings.redis_location == "redis://:***@h/0"


def test_gateway_without_keys_is_told_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="openssl rand -hex 32"):
        load_settings().require_token_keys()


@pytest.mark.parametrize(
    "given",
    [
        {"jwt_secret": SECRET},
        {"jwt_jwks_url": "https://id.example/keys", "jwt_audience": "relay"},
    ],
)
def test_secret_or_key_set_is_enough(given: dict[str, str]) -> None:
    load_settings(**given).require_token_keys()


def test_key_set_without_audience_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = problem(monkeypatch, RELAY_JWT_JWKS_URL="https://id.example/keys")
    assert "RELAY_JWT_AUDIENCE is not set" in text
    assert "another application" in text


@pytest.mark.parametrize("url", ["id.example/keys", "ftp://id.example", "https://"])
def test_key_set_must_be_a_web_address(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    assert "RELAY_JWT_JWKS_URL=" in problem(monkeypatch, RELAY_JWT_JWKS_URL=url)


# --- Addresses ---


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("redis://h:6380/3", "redis://h:6380/3"),
        ("rediss://user:pw@h", "rediss://user:pw@h"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("valkey://h/0", "redis://h/0"),
        ("valkeys://h/0", "rediss://h/0"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
    ],
)
def test_redis_addresses(monkeypatch: pytest.MonkeyPatch, given: str, understood: str) -> None:
    monkeypatch.setenv("RELAY_REDIS_URL", given)
    assert load_settings().redis_url == understood


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://h", "scheme"),
        ("localhost:6379", "scheme"),
        ("redis:///0", "host is missing"),
        ("redis://h:port/0", "ort"),
        ("redis://h/zero", "number"),
        ("unix://", "path"),
        ("redis://[::1/0", "IPv6"),
    ],
)
def test_wrong_redis_addresses(monkeypatch: pytest.MonkeyPatch, url: str, reason: str) -> None:
    text = problem(monkeypatch, RELAY_REDIS_URL=url)
    assert "RELAY_REDIS_URL=" in text
    assert reason in text
    assert "Allowed: redis://" in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:hunter2@h", "http://user:***@h"),
        ("redis://:hunter2@h:1/0", "redis://:***@h:1/0"),
        ("redis://user@h", "redis://user@h"),
        ("redis://h?password=hunter2&db=1", "redis://h?password=***&db=1"),
        ("unix:///run/redis.sock?db=0", "unix:///run/redis.sock?db=0"),
        (":hunter2@h:1", "***@h:1"),
        ("user:hunter2@h", "***@h"),
        ("redis://:hunter2@[::1/0", "(hidden: not an address)"),
    ],
)
def test_passwords_in_addresses_are_hidden(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("https://Chat.Example.com/", ("https://chat.example.com",)),
        (
            "http://localhost:3000, https://a.example",
            ("http://localhost:3000", "https://a.example"),
        ),
    ],
)
def test_origins(monkeypatch: pytest.MonkeyPatch, given: str, understood: tuple[str, ...]) -> None:
    monkeypatch.setenv("RELAY_ALLOWED_ORIGINS", given)
    assert load_settings().allowed_origins == understood


@pytest.mark.parametrize("origin", ["*", "chat.example.com", "https://a.example/chat", "null"])
def test_wrong_origins(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    assert origin in problem(monkeypatch, RELAY_ALLOWED_ORIGINS=f"https://ok.example,{origin}")


@pytest.mark.parametrize("prefix", ["", "a b", "a{b", "a*", "ü", "x" * 65])
def test_wrong_key_prefixes(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="RELAY_KEY_PREFIX"):
        load_settings(key_prefix=prefix)


# --- Slips of the pen ---


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("RELAY_REDIS_UR", "RELAY_REDIS_URL"),
        ("RELAY_JWT_SECRETS", "RELAY_JWT_SECRET"),
        ("relay_max_conections_per_user", "RELAY_MAX_CONNECTIONS_PER_USER"),
        ("RELAY_BANANA", None),
    ],
)
def test_unknown_variable_is_named_with_the_nearest(name: str, nearest: str | None) -> None:
    found = find_unknown_variables({name: "x", "PATH": "/", "RELAY_PORT": "1"})
    assert [(variable.name, variable.nearest) for variable in found] == [(name.upper(), nearest)]


def test_unknown_variable_in_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RELAY_HOTS=x\nDATABASE_URL=y\n")
    assert [variable.name for variable in find_unknown_variables({})] == ["RELAY_HOTS"]


def test_variables_of_the_test_suite_are_known() -> None:
    assert find_unknown_variables({"RELAY_TEST_REDIS": "docker"}) == []


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"RELAY_PORT=\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read"):
        load_settings()


# --- The table in the documents ---


def test_every_number_has_a_range_and_every_setting_a_sentence() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation is int:
            assert {type(rule).__name__ for rule in field.metadata} >= {"Ge", "Le"}, name


@pytest.mark.parametrize(
    "name", [n for n, f in Settings.model_fields.items() if f.annotation is int]
)
def test_ranges_are_enforced_as_they_are_described(name: str) -> None:
    bounds = {type(rule).__name__: rule for rule in Settings.model_fields[name].metadata}
    low, high = bounds["Ge"].ge, bounds["Le"].le  # type: ignore[attr-defined]
    load_settings(**{name: low})
    load_settings(**{name: high})
    for outside in (low - 1, high + 1):
        with pytest.raises(ConfigurationError, match=f"{variable_name(name)}={outside}"):
            load_settings(**{name: outside})


def test_table_in_the_documents_is_that_of_the_code() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `(RELAY_\w+)` \| (.*?) \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    documented = [
        (name, default.strip("`"), allowed, said) for name, default, allowed, said in rows
    ]
    assert documented == [
        (row.variable, row.default, row.allowed, row.description) for row in describe_settings()
    ]
