"""Revoked tokens: worth nothing on any gateway within a second, on any way in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import jwt
import pytest
import pytest_asyncio
import redis.asyncio
from structlog.testing import capture_logs

from gateway import revocation_watch
from gateway.app import Gateway, running_gateway
from relay.keys import Keys
from relay.revocations import revocation_of
from tests.conftest import OwnRedis
from tests.integration.gateway_support import (
    SECRET,
    Work,
    bearer,
    eventually,
    gateway_settings,
    raw_tab,
    refusal,
    tab,
    token,
)
from tests.support.proxy import RedisProxy
from tests.support.stack_process import run_relay

WITHIN_S = 5.0
"""A deadline for a busy machine; the promise of a second is measured elsewhere."""


@pytest_asyncio.fixture
async def gateways(
    redis_url: str, key_prefix: str, server: str
) -> AsyncIterator[Sequence[Gateway]]:
    async with (
        running_gateway(gateway_settings(redis_url, key_prefix)) as one,
        running_gateway(gateway_settings(redis_url, key_prefix)) as two,
    ):
        yield one, two


def with_jti(jti: str, user_id: str = "alice", **claims: Any) -> str:
    now_s = int(time.time())
    return jwt.encode(
        {"sub": user_id, "jti": jti, "iat": now_s - 2, "exp": now_s + 600, **claims},
        SECRET,
        "HS256",
    )


def shown(made: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {made}"}


def operator(gateway: Gateway, *scopes: str) -> httpx.AsyncClient:
    headers = bearer("operator", scopes=scopes or ("relay:admin",))
    return httpx.AsyncClient(base_url=gateway.admin_url, headers=headers, trust_env=False)


async def revoke(gateway: Gateway, what: str, **body: Any) -> dict[str, Any]:
    async with operator(gateway) as client:
        answer = await client.post(f"/v1/admin/{what}/revoke", json=body)
    assert answer.status_code == 202, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_revoked_token_is_refused_on_every_way_in_and_others_go_on(
    gateways: Sequence[Gateway],
) -> None:
    one, two = gateways
    stolen, good = with_jti("a/b stolen"), with_jti("good")
    async with (
        raw_tab(two, headers=shown(stolen)) as victim,
        raw_tab(two, headers=shown(good)) as bystander,
        httpx.AsyncClient(base_url=two.url, headers=shown(stolen), trust_env=False) as client,
    ):
        await victim.until("connection_established")
        ticket = (await client.post("/v1/tickets")).json()["ticket"]
        told = await revoke(one, "tokens/a%2Fb%20stolen")
        assert told["jti"] == "a/b stolen"
        assert await victim.closed(WITHIN_S) == (4401, "token revoked")
        for path in ("/v1/runs", "/v1/events"):
            answer = await client.get(path)
            assert answer.status_code == 401
            assert "revoked" in answer.json()["detail"]
        for options in ({"headers": shown(stolen)}, {"query": f"?ticket={ticket}"}):
            response, problem = await refusal(two, **options)
            assert response.status_code == 401
            assert "revoked" in problem["detail"]
        await bystander.until("connection_established")
        answered = await bystander.ask(type="refresh_token", token=stolen)
        assert answered["code"] == "invalid_token"
        assert await bystander.is_alive()


async def test_connection_goes_on_with_the_token_that_replaced_the_revoked_one(
    gateways: Sequence[Gateway],
) -> None:
    one, two = gateways
    async with raw_tab(two, headers=shown(with_jti("old"))) as opened:
        await opened.until("connection_established")
        await opened.ask(type="refresh_token", token=with_jti("new"))
        await revoke(one, "tokens/old")
        await eventually(lambda: known(two, 1), WITHIN_S)
        assert await opened.is_alive()
        await revoke(one, "tokens/new")
        assert (await opened.closed(WITHIN_S))[0] == 4401


async def test_every_gateway_notes_what_was_revoked_elsewhere(
    gateways: Sequence[Gateway],
) -> None:
    one, _ = gateways
    with capture_logs() as logs:
        await one._revocation_log.add(revocation_of("token", "lost", time.time_ns() // 1_000_000))
        for gateway in gateways:
            await eventually(lambda gateway=gateway: known(gateway, 1), WITHIN_S)
    noted = [line for line in logs if line["event"] == "revocation in force"]
    assert [(line["kind"], line["subject"]) for line in noted] == [("token", "lost")] * 2


async def known(gateway: Gateway, count: int) -> bool:
    return len(gateway._revocations) == count


async def test_all_tokens_of_a_user_up_to_now_are_revoked_and_later_ones_are_good(
    gateways: Sequence[Gateway],
) -> None:
    one, two = gateways
    before = int(time.time()) - 1
    without_time = jwt.encode({"sub": "al/ice", "exp": before + 600}, SECRET, "HS256")
    async with (
        tab(one, "al/ice", now_s=before) as here,
        tab(two, "al/ice", now_s=before) as there,
        tab(two, "bob", now_s=before) as other,
    ):
        await revoke(one, "users/al%2Fice")
        for opened in (here, there):
            assert (await opened.closed(WITHIN_S))[0] == 4401
        assert await other.is_alive()
    for old in (token("al/ice", now_s=before), without_time):
        assert (await refusal(two, headers=shown(old)))[0].status_code == 401
    async with tab(two, "al/ice", now_s=time.time() + 1):
        pass


async def test_token_is_revoked_in_the_middle_of_a_replay(
    gateways: Sequence[Gateway], redis_url: str, key_prefix: str
) -> None:
    one, two = gateways
    async with (
        Work(gateway_settings(redis_url, key_prefix)) as work,
        raw_tab(two, query="?since=0", headers=shown(with_jti("r")), max_queue=1) as slow,
    ):
        await slow.until("connection_established")
        for _ in range(6):
            await work.run(pieces=("x" * 1_000_000,))
        # It has stopped reading, so that most of its replay is still to come.
        await revoke(one, "tokens/r")
        assert await eventually(lambda: nobody_connected(two), WITHIN_S)
        code, _ = await slow.closed()
        assert code in (4401, 1006)
        assert len([event for event in slow.events if event["type"] == "agent_completed"]) < 6


async def nobody_connected(gateway: Gateway) -> bool:
    return not len(gateway.pool)


async def test_revocation_needs_the_scope_and_says_what_is_wrong(
    gateways: Sequence[Gateway],
) -> None:
    one, _ = gateways
    async with operator(one, "relay:other") as client:
        assert (await client.post("/v1/admin/tokens/x/revoke")).status_code == 403
        assert (await client.post("/v1/admin/users/x/revoke")).status_code == 403
    async with operator(one) as client:
        answer = await client.post("/v1/admin/tokens/x/revoke", json={"exp": "soon"})
        assert answer.status_code == 422
        assert "exp" in answer.json()["detail"]
        stats = (await client.get("/v1/admin/stats")).json()
        assert stats["revocations"] == 0


async def test_revocation_is_known_before_a_new_gateway_serves(
    redis_url: str, key_prefix: str, redis: redis.asyncio.Redis
) -> None:
    settings = gateway_settings(redis_url, key_prefix)
    async with running_gateway(settings) as gateway:
        await revoke(gateway, "tokens/x", exp=time.time() + 600)
        await redis.xadd(Keys(key_prefix).revocations, {"kind": "of the future"})
    async with running_gateway(settings) as gateway:
        assert (await refusal(gateway, headers=shown(with_jti("x"))))[0].status_code == 401


async def test_gateway_that_hears_nothing_or_was_cut_off_learns_it_all_the_same(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    with RedisProxy(server.port) as proxy:
        async with (
            running_gateway(gateway_settings(proxy.redis_url, key_prefix)) as far,
            running_gateway(gateway_settings(server.url, key_prefix)) as near,
            raw_tab(far, headers=shown(with_jti("one"))) as first,
            raw_tab(far, headers=shown(with_jti("two"))) as second,
        ):
            for opened in (first, second):
                await opened.until("connection_established")
            proxy.swallow_messages(1.0)
            await revoke(near, "tokens/one")
            assert await first.closed(WITHIN_S) == (4401, "token revoked")
            proxy.swallow_messages(0.0)
            proxy.refuse()
            proxy.cut()
            await revoke(near, "tokens/two")
            # Its connections outlive Redis; nobody new comes in meanwhile.
            assert (await refusal(far, headers=shown(with_jti("two"))))[0].status_code == 503
            proxy.accept()
            assert await second.closed(15.0) == (4401, "token revoked")


async def test_revocation_that_redis_lost_is_put_back(
    gateways: Sequence[Gateway], redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    one, _ = gateways
    key = Keys(key_prefix).revocations
    await revoke(one, "tokens/x")
    await eventually(lambda: known(one, 1), WITHIN_S)
    await redis.delete(key)
    await eventually(lambda: redis.xlen(key), WITHIN_S)
    [(_, fields), *_] = await redis.xrange(key)
    assert fields[b"subject"] == b"x"
    assert (await refusal(one, headers=shown(with_jti("x"))))[0].status_code == 401


async def test_many_lost_revocations_are_put_back_together(
    gateways: Sequence[Gateway], redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    one, two = gateways
    key = Keys(key_prefix).revocations
    now_ms = int(time.time() * 1000)
    await one._revocation_log.add(*(revocation_of("token", f"x{n}", now_ms) for n in range(40)))
    await eventually(lambda: known(one, 40), WITHIN_S)
    await eventually(lambda: known(two, 40), WITHIN_S)
    async with redis.pubsub() as signals:
        await signals.subscribe(key)
        assert await signals.get_message(timeout=5.0)
        await redis.delete(key)
        await eventually(lambda: has_length(redis, key, 40), WITHIN_S)
        heard = 0
        while await signals.get_message(timeout=0.2):
            heard += 1
    # One by one, a long list would keep its gateway from reading, and readiness would end.
    assert 0 < heard < 10
    assert len(one._revocations) == len(two._revocations) == 40


async def has_length(redis: redis.asyncio.Redis, key: str, length: int) -> bool:
    return bool(await redis.xlen(key) >= length)


async def test_what_stands_in_place_of_revocations_is_no_end_of_the_gateway(
    gateways: Sequence[Gateway], redis: redis.asyncio.Redis, key_prefix: str
) -> None:
    one, _ = gateways
    key = Keys(key_prefix).revocations
    await revoke(one, "tokens/x")
    await eventually(lambda: known(one, 1), WITHIN_S)
    await redis.set(key, "not a stream")
    await eventually(lambda: is_failing(one), WITHIN_S)
    assert (await refusal(one, headers=shown(with_jti("x"))))[0].status_code == 401
    await redis.delete(key)
    await eventually(lambda: redis.exists(key), WITHIN_S)


async def is_failing(gateway: Gateway) -> bool:
    # Longer than between two looks.
    return gateway._revocations.age_s > 2 * revocation_watch.LOOK_EVERY_S


async def test_what_has_expired_or_is_covered_is_forgotten(
    redis_url: str,
    key_prefix: str,
    redis: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = Keys(key_prefix).revocations
    now_ms = int(time.time() * 1000)
    for at_ms, until_ms, kind, subject in (
        (1, now_ms - 70_000, "token", "expired"),
        (1, now_ms + 90_000, "user", "alice"),
        (2, now_ms + 90_000, "user", "alice"),
        (2, now_ms + 90_000, "user", "bob"),
    ):
        fields = {"kind": kind, "subject": subject, "at_ms": at_ms, "until_ms": until_ms}
        await redis.xadd(key, fields)  # type: ignore[arg-type]
    monkeypatch.setattr(revocation_watch, "LOOK_EVERY_S", 0.02)
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:
        left = [fields[b"subject"] for _, fields in await redis.xrange(key)]
        assert left == [b"alice", b"bob"]
        assert len(gateway._revocations) == 2
        for number in range(3):
            await revoke(gateway, f"tokens/{number}")
        await eventually(lambda: known(gateway, 5), WITHIN_S)
        assert await redis.xlen(key) == 5


async def test_command_line_revokes_without_keeping_the_token_in_the_shells_history(
    redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    settings = gateway_settings(redis_url, key_prefix)
    environment = {"RELAY_REDIS_URL": redis_url, "RELAY_KEY_PREFIX": key_prefix}

    async def relay(*words: str, stdin: str = "") -> CompletedProcess[str]:
        return await asyncio.to_thread(
            run_relay, *words, folder=tmp_path, stdin=stdin, **environment
        )

    async with (
        running_gateway(settings) as gateway,
        raw_tab(gateway, headers=shown(with_jti("piped"))) as one,
        tab(gateway, "bob", now_s=time.time() - 2) as two,
    ):
        await one.until("connection_established")
        done = await relay("token", "revoke", "-", stdin=with_jti("piped") + "\n")
        assert done.returncode == 0, done.stderr
        assert "Token piped revoked until" in done.stdout
        assert (await one.closed(WITHIN_S))[0] == 4401
        done = await relay("token", "revoke", "--user", "bob")
        assert done.returncode == 0, done.stderr
        assert (await two.closed(WITHIN_S))[0] == 4401
        for words in ((), ("x", "--user", "bob")):
            done = await relay("token", "revoke", *words)
            assert done.returncode == 1
            assert "by its jti" in done.stderr
