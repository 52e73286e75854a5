"""Users who sign in at a real OpenID Connect provider, in a browser and in Python.

Authorization code with PKCE; access tokens are JWTs, signed with RS256, for the audience that the
gateways ask for. Gateways know nothing but the address of the key set.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from playwright.async_api import expect

import relay.jwks
from gateway.app import running_gateway
from tests.e2e.agents.page_agents import piece
from tests.integration.gateway_support import eventually, gateway_settings, raw_tab
from tests.support.browser import in_spite_of_network_changes, running_browser
from tests.support.fleet import Fleet
from tests.support.identity_provider import ANOTHER, SOURCES, IdentityProvider, make_key
from tests.support.stack import Stack

pytestmark = [pytest.mark.needs_npm, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]


@dataclass
class PageServer:
    """Serves the application's page; ``settings`` is what it reads as settings.json."""

    url: str
    settings: dict[str, str]


@pytest.fixture
def page_server() -> Iterator[PageServer]:
    files = {
        "/": (SOURCES / "page.html", "text/html"),
        "/page.js": (SOURCES / "page.js", "text/javascript"),
        "/relay-client.js": (ROOT / "gateway" / "static" / "relay-client.js", "text/javascript"),
    }
    settings: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version: ClassVar[str] = "HTTP/1.0"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body, kind = json.dumps(settings).encode(), "application/json"
            if path in files:
                body, kind = files[path][0].read_bytes(), files[path][1]
            elif path != "/settings.json":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield PageServer(f"http://127.0.0.1:{server.server_port}", settings)
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def stack_with_provider(
    folder: Path, redis_url: str, key_prefix: str, page_url: str
) -> AsyncIterator[tuple[Stack, IdentityProvider]]:
    """Start a provider, two gateways that trust it and nobody else, and a worker."""
    async with IdentityProvider(folder, f"{page_url}/") as provider:
        settings = {
            **{name.upper(): value for name, value in provider.settings.items()},
            "JWT_SECRET": "",
            "ALLOWED_ORIGINS": page_url,
        }
        async with Stack(folder, redis_url, key_prefix=key_prefix, settings=settings) as stack:
            await asyncio.gather(
                stack.start_gateways(2),
                stack.start_worker("tests.e2e.agents.page_agents:worker", ROOT),
            )
            yield stack, provider
        stack.assert_no_defects()


async def status_of(gateway_url: str, token: str) -> tuple[int, str]:
    """Ask for something that needs a token; give status and detail of the answer."""
    async with httpx.AsyncClient(base_url=gateway_url, trust_env=False) as client:
        answer = await client.get("/v1/runs", headers={"Authorization": f"Bearer {token}"})
        return answer.status_code, answer.json().get("detail", "")


def signed_by(key: dict[str, Any], issuer: str, **claims: Any) -> str:
    """Make a token like the provider's, signed with another private key."""
    private = jwt.algorithms.RSAAlgorithm.from_jwk(key)
    assert isinstance(private, rsa.RSAPrivateKey)
    fields = {"sub": "alice", "iss": issuer, "exp": 4_000_000_000, "iat": 1, **claims}
    return jwt.encode(fields, private, "RS256", headers={"kid": key["kid"], "typ": "at+jwt"})


async def test_user_signs_in_in_a_browser_and_gets_an_answer(
    redis_url: str, key_prefix: str, tmp_path: Path, page_server: PageServer, browser_name: str
) -> None:
    async with (
        stack_with_provider(tmp_path, redis_url, key_prefix, page_server.url) as (stack, provider),
        running_browser(browser_name) as browser,
    ):
        page_server.settings.update(
            issuer=provider.issuer,
            gateway=stack.gateways[0].url,
            resource=provider.settings["jwt_audience"],
        )
        page = await browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        # The provider's own pages ask for a font from the internet.
        await page.route("**/fonts.googleapis.com/**", lambda route: route.abort())
        await in_spite_of_network_changes(lambda: page.goto(f"{page_server.url}/"))
        await page.get_by_role("button", name="Sign in").click()
        await page.get_by_placeholder("Enter any login").fill("alice")
        await page.get_by_placeholder("and password").fill("any will do")
        await page.get_by_role("button", name="Sign-in").click()
        await page.get_by_role("button", name="Continue").click()
        await expect(page.locator("#state")).to_have_text("connected as alice", timeout=20_000)
        # Neither code nor token stays in the address.
        assert page.url == f"{page_server.url}/"
        await page.evaluate(
            """() => window.client.sendMessage({ threadId: "t1", agent: "teller", content: "5" })"""
        )
        answer = "".join(piece(number) for number in range(5))
        await expect(page.locator("#answer")).to_have_text(answer.strip(), timeout=20_000)
        kinds = await page.evaluate("window.events.map(({ type }) => type)")
        assert (kinds[0], kinds[-1]) == ("agent_queued", "agent_completed")
        assert set(await page.evaluate("window.events.map((one) => one.user_id)")) == {"alice"}
        assert complaints == []


