"""The link to Redis: connections that know their server, and the Lua scripts.

Every change of state is one script. Each call carries the identity of the server
(``master_replid``) as it was when the connection was made: after a failover or a restart that
lost history, the script notices and begins a new epoch (ADR 0001).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from relay import key_probes
from relay.config import Settings, hide_password
from relay.errors import RedisMisconfigured, RedisUnavailable, RelayError
from relay.keys import SCRIPT_CONSTANTS, UserKeys
from relay.redis_connections import obey_cancellation
from relay.redis_refusals import explain_refusal, explain_tls, hint_at_tls, is_refusal
from relay.resp import pack
from relay.sentinel import make_master_pool
from relay.sentinel_address import SENTINEL_SCHEMES

OLDEST_REDIS = (6, 2)
SCHEMES = ("redis", "rediss", "unix", "valkey", "valkeys", *SENTINEL_SCHEMES)

_PARTS: dict[str, tuple[str, ...]] = {
    "publish": ("publish_usual", "_channel", "_append", "_run", "_lanes", "publish"),
    "submit": ("_channel", "_append", "_run", "_lanes", "submit"),
    "open": ("_channel", "_append", "_run", "_lanes", "open"),
    "claim": ("_channel", "_run", "_lanes", "claim"),
    "release": ("_channel", "_run", "release"),
    "renew": ("_channel", "_run", "renew"),
    "look": ("_channel", "_lanes", "look"),
    "amend": ("_channel", "_append", "_run", "_lanes", "amend"),
    "resolve": ("_channel", "_append", "_run", "resolve"),
    "cancel": ("_channel", "_append", "_run", "_lanes", "cancel"),
    "notice": ("_channel", "_append", "notice"),
    "read": ("_channel", "read"),
    "piece": ("_channel", "piece"),
    "rotate": ("_channel", "rotate"),
    "place_take": ("place_take",),
    "place_hold": ("place_hold",),
    "place_free": ("place_free",),
}

# Answers that say "not now": the server starts, is full, or is no longer the master.
_PASSING = ("LOADING", "READONLY", "OOM", "BUSY", "MASTERDOWN", "NOREPLICAS", "MISCONF", "TRYAGAIN")
# The client library gives some of these answers types of their own and cuts the word off the text.
_PASSING_ERRORS = (
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
    redis_errors.ClusterDownError,
)
_REFUSALS = (redis_errors.AuthenticationError, redis_errors.NoPermissionError)


class ScriptFailed(RelayError):
    """A script answered with an error that retrying will not cure. This is a defect."""


class KeyTaken(ScriptFailed):
    """A key holds something else than the relay's data. The text names it and what to do."""


class Script(NamedTuple):
    """A Lua script and the name under which Redis keeps it."""

    name: str
    source: bytes
    sha: str


_CONSTANT = re.compile(rb"\b(?:%s)\b" % "|".join(SCRIPT_CONSTANTS).encode())


def _value_of(name: re.Match[bytes]) -> bytes:
    return b"%d" % SCRIPT_CONSTANTS[name[0].decode()]


def load_scripts() -> dict[str, Script]:
    """Read the Lua files of this package.

    The shared parts of an operation stand before it. Names of constants of ``relay.keys`` are
    replaced by their values: locals of a script, and above all those that its functions share,
    cost with each call.
    """
    folder = resources.files("relay") / "lua"
    scripts = {}
    for name, parts in _PARTS.items():
        files = [(folder / f"{part}.lua").read_bytes() for part in parts]
        source = _CONSTANT.sub(_value_of, b"\n".join(files))
        sha = hashlib.sha1(source, usedforsecurity=False).hexdigest()
        scripts[name] = Script(name, source, sha)
    return scripts


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How much of a user's history is kept; events of active runs are kept up to ten times that."""

    max_events: int = 1_000
    max_age_ms: int = 86_400_000
    max_bytes: int = 64 * 1024 * 1024

    @classmethod
    def of(cls, settings: Settings) -> LogLimits:
        """Give what settings say: every process that writes for a user trims by its own."""
        return cls(settings.log_max_events, settings.log_max_age_s * 1000, settings.log_max_bytes)


