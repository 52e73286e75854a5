"""The relay's settings: read once where a process is put together, then passed in, frozen.

Sources, strongest first: arguments of ``load_settings`` (command line options), ``RELAY_*``
environment variables, a ``.env`` file in the current folder, the defaults below. The table in
docs/operations.md is checked against this module.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from relay.errors import ConfigurationError
from relay.sentinel_address import SENTINEL_SCHEMES, parse_sentinel_url

ENV_PREFIX = "RELAY_"
ENV_FILE = Path(".env")

MIN_SECRET_BYTES = 32
"""RFC 7518 section 3.2: an HS256 key has at least the size of the hash output."""

REDIS_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "valkey": "redis",
    "valkeys": "rediss",
}
"""Schemes of a Redis address, and what the client library calls them."""

_KEY_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_DAY_S = 86_400
_MIB = 1_048_576

SMALLEST_FRAME_LIMIT = 16_384
"""A connection could not outlive its token if the longest token that opens one (``MAX_TOKEN_CHARS``
of ``relay.tokens``) did not fit in a ``refresh_token`` frame."""


def _whole(default: int, low: int, high: int, description: str, allowed: str | None = None) -> Any:
    return Field(
        default=default,
        ge=low,
        le=high,
        description=description,
        json_schema_extra={"allowed": allowed or f"a whole number from {low} to {high}"},
    )


def _text(default: object, allowed: str, description: str, *, shown: bool = True) -> Any:
    return Field(
        default=default,
        description=description,
        repr=shown,
        json_schema_extra={"allowed": allowed},
    )


class Settings(BaseSettings):
    """Everything that can be configured, with its default. Immutable.

    Make one with ``load_settings``, which words its errors for people.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        # Compose hands over unset variables as empty ones.
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    redis_url: str = _text(
        "redis://127.0.0.1:6379/0",
        "redis://, rediss://, valkey:// or valkeys:// with a host, unix:// with a path, or "
        "redis+sentinel:// or rediss+sentinel:// with Sentinels and a service",
        "Where Redis or Valkey is.",
        shown=False,
    )
    key_prefix: str = _text(
        "relay",
        "1 to 64 of the characters A-Z a-z 0-9 _ . : -",
        "What all Redis keys start with; one prefix for each installation that shares a Redis.",
    )
    host: str = _text("127.0.0.1", "a host name or address", "Where a gateway listens.")
    port: int = _whole(
        8080,
        0,
        65_535,
        "A gateway's port.",
        "a whole number from 0 to 65535; 0 takes a free one",
    )
    admin_host: str = _text(
        "127.0.0.1",
        "a host name or address",
        "Where a gateway's internal listener is: metrics and readiness in detail.",
    )
    admin_port: int = _whole(
        9090,
        0,
        65_535,
        "The internal listener's port.",
        "a whole number from 0 to 65535; 0 takes a free one",
    )
    jwt_secret: Annotated[tuple[SecretStr, ...], NoDecode] = _text(
        (),
        f"one or more secrets, comma-separated, each of at least {MIN_SECRET_BYTES} bytes",
        "Secrets that tokens are verified with; the first one signs. Several for rotation.",
        shown=False,
    )
    jwt_jwks_url: str | None = _text(
        None, "an http:// or https:// address", "Key set of the issuer that signs the tokens."
    )
    jwt_issuer: str | None = _text(
        None, "any text that is not blank", "Required `iss` of a token. Not checked when unset."
    )
    jwt_audience: str | None = _text(
        None,
        "any text that is not blank",
        "Required `aud` of a token. Not checked when unset; required with a key set.",
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = _text(
        (),
        "origins, comma-separated, each like https://chat.example.com or http://localhost:3000",
        "Web origins that may connect beside the gateway's own.",
    )
    default_agent: str | None = _text(
        None,
        "the name of an agent",
        "Agent for a message that names none. When unset: the only one registered.",
    )
    lease_ms: int = _whole(
        15_000, 500, 600_000, "A worker that is not heard of for this long has lost its runs."
    )
    cancel_grace_ms: int = _whole(
        5_000, 0, 600_000, "How long a cancelled agent may take to stop before it is fenced off."
    )
    worker_grace_s: int = _whole(
        600, 0, _DAY_S, "How long a worker that was asked to stop lets its runs go on."
    )
    worker_concurrency: int = _whole(64, 1, 10_000, "Runs that one worker process carries at once.")
    worker_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Where a worker serves its metrics, on `RELAY_ADMIN_HOST`. Nowhere when unset.",
        json_schema_extra={"allowed": "a whole number from 0 to 65535; 0 takes a free one"},
    )
    outbox_bytes: int = _whole(
        262_144, 16_384, 64 * _MIB, "What may wait in memory for one slow client."
    )
    log_max_events: int = _whole(
        1_000, 10, 1_000_000, "Lifecycle events kept for each user. Active runs are kept whole."
    )
    log_max_age_s: int = _whole(_DAY_S, 300, 90 * _DAY_S, "How long events are kept.")
    log_max_bytes: int = _whole(64 * _MIB, 65_536, 1_024 * _MIB, "Bytes of events kept per user.")
    max_connections_per_user: int = _whole(
        20, 1, 10_000, "Connections that one user may have in the whole cluster."
    )
    max_connections_per_node: int = _whole(
        20_000, 1, 1_000_000, "Connections that one gateway takes, of all users."
    )
    max_waiting_sockets: int = _whole(
        4_096, 16, 1_000_000, "Sockets without a whole request; the oldest goes for a newer one."
    )
    max_waiting_sockets_per_address: int = _whole(
        2_048, 1, 1_000_000, "The same, of one address that is no trusted proxy."
    )
    max_failed_logins_per_minute: int = _whole(
        600,
        1,
        1_000_000,
        "Tokens and tickets of one address that may turn out not to be valid.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = _text(
        (),
        "addresses or networks, comma-separated, each like 10.0.0.7 or 10.0.0.0/8",
        "Load balancers whose `X-Forwarded-For` names the client.",
    )
    max_active_runs_per_user: int = _whole(
        10, 1, 10_000, "Runs that one user may have at work at once; more are queued."
    )
    max_queued_runs_per_user: int = _whole(
        100,
        0,
        100_000,
        "Runs that one user may have waiting, besides one in each thread that interrupts what "
        "is ahead of it; more are refused.",
    )
    heartbeat_ms: int = _whole(15_000, 100, 300_000, "Time between heartbeats on a connection.")
    max_frame_bytes: int = _whole(
        65_536, SMALLEST_FRAME_LIMIT, 16 * _MIB, "Largest frame taken from a client."
    )
    max_content_chars: int = _whole(32_768, 1, 4 * _MIB, "Longest content of a user's message.")
    frames_per_second: int = _whole(20, 1, 10_000, "Frames taken from one client in a second.")
    delta_merge_ms: int = _whole(
        20, 0, 1_000, "Streamed text is collected for this long before it is published."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _text(
        "info", "debug, info, warning or error", "Least severe log line that is written."
    )
    log_format: Literal["auto", "console", "json"] = _text(
        "auto",
        "auto, console or json",
        "Form of log lines; auto is console on a terminal and json elsewhere.",
    )

    @field_validator("jwt_secret", "allowed_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme in SENTINEL_SCHEMES:
            parse_sentinel_url(value)
            return value
        if parts.scheme not in REDIS_SCHEMES:
            schemes = ", ".join([*REDIS_SCHEMES, *SENTINEL_SCHEMES])
            raise ValueError(f"the scheme is not one of {schemes}")
        if parts.scheme == "unix":
            if not parts.path:
                raise ValueError("a unix:// address needs the path of the socket")
        elif not parts.hostname:
            raise ValueError("the host is missing")
        else:
            _ = parts.port  # raises ValueError where the port is not a number
            database = parts.path.strip("/")
            if database and not database.isdecimal():
                raise ValueError("the part after the last / is the database's number")
        return f"{REDIS_SCHEMES[parts.scheme]}://{value.partition('://')[2]}"

    @field_validator("key_prefix")
    @classmethod
    def _check_key_prefix(cls, value: str) -> str:
        # A brace would open a hash tag before the user's own one.
        if not _KEY_PREFIX.fullmatch(value):
            raise ValueError("it has a character that is not allowed, or the wrong length")
        return value

    @field_validator("host", "admin_host", "jwt_issuer", "jwt_audience", "default_agent")
    @classmethod
    def _check_not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("it is blank")
        return value

    @field_validator("jwt_secret")
    @classmethod
    def _check_secrets(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        sizes = [len(secret.get_secret_value().encode()) for secret in value]
        short = [str(size) for size in sizes if size < MIN_SECRET_BYTES]
        if short:
            raise ValueError(f"it holds a secret of only {' and '.join(short)} bytes")
        return value

    @field_validator("jwt_jwks_url")
    @classmethod
    def _check_jwks_url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("it is not an http:// or https:// address")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked_origin(origin) for origin in value)

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(network)) for network in value)

    @field_validator("jwt_audience")
    @classmethod
    def _check_audience(cls, value: str | None, info: ValidationInfo) -> str | None:
        # A key set is usually shared by all applications of an identity provider.
        if value is None and info.data.get("jwt_jwks_url"):
            raise ValueError(
                "with RELAY_JWT_JWKS_URL and without an audience, a token that was issued for "
                "another application would be accepted"
            )
        return value

    @property
    def redis_location(self) -> str:
        """The Redis address without its password, for people."""
        return hide_password(self.redis_url)

    @property
    def proxies(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The trusted proxies."""
        return tuple(ip_network(network) for network in self.trusted_proxies)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The JWT secrets in the clear."""
        return tuple(secret.get_secret_value() for secret in self.jwt_secret)

    def require_token_keys(self) -> None:
        """Make sure that tokens can be verified. Every gateway calls this when it starts.

        Raises:
            ConfigurationError: Neither a secret nor a key set is configured.
        """
        if not self.jwt_secret and not self.jwt_jwks_url:
            raise ConfigurationError(
                "A gateway needs a way to verify tokens, and neither RELAY_JWT_SECRET nor "
                "RELAY_JWT_JWKS_URL is set. Set RELAY_JWT_SECRET to at least "
                f"{MIN_SECRET_BYTES} random bytes (openssl rand -hex 32), or RELAY_JWT_JWKS_URL "
                "and RELAY_JWT_AUDIENCE to those of your identity provider."
            )


class _GivenSettings(Settings):
    """Settings from arguments alone."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _checked_origin(origin: str) -> str:
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{origin!r} is not an origin with scheme and host")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{origin!r} has more than scheme, host and port")
    _ = parts.port
    # Browsers send origins in lower case and without a slash (RFC 6454 section 6.2).
    return f"{parts.scheme}://{parts.netloc}".lower()


def load_settings(
    *, env_file: Path | None = ENV_FILE, reads_environment: bool = True, **overrides: object
) -> Settings:
    """Read the settings from arguments, environment and ``.env``.

    Args:
        env_file: File with more variables; ignored where it does not exist.
        reads_environment: Without it only the arguments count, neither variables nor a file.
        **overrides: Values that win over all other sources; None means "not given".

    Raises:
        ConfigurationError: Something is wrong. The text lists *all* problems: variable, value
            (secrets hidden) and what is allowed.
    """
    unknown = set(overrides) - set(Settings.model_fields)
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        if not reads_environment:
            return _GivenSettings(**given)  # type: ignore[arg-type]
        return Settings(_env_file=env_file, **given)  # type: ignore[arg-type]
    except ValidationError as error:
        found = _environment(os.environ, env_file) if reads_environment else {}
        raise ConfigurationError(_describe_errors(error, given, found)) from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(
            f"{env_file} cannot be read: {error}. It must be a text file in UTF-8 with lines "
            "like RELAY_PORT=8080."
        ) from error


def _describe_errors(
    error: ValidationError, given: Mapping[str, object], found: Mapping[str, str]
) -> str:
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        if name in lines:
            continue
        value = given.get(name, found.get(variable_name(name)))
        lines[name] = _describe_error(name, value, problem["type"], problem["msg"])
    if len(lines) == 1:
        return next(iter(lines.values()))
    return "\n".join(
        [f"{len(lines)} settings are wrong:", *(f"- {text}" for text in lines.values())]
    )


def _describe_error(name: str, value: object, kind: str, message: str) -> str:
    allowed = allowed_values(Settings.model_fields[name])
    if value is None:
        return f"{variable_name(name)} is not set ({_reason(message)}). Allowed: {allowed}."
    reason = f" ({_reason(message)})" if kind == "value_error" else ""
    return (
        f"{variable_name(name)}={_shown(name, value)} is not allowed{reason}. Allowed: {allowed}."
    )


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")


def _shown(name: str, value: object) -> str:
    if name == "jwt_secret":
        return "(hidden)"
    if name == "redis_url":
        return repr(hide_password(str(value)))
    return repr(value)


def hide_password(url: str) -> str:
    """Give ``url`` with its password, if it has one, replaced by ``***``."""
    if "://" not in url:
        # Not an address at all, but there may be a password in it.
        return re.sub(r"[^/@]*@", "***@", url, count=1)
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(hidden: not an address)"
    # redis-py also takes the password from the query.
    query = re.sub(r"(?i)(password=)[^&]*", r"\1***", parts.query)
    netloc = parts.netloc
    if "@" in netloc:
        account, _, place = netloc.rpartition("@")
        user, has_password, _ = account.partition(":")
        netloc = f"{user}:***@{place}" if has_password else netloc
    # urlunsplit would drop the slashes of unix:///path.
    return f"{parts.scheme}://{netloc}{parts.path}{f'?{query}' if query else ''}"


def variable_name(field_name: str) -> str:
    """Give the environment variable of a setting."""
    return ENV_PREFIX + field_name.upper()


def allowed_values(field: FieldInfo) -> str:
    """Give what a setting may be, as a phrase."""
    extra = field.json_schema_extra
    return str(extra["allowed"]) if isinstance(extra, dict) else ""


@dataclass(frozen=True, slots=True)
class SettingDescription:
    """One row of the configuration table."""

    variable: str
    default: str
    allowed: str
    description: str


def describe_settings() -> list[SettingDescription]:
    """Give every setting with its default and range, in the order of ``Settings``."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else str(field.default)
        rows.append(
            SettingDescription(
                variable_name(name), default, allowed_values(field), field.description or ""
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class UnknownVariable:
    """A ``RELAY_*`` variable that no setting reads: most likely a misspelt one."""

    name: str
    nearest: str | None

    def __str__(self) -> str:
        hint = f" Did you mean {self.nearest}?" if self.nearest else ""
        return f"{self.name} is set, but there is no such setting.{hint}"


def find_unknown_variables(
    environ: Mapping[str, str] | None = None, env_file: Path | None = ENV_FILE
) -> list[UnknownVariable]:
    """Find variables that look like settings and are none.

    ``RELAY_TEST_*`` belongs to the test suite.
    """
    known = [variable_name(name) for name in Settings.model_fields]
    names: Iterable[str] = _environment(os.environ if environ is None else environ, env_file)
    unknown = []
    for name in sorted(names):
        if name in known or name.startswith("RELAY_TEST_"):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        unknown.append(UnknownVariable(name, near[0] if near else None))
    return unknown


def _environment(environ: Mapping[str, str], env_file: Path | None) -> dict[str, str]:
    """Collect the variables with our prefix, the environment over the file."""
    found: dict[str, str] = {}
    if env_file is not None and env_file.is_file():
        found |= {name.upper(): value or "" for name, value in dotenv_values(env_file).items()}
    found |= {name.upper(): value for name, value in environ.items()}
    return {
        name: value for name, value in found.items() if name.startswith(ENV_PREFIX) and value != ""
    }


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` names this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
