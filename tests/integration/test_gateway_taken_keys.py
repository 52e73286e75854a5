"""A user at whose keys something else stands is told so; nobody else notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import structlog

from gateway import position_check
from gateway.app import Gateway, running_gateway
from relay.errors import CloseCode, PublishRefused
from relay.events import EventType
from relay.keys import UserKeys
from relay.run_model import Claim
from relay.scripts import KeyTaken
from tests.integration.gateway_support import (
    Work,
    bearer,
    gateway_settings,
    http,
    raw_tab,
    refusal,
    tab,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

    import redis.asyncio

Logs = list["MutableMapping[str, Any]"]


@pytest.fixture
async def gateway(
    redis_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Gateway]:
    monkeypatch.setattr(position_check, "ROUND_S", 0.4)
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as running:
        yield running


@pytest.fixture
async def work(gateway: Gateway) -> AsyncIterator[Work]:
    async with Work(gateway.settings) as running:
        yield running


async def streaming(work: Work, user_id: str) -> Any:
    """Give the stream of a run that has said a part of its answer."""
    run_id = await work.submit(user_id)
    claim = await work.registry.claim(user_id, run_id, "worker", 15_000)
    assert isinstance(claim, Claim)
    stream = work.publisher.open(claim)
    await stream.publish(EventType.AGENT_STARTED, {})
    await stream.delta("Hel")
    await stream.flush()
    return stream


async def text_key(client: redis.asyncio.Redis, user: UserKeys) -> str:
    [(name, _)] = await client.zrange(user.texts, 0, -1, withscores=True)
    return f"{user.base}text:{name.decode()}"


def complaints(logs: Logs) -> list[str]:
    return [line["error"] for line in logs if line["event"] == "history not understood"]


@pytest.mark.parametrize("name", ["channel", "log", "texts", "runs", "run", "text"])
async def test_client_is_told_and_the_log_names_the_key_once(
    name: str, gateway: Gateway, work: Work, redis: redis.asyncio.Redis
) -> None:
    user = work.keys.user("mallory")
    stream = await streaming(work, "mallory")
    run_id = stream.claim.run_id
    match name:
        case "run":
            key = user.run(run_id)
        case "text":
            key = await text_key(redis, user)
        case _:
            key = getattr(user, name)
    await redis.delete(key)
    await redis.rpush(key, "of somebody else")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            async with raw_tab(gateway, query="?since=active", headers=bearer("mallory")) as broken:
                error = await broken.error()
                assert error["code"] == "internal"
                assert "names the cause" in error["recovery_suggestions"][0]
                assert key not in str(error)
                assert await broken.closed() == (CloseCode.INTERNAL, error["message"])
    [said] = complaints(logs)
    assert key in said
    assert "rename or delete the key" in said
    async with tab(gateway) as other:
        await work.run()
        await other.until("agent_completed")
    await redis.delete(key)
    async with tab(gateway, "mallory") as repaired:
        assert await repaired.is_alive()


async def test_client_that_was_live_is_told_too(
    gateway: Gateway, work: Work, redis: redis.asyncio.Redis
) -> None:
    key = work.keys.user("mallory").channel
    async with tab(gateway, "mallory") as broken, tab(gateway) as other:
        await redis.set(key, "of somebody else")
        assert (await broken.error())["code"] == "internal"
        assert (await broken.closed())[0] == CloseCode.INTERNAL
        await work.run()
        await other.until("agent_completed")
        assert await other.is_alive()


async def test_requests_are_answered_and_the_log_names_the_key(
    gateway: Gateway, work: Work, redis: redis.asyncio.Redis
) -> None:
    key = work.keys.user("mallory").threads
    await redis.set(key, "of somebody else")
    request = {"thread_id": "t", "agent": "echo", "content": "hello"}
    with structlog.testing.capture_logs() as logs:
        async with http(gateway, "mallory") as api:
            answer = await api.post("/v1/runs", json=request)
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal"
    assert "names the cause" in answer.json()["recovery_suggestions"][0]
    [failed] = [line for line in logs if line["event"] == "request failed"]
    assert key in failed["error"]


async def test_upgrade_is_refused_where_places_cannot_stand(
    gateway: Gateway, work: Work, redis: redis.asyncio.Redis
) -> None:
    key = work.keys.user("mallory").connections
    await redis.set(key, "of somebody else")
    with structlog.testing.capture_logs() as logs:
        response, problem = await refusal(gateway, headers=bearer("mallory"))
    assert (response.status_code, problem["code"]) == (500, "internal")
    assert any(key in line.get("error", "") for line in logs)
    async with tab(gateway) as other:
        assert await other.is_alive()


async def test_run_is_refused_at_once_with_the_key_and_no_other_run_is(
    work: Work, redis: redis.asyncio.Redis
) -> None:
    broken, whole = await streaming(work, "mallory"), await streaming(work, "alice")
    key = work.keys.user("mallory").log
    await redis.set(key, "of somebody else")
    with structlog.testing.capture_logs() as logs:
        await broken.publish(EventType.AGENT_THINKING, {"thought": "hm"})
        with pytest.raises(PublishRefused, match=key.replace("{", "[{]")) as refused:
            await broken.flush()
    assert "rename or delete the key" in str(refused.value)
    assert [line["event"] for line in logs] == ["publish failed"]
    assert key in (work.publisher.last_error or "")
    await whole.finish(EventType.AGENT_COMPLETED, {"result": "Hello", "duration_ms": 1})
    assert work.publisher.is_available
    with pytest.raises(KeyTaken, match="holds no stream"):
        await work.submit("mallory")


async def test_key_that_is_right_again_is_not_named(
    work: Work,
) -> None:
    user = work.keys.user("mallory")
    error = KeyTaken("WRONGTYPE Operation against a key holding the wrong kind of value")
    located = await work.link.locate(work.link.call("read", user, None).keys, error)
    assert f"{user.base}*" in str(located)
    assert "docs/operations.md" in str(located)
