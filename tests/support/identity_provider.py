"""A real OpenID Connect provider on this machine, and what a user does to get a token from it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlencode, urljoin, urlsplit

import httpx
import jwt.algorithms
from cryptography.hazmat.primitives.asymmetric import rsa

from relay.testing.processes import ManagedProcess
from tests.support.redis_server import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

SOURCES = Path(__file__).parents[1] / "e2e" / "oidc"
CACHE = Path(__file__).parents[2] / ".ci" / "cache"
START_DEADLINE_S = 30.0

RELAY = "https://relay.example/api"
"""The audience that the tests' gateways ask for."""

ANOTHER = "https://another.example/api"
"""Another application of the same provider."""


def make_key(key_id: str) -> dict[str, Any]:
    """Make a signing key, as a private JSON Web Key."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    key: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(private, as_dict=True)
    return {**key, "kid": key_id, "use": "sig", "alg": "RS256"}


def install() -> Path:
    """Install the provider as its lock file says, once; give its folder."""
    lock = (SOURCES / "package-lock.json").read_bytes()
    folder = CACHE / f"oidc-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")
        fresh.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCES / name, fresh)
        done = subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=fresh,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # Whole or not at all: an installation that was broken off must not be taken for one.
        fresh.rename(folder)
    shutil.copy(SOURCES / "provider.mjs", folder)
    return folder


@dataclass
class IdentityProvider:
    """The provider as a process; an async context manager.

    Attributes:
        folder: Where its log goes.
        redirect_uri: Where it sends a browser after login and consent.
        keys: Its signing keys; the first one signs. ``rotate`` changes them.
    """

    folder: Path
    redirect_uri: str
    keys: list[dict[str, Any]] = field(default_factory=lambda: [make_key("first")])
    ttl_s: int = 600
    port: int = field(default_factory=free_port)

    @property
    def issuer(self) -> str:
        """Its name in tokens, and its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> dict[str, str]:
        """What a gateway needs to take its tokens, by the names of settings."""
        return {
            "jwt_jwks_url": f"{self.issuer}/jwks",
            "jwt_issuer": self.issuer,
            "jwt_audience": RELAY,
        }

    @property
    def key_set_reads(self) -> int:
        """How often its key set has been read since its last start."""
        return self._process.log.rpartition("READY\n")[2].count("KEY SET READ")

    async def __aenter__(self) -> Self:
        folder = await asyncio.to_thread(install)
        self._configuration = self.folder / "provider.json"
        self._process = ManagedProcess(
            ["sh", "-c", 'exec node provider.mjs <"$1"', "sh", str(self._configuration)],
            environment={**os.environ, "NODE_ENV": "test"},
            folder=folder,
            log_path=self.folder / "provider.log",
        )
        await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self._process.log)
        self._process.end_blocking()

    async def rotate(self, keys: Sequence[dict[str, Any]]) -> None:
        """Restart it with other signing keys; the first one signs."""
        await self._process.kill()
        self.keys = list(keys)
        await self._start()

    async def _start(self) -> None:
        configuration = {
            "port": self.port,
            "jwks": self.keys,
            "resources": [RELAY, ANOTHER],
            "redirect_uri": self.redirect_uri,
            "ttl_s": self.ttl_s,
        }
        self._configuration.write_text(json.dumps(configuration))
        starts = self._process.log.count("READY")
        self._process.start()
        async with asyncio.timeout(START_DEADLINE_S):
            while self._process.log.count("READY") == starts:
                assert self._process.is_running, self._process.log
                await asyncio.sleep(0.02)

    async def sign_in(self, user: str, *, resource: str = RELAY) -> dict[str, str]:
        """Log in, consent and exchange the code, by the forms that a browser would show.

        Returns:
            What the provider's token endpoint answered: ``access_token``, ``id_token`` and so on.
        """
        verifier, state = secrets.token_urlsafe(32), secrets.token_urlsafe(16)
        digest = hashlib.sha256(verifier.encode()).digest()
        query = {
            "client_id": "chat",
            "response_type": "code",
            "redirect_uri": self.redirect_uri,
            "scope": "openid chat",
            "resource": resource,
            "state": state,
            "code_challenge": base64.urlsafe_b64encode(digest).decode().rstrip("="),
            "code_challenge_method": "S256",
        }
        async with httpx.AsyncClient(trust_env=False) as browser:
            page = await self._follow(browser, f"{self.issuer}/auth?{urlencode(query)}")
            for fields in (
                {"prompt": "login", "login": user, "password": "any will do"},
                {"prompt": "consent"},
            ):
                action = re.search(r'<form[^>]* action="([^"]+)"', page.text)
                assert action, page.text
                answer = await browser.post(urljoin(str(page.url), action[1]), data=fields)
                page = await self._follow(browser, urljoin(str(page.url), _location(answer)))
            returned = parse_qs(urlsplit(_location(page)).query)
            assert returned["state"] == [state]
            answer = await browser.post(
                f"{self.issuer}/token",
                data={
                    "grant_type": "authorization_code",
                    "client_id": "chat",
                    "code": returned["code"][0],
                    "redirect_uri": self.redirect_uri,
                    "code_verifier": verifier,
                    "resource": resource,
                },
            )
        assert answer.status_code == 200, answer.text
        tokens: dict[str, str] = answer.json()
        return tokens

    async def token(self, user: str, *, resource: str = RELAY) -> str:
        """Give a user's access token for an audience."""
        return (await self.sign_in(user, resource=resource))["access_token"]

    async def _follow(self, browser: httpx.AsyncClient, url: str) -> httpx.Response:
        """Follow redirects within the provider; give a page, or the redirect that leaves."""
        while True:
            answer = await browser.get(url)
            if not answer.is_redirect or _location(answer).startswith(self.redirect_uri):
                return answer
            url = urljoin(str(answer.url), _location(answer))


def _location(answer: httpx.Response) -> str:
    assert answer.is_redirect, answer.text
    return answer.headers["location"]
