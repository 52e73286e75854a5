"""What ``relay up`` keeps in its data folder, so that the other commands find it.

A secret of its own that survives restarts, and, while it runs, where its parts are.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from relay.config import Settings, load_settings
from relay.errors import ConfigurationError
from relay.tokens import mint_token

FOLDER_NAME = ".relay"
_PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class RunningStack:
    """A ``relay up`` that is running."""

    pid: int
    gateways: list[str]
    redis_url: str = field(repr=False)
    key_prefix: str


class DataFolder:
    """The folder of one ``relay up``."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.redis_dir = self.path / "redis"
        self._secret = self.path / "jwt-secret"
        self._running = self.path / "running.json"

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigurationError: It cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            # It holds a secret and other people's chats: not for version control.
            (self.path / ".gitignore").write_text("*\n")
        except OSError as error:
            raise ConfigurationError(
                f"The data folder {self.path} cannot be written: {error.strerror or error}. "
                "Choose another one with --data-dir."
            ) from error

    def secret(self) -> str | None:
        """Give the secret that tokens are signed with, if there is one."""
        try:
            return self._secret.read_text().strip() or None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigurationError(
                f"{self._secret} cannot be read: {error.strerror or error}."
            ) from error

    def ensure_secret(self) -> str:
        """Give the secret; make one, readable by its owner only, where there is none."""
        secret = self.secret()
        if secret is None:
            secret = secrets.token_hex(32)
            _write_private(self._secret, secret.encode())
        return secret

    def announce(self, stack: RunningStack) -> None:
        """Tell the other commands where the parts are."""
        _write_private(self._running, orjson.dumps(asdict(stack)))

    def withdraw(self) -> None:
        """The parts are going away."""
        self._running.unlink(missing_ok=True)

    def running(self) -> RunningStack | None:
        """Give the stack that runs with this folder; None where none does."""
        try:
            fields = orjson.loads(self._running.read_bytes())
            stack = RunningStack(**fields)
        except (OSError, orjson.JSONDecodeError, TypeError):
            return None
        # A relay up that was killed leaves its note behind.
        return stack if _is_alive(stack.pid) else None


def default_folder() -> DataFolder:
    """Give ``.relay`` in the current folder; in the user's state folder where that is read-only."""
    here = Path.cwd() / FOLDER_NAME
    if os.access(here if here.exists() else here.parent, os.W_OK):
        return DataFolder(here)
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return DataFolder(Path(state) / "agent-relay")


def signing_secret(settings: Settings) -> str:
    """Give what tokens are signed with: the configured secret, or that of ``relay up`` here.

    Raises:
        ConfigurationError: There is neither.
    """
    secret = settings.secrets[0] if settings.secrets else default_folder().secret()
    if secret is None:
        raise ConfigurationError(
            "There is no secret to sign a token with. Set RELAY_JWT_SECRET to that of your "
            "gateways, run the command in the folder where relay up was started, or give a token "
            "of your identity provider with --token where the command takes one."
        )
    return secret


def mint(settings: Settings, user: str, ttl_s: float, scopes: Sequence[str] = ()) -> str:
    """Make a token that the gateways with these settings accept.

    Raises:
        ConfigurationError: There is no secret, or this cannot be a user id.
    """
    secret = signing_secret(settings)
    try:
        return mint_token(
            secret,
            user,
            ttl_s,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            scopes=scopes,
        )
    except ValueError as error:
        raise ConfigurationError(f"--user {user!r} is not allowed: {error}.") from error


def token_source(settings: Settings, user: str, ttl_s: float) -> Callable[[], Awaitable[str]]:
    """Give a function that makes a fresh token for every connection.

    Raises:
        ConfigurationError: As ``mint``: a client would ask again and again.
    """
    mint(settings, user, ttl_s)

    async def fresh() -> str:
        return mint(settings, user, ttl_s)

    return fresh


def gateway_addresses(settings: Settings, url: str | None) -> list[str]:
    """Give where a command finds the gateways: as told, of ``relay up`` here, as configured."""
    if url is not None:
        return [url]
    running = default_folder().running()
    if running is not None and "port" not in settings.model_fields_set:
        return running.gateways
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
    return [f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"]


def operator_settings(redis_url: str | None) -> Settings:
    """Give the settings of a command that speaks to Redis: of ``relay up`` here, unless told."""
    settings = load_settings(redis_url=redis_url)
    running = default_folder().running()
    if running is None or "redis_url" in settings.model_fields_set:
        return settings
    return load_settings(redis_url=running.redis_url, key_prefix=running.key_prefix)


def _write_private(path: Path, content: bytes) -> None:
    # The file is never visible with other rights or with half of its content.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _PRIVATE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content + b"\n")
    fresh.replace(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