class ScriptCall(NamedTuple):
    """One call, ready to be sent once the connection's server identity is known."""

    script: Script
    keys: tuple[str, ...]
    epoch: str
    args: tuple[str | bytes | int, ...]


def server_identity(info: bytes) -> str:
    """Read from ``INFO replication`` what scripts are told of the server, "unknown" to ask it."""
    match = re.search(rb"master_replid:([0-9a-f]+)", info)
    # A replica that is promoted keeps its connections: on one to a replica nothing can be known for
    # long, and each script asks the server itself.
    is_master = b"role:master" in info
    return match[1].decode() if match and is_master else "unknown"


class RedisLink:
    """Connections to one Redis, with translated errors and script calls.

    Args:
        url: ``redis://``, ``rediss://`` (TLS), ``valkey://``, ``valkeys://`` or ``unix://``; or
            that of a master's Sentinels (``relay.sentinel_address``).
        limits: What the scripts keep of each user's history.
        max_connections: Most connections at a time; callers wait for a free one.
        timeout_s: How long a connection attempt or an answer may take.
    """

    def __init__(
        self,
        url: str,
        *,
        limits: LogLimits | None = None,
        max_connections: int = 16,
        timeout_s: float = 5.0,
    ) -> None:
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES or "://" not in url:
            raise RedisMisconfigured(
                f"{hide_password(url)!r} is not a Redis URL: it must begin with "
                + ", ".join(f"{name}://" for name in SCHEMES)
            )
        self.url = url
        self.limits = limits or LogLimits()
        self.timeout_s = timeout_s
        self.scripts = load_scripts()
        # What has connections of its own to this Redis, for ``aclose``.
        self.on_close: list[Callable[[], Awaitable[None]]] = []
        self._instances: weakref.WeakKeyDictionary[AbstractConnection, str] = (
            weakref.WeakKeyDictionary()
        )
        redis_url = "redis" + url[len("valkey") :] if scheme.startswith("valkey") else url
        options: dict[str, Any] = {
            "max_connections": max_connections,
            "timeout": timeout_s,
            "protocol": 2,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": self._on_connect,
        }
        self.pool: BlockingConnectionPool
        try:
            if scheme in SENTINEL_SCHEMES:
                self.pool, sentinel = make_master_pool(redis_url, **options)
                self.on_close.append(sentinel.aclose)
            else:
                self.pool = BlockingConnectionPool.from_url(redis_url, **options)
        except ValueError as error:
            raise RedisMisconfigured(f"{hide_password(url)!r}: {error}") from error
        obey_cancellation(self.pool)
        self.client: Redis = Redis(connection_pool=self.pool)

    async def _on_connect(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "replication", check_health=False)
        self._instances[connection] = server_identity(await connection.read_response())

    def call(
        self, name: str, user: UserKeys, run_id: str | None, *args: str | bytes | int
    ) -> ScriptCall:
        """Prepare a script call on one user's keys.

        Args:
            name: The script.
            user: Whose channel it works on.
            run_id: The run concerned, if one is.
            args: The operation's own arguments, from ARGV[6] on.
        """
        keys: tuple[str, ...] = (
            user.channel,
            user.log,
            user.texts,
            user.live,
            user.runs,
            user.threads,
        )
        if run_id is not None:
            keys = (*keys, user.run(run_id))
        return ScriptCall(self.scripts[name], keys, secrets.token_hex(6), args)

    async def run(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Send script calls in one pipeline.

        Safe to send again after ``RedisUnavailable``: every script gives the same answer to
        the same call.

        Returns:
            The answers in the order of the calls, bytes as Redis sent them.

        Raises:
            RedisUnavailable: No connection, no answer in time, or "not now" from the server.
            RedisMisconfigured: Wrong password or missing rights.
            ScriptFailed: A script failed; nothing can be said about the calls after it.
        """
        replies = await self.run_each(calls)
        for reply in replies:
            if isinstance(reply, ScriptFailed):
                raise reply
        return replies

    async def run_each(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Send script calls in one pipeline; one that fails does not hide the others' answers.

        Returns:
            For each call its answer, or the ``ScriptFailed`` that it ended with; ``KeyTaken``
            where a key holds something else.

        Raises:
            RedisUnavailable, RedisMisconfigured: As for ``run``.
        """
        replies = await self._run_each(calls)
        for index, reply in enumerate(replies):
            if isinstance(reply, ScriptFailed):
                replies[index] = await self.locate(calls[index].keys, reply)
        return replies

    async def _run_each(self, calls: Sequence[ScriptCall]) -> list[Any]:
        return await self._on_connection(lambda connection: self._exchange(connection, calls))

    async def ask_each(self, commands: Sequence[tuple[str, ...]]) -> list[Any]:
        """Send commands in one pipeline.

        Returns:
            For each its answer, an error that Redis answered as an exception.

        Raises:
            RedisUnavailable, RedisMisconfigured: As for ``run``.
        """

        async def ask(connection: AbstractConnection) -> list[Any]:
            await connection.connect()  # type: ignore[no-untyped-call]
            return await self._write_and_read(connection, [pack(*words) for words in commands])

        return await self._on_connection(ask)

    async def _on_connection(
        self, exchange: Callable[[AbstractConnection], Awaitable[list[Any]]]
    ) -> list[Any]:
        with mapped_errors(self.url):
            connection: AbstractConnection = await self.pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            with mapped_errors(self.url):
                return await exchange(connection)
        except BaseException:
            # Answers may still be on their way; another caller must not read them as its own.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self.pool.release(connection)

    async def _exchange(
        self, connection: AbstractConnection, calls: Sequence[ScriptCall]
    ) -> list[Any]:
        await connection.connect()  # type: ignore[no-untyped-call]
        replies = await self._send(connection, calls)
        missing = [index for index, reply in enumerate(replies) if _is_unknown_script(reply)]
        if missing:
            sources = {calls[index].script.source for index in missing}
            loads = b"".join([pack("SCRIPT", "LOAD", source) for source in sources])
            await connection.send_packed_command(loads)
            for _ in sources:
                await connection.read_response()
            again = await self._send(connection, [calls[index] for index in missing])
            for index, reply in zip(missing, again, strict=True):
                replies[index] = reply
        return [
            self._outcome_of(call.script, reply) for call, reply in zip(calls, replies, strict=True)
        ]

    def _outcome_of(self, script: Script, reply: Any) -> Any:
        return self.understood(script, reply) if isinstance(reply, Exception) else reply

    def understood(self, script: Script, reply: Exception) -> ScriptFailed:
        """Give an error that Redis answered to a script as what it means for this call alone.

        Raises:
            RedisUnavailable, RedisMisconfigured: It means that for every call.
        """
        try:
            with mapped_errors(self.url, script.source):
                raise reply
        except ScriptFailed as error:
            return error

    async def locate(self, keys: Sequence[str], error: ScriptFailed) -> ScriptFailed:
        """Find the key that a script on these keys stumbled over.

        Args:
            keys: Those of the call, all of one user.
            error: What the script ended with.

        Returns:
            ``KeyTaken`` if a key is of the wrong type, otherwise the error as it was.
        """
        if not key_probes.is_wrong_type(str(error)):
            return error
        try:
            found = await self._find_misfit(key_probes.probes(keys))
            if found is None:
                listings = key_probes.list_members(keys)
                members = await self.ask_each(listings)
                names: list[str] = []
                for (_, set_key, *_), listed in zip(listings, members, strict=True):
                    names += key_probes.member_keys(set_key, listed)
                found = await self._find_misfit(key_probes.probes(names))
        except RelayError:
            # Redis has gone meanwhile. What it said before is still so.
            return error
        if found is None:
            return KeyTaken(key_probes.explain_unknown(keys))
        return KeyTaken(key_probes.explain(found))

    async def _find_misfit(self, probes: Sequence[key_probes.Probe]) -> key_probes.Probe | None:
        answers = await self.ask_each([probe.command for probe in probes])
        for probe, answer in zip(probes, answers, strict=True):
            if isinstance(answer, Exception) and key_probes.is_wrong_type(str(answer)):
                return probe
        return None

    def instance_of(self, connection: AbstractConnection) -> str:
        """Give the identity of the server that a connection leads to."""
        return self._instances[connection]

    @property
    def bounds(self) -> tuple[int, int, int]:
        """The limits of a user's history, in the order that scripts want."""
        return (self.limits.max_events, self.limits.max_age_ms, self.limits.max_bytes)

    def command(self, call: ScriptCall, instance: str) -> tuple[str | bytes | int, ...]:
        """Give the words of a call's EVALSHA."""
        script = ("EVALSHA", call.script.sha, len(call.keys))
        return (*script, *call.keys, instance, call.epoch, *self.bounds, *call.args)

    async def _send(self, connection: AbstractConnection, calls: Sequence[ScriptCall]) -> list[Any]:
        instance = self.instance_of(connection)
        commands = [pack(*self.command(call, instance)) for call in calls]
        return await self._write_and_read(connection, commands)

    async def _write_and_read(
        self, connection: AbstractConnection, commands: Sequence[bytes]
    ) -> list[Any]:
        await connection.send_packed_command(b"".join(commands))
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except redis_errors.ResponseError as error:
                replies.append(error)
        return replies

    async def check(self) -> None:
        """Make sure that this Redis can serve the relay.

        Raises:
            RedisUnavailable: It does not answer.
            RedisMisconfigured: It answers, but refuses us or is too old.
        """
        where = hide_password(self.url)
        try:
            with mapped_errors(self.url):
                info = await self.client.info("server")
        except RedisUnavailable as error:
            reason = str(error).rstrip(".")
            # Nobody says more than this where one side speaks TLS and the other does not; which of
            # them depends on who was faster.
            is_mute = any(word in reason for word in ("reset", "lost", "closed", "Timeout"))
            hint = hint_at_tls(self.url) if is_mute else ""
            raise RedisUnavailable(
                f"{reason}. Start it, or correct RELAY_REDIS_URL.{hint}"
            ) from error
        except ScriptFailed as error:
            # No script has run yet: it is the address, such as the number of a database.
            raise RedisMisconfigured(
                f"Redis at {where} refuses us: {error}. Correct RELAY_REDIS_URL."
            ) from error
        version = str(info.get("redis_version", "0"))
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers < OLDEST_REDIS:
            raise RedisMisconfigured(
                f"Redis at {where} is version {version}; "
                "the relay needs Redis 6.2 or newer, or Valkey."
            )

    async def aclose(self) -> None:
        """Close all connections."""
        for close in self.on_close:
            await close()
        await self.client.aclose()
        await self.pool.aclose()


def _is_unknown_script(reply: Any) -> bool:
    return isinstance(reply, redis_errors.NoScriptError)


class mapped_errors:  # noqa: N801 -- used as a statement, like contextlib's own
    """Translate the client library's errors, once, at the edge.

    Args:
        url: Which Redis was asked.
        source: Of the script that it ran.
    """

    def __init__(self, url: str, source: bytes = b"") -> None:
        self._url = url
        self._source = source

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Translate what was raised.

        Raises:
            RedisUnavailable: The server is away or busy.
            RedisMisconfigured: The server refuses us.
            ScriptFailed: Any other error that the server answered.
        """
        if error is None or isinstance(error, RelayError):
            return
        where = hide_password(self._url)
        text = str(error)
        if isinstance(error, _REFUSALS) or is_refusal(text):
            reason = explain_refusal(text, self._url, self._source)
            raise RedisMisconfigured(f"Redis at {where} refuses us: {reason}") from error
        if tls := explain_tls(error, self._url):
            raise RedisMisconfigured(f"Redis at {where} cannot be used: {tls}") from error
        if isinstance(
            error,
            redis_errors.ConnectionError
            | redis_errors.TimeoutError
            | OSError
            | asyncio.TimeoutError,
        ):
            raise RedisUnavailable(f"Redis at {where} does not answer: {text}") from error
        if isinstance(error, redis_errors.ResponseError):
            if (
                isinstance(error, _PASSING_ERRORS)
                or text.startswith(_PASSING)
                # Redis 6.2 wraps what a command within a script was refused with.
                or any(f"-{word} " in text for word in _PASSING)
            ):
                raise RedisUnavailable(f"Redis at {where} cannot serve us now: {text}") from error
            raise ScriptFailed(text) from error