async def test_three_users_of_a_provider_see_their_own_events_only(
    redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    users = ["alice", "bob", "carol@example.com"]
    page_url = "http://127.0.0.1:9"
    async with stack_with_provider(tmp_path, redis_url, key_prefix, page_url) as (stack, provider):
        tokens = dict(zip(users, await asyncio.gather(*map(provider.token, users)), strict=True))
        async with Fleet(stack.urls, tokens.__getitem__) as fleet:
            tabs = [fleet.add(user) for user in users for _ in stack.gateways]
            await fleet.connect()
            asked = {}
            for number, client in enumerate(tabs[::2]):
                sent = await client.client.send_message(
                    str(number + 3), thread_id="t1", agent="teller"
                )
                asked[client.user_id] = sent.run_id
            for client in tabs:
                run_id = asked[client.user_id]
                await client.until(lambda one, run_id=run_id: one.has_ended(run_id), 30.0)
            for client in tabs:
                assert {event["run_id"] for event in client.events} == {asked[client.user_id]}
                assert {event["user_id"] for event in client.events} == {client.user_id}


async def test_token_for_another_audience_or_purpose_is_refused(
    redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    async with IdentityProvider(tmp_path, "http://127.0.0.1:9/") as provider:
        settings = gateway_settings(redis_url, key_prefix, jwt_secret=(), **provider.settings)
        tokens = await provider.sign_in("alice")
        async with running_gateway(settings) as gateway:
            assert (await status_of(gateway.url, tokens["access_token"]))[0] == 200
            bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
            async with raw_tab(gateway.url, headers=bearer) as alice:
                assert (await alice.until("connection_established"))["user_id"] == "alice"

            refused = {
                "another audience": await provider.token("alice", resource=ANOTHER),
                # Proves who signed in, to the application; it is no key to anything.
                "an id token": tokens["id_token"],
            }
            for what, token in refused.items():
                status, detail = await status_of(gateway.url, token)
                assert (status, "another audience" in detail) == (401, True), what

            audience = provider.settings["jwt_audience"]
            forged = signed_by(make_key("first"), provider.issuer, aud=audience)
            assert (await status_of(gateway.url, forged))[0] == 401
            [key] = provider.keys
            same_sub = signed_by(key, "https://another-issuer.example", aud=audience)
            status, detail = await status_of(gateway.url, same_sub)
            assert (status, "another issuer" in detail) == (401, True)


async def test_tokens_with_made_up_key_ids_cost_the_provider_one_request(
    redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    async with IdentityProvider(tmp_path, "http://127.0.0.1:9/") as provider:
        settings = gateway_settings(redis_url, key_prefix, jwt_secret=(), **provider.settings)
        key = make_key("made up")
        async with running_gateway(settings) as gateway:
            token = await provider.token("alice")
            assert (await status_of(gateway.url, token))[0] == 200
            before = provider.key_set_reads
            forged = [
                signed_by({**key, "kid": f"made-up-{number}"}, provider.issuer)
                for number in range(50)
            ]
            statuses = await asyncio.gather(*(status_of(gateway.url, one) for one in forged))
            assert {status for status, _ in statuses} == {401}
            assert provider.key_set_reads - before <= 1
            # Nor do they keep anybody else out.
            assert (await status_of(gateway.url, token))[0] == 200


async def test_keys_rotate_while_clients_are_connected(
    redis_url: str, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten seconds in earnest.
    monkeypatch.setattr(relay.jwks, "UNKNOWN_KEY_INTERVAL_S", 0.2)
    first, second = make_key("first"), make_key("second")
    async with IdentityProvider(tmp_path, "http://127.0.0.1:9/", [first]) as provider:
        settings = gateway_settings(redis_url, key_prefix, jwt_secret=(), **provider.settings)
        async with running_gateway(settings) as gateway:
            old = await provider.token("alice")
            async with raw_tab(gateway.url, headers={"Authorization": f"Bearer {old}"}) as alice:
                await alice.until("connection_established")

                await provider.rotate([second, first])
                new = await provider.token("bob")
                assert jwt.get_unverified_header(new)["kid"] == "second"

                async def accepts(token: str) -> bool:
                    return (await status_of(gateway.url, token))[0] == 200

                async def accepts_new() -> bool:
                    return await accepts(new)

                await eventually(accepts_new)
                assert await accepts(old)
                assert await alice.is_alive()

                await provider.rotate([second])
                unknown = signed_by(make_key("unknown"), provider.issuer)

                async def refuses_old() -> bool:
                    # What makes the gateway look before the five minutes of its cache are over.
                    assert not await accepts(unknown)
                    return not await accepts(old)

                await eventually(refuses_old)
                assert await accepts(new)
                # It was opened when its key was good, and lives until its token expires.
                assert await alice.is_alive()
