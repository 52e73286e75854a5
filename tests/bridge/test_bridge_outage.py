"""The bridge while Redis is paused, away, restarted or refuses: nothing lost, health is real."""

from __future__ import annotations

import asyncio

import orjson

from agent_worker import AgentWebSocketBridge, BridgeState
from relay.config import Settings
from tests.conftest import OwnRedis
from tests.integration.worker_support import Client, eventually, worker_settings

LEASE_MS = 6_000


async def reaches(bridge: AgentWebSocketBridge, state: BridgeState, deadline_s: float = 15) -> None:
    async def look() -> bool:
        return bridge.state is state

    await eventually(look, deadline_s)


def settings_for(url: str, prefix: str, lease_ms: int = LEASE_MS) -> Settings:
    return worker_settings(url, prefix, lease_ms=lease_ms)


async def test_first_sends_into_a_paused_redis_lose_nothing(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis()
    settings = settings_for(server.url, key_prefix)
    async with Client(settings) as client, AgentWebSocketBridge(settings) as bridge:
        assert bridge.health().is_healthy
        server.pause()

        async def carry_out(number: int) -> str:
            async with bridge.run(user_id="alice", thread_id=f"t{number}", agent="a") as run:
                for step in range(20):
                    await run.thinking(f"{number}/{step}")
                    await run.delta(f"{step} ")
            return run.run_id

        tasks = [asyncio.create_task(carry_out(number)) for number in range(3)]
        notice = asyncio.create_task(bridge.notify("alice", "info", "Hello", "once"))
        await reaches(bridge, BridgeState.DEGRADED)
        assert not any(task.done() for task in tasks)
        assert bridge.health().silence_ms > 0
        server.resume()
        for number, run_id in enumerate(await asyncio.gather(*tasks)):
            events = await client.checked_log(run_id)
            thoughts = [e["data"]["thought"] for e in events if e["type"] == "agent_thinking"]
            assert thoughts == [f"{number}/{step}" for step in range(20)]
        await notice
        entries = await client.link.client.xrange(client.keys.user("alice").log)
        types = [orjson.loads(fields[b"e"])["type"] for _, fields in entries]
        assert types.count("notice") == 1
        await reaches(bridge, BridgeState.ACTIVE)


async def test_state_follows_redis_and_runs_outlive_a_restart(
    own_redis: OwnRedis, key_prefix: str
) -> None:
    server = await own_redis(append_only=True)
    settings = settings_for(server.url, key_prefix, lease_ms=2_500)
    async with Client(settings) as client, AgentWebSocketBridge(settings) as bridge:
        async with bridge.run(user_id="alice", thread_id="t", agent="a") as run:
            await run.thinking("before")
            await run._stream.flush()
            await server.kill()
            await run.thinking("while it is away")
            await reaches(bridge, BridgeState.DEGRADED)
            degraded = bridge.health()
            assert degraded.last_error
            assert degraded.buffered_bytes > 0
            await reaches(bridge, BridgeState.FAILED)
            assert bridge.health().lag_ms > 2_000
            assert bridge.health().silence_ms > 2_500
            await server.start()
            await reaches(bridge, BridgeState.ACTIVE)
            await run.thinking("after")
        thoughts = [
            event["data"]["thought"]
            for event in await client.checked_log(run.run_id)
            if event["type"] == "agent_thinking"
        ]
        assert thoughts == ["before", "while it is away", "after"]
        recovered = bridge.health()
        assert (recovered.lag_ms, recovered.buffered_bytes) == (0, 0)
        assert recovered.last_error, "what happened can still be read"


async def test_refusal_by_redis_is_a_failure_at_once(own_redis: OwnRedis, key_prefix: str) -> None:
    server = await own_redis()
    settings = settings_for(server.url, key_prefix, lease_ms=60_000)
    async with AgentWebSocketBridge(settings) as bridge:
        async with server.client() as admin:
            await admin.execute_command("ACL", "SETUSER", "worker", "off")
            await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await reaches(bridge, BridgeState.FAILED)
        assert bridge.health().silence_ms < 60_000
        async with server.client() as admin:
            await admin.execute_command("ACL", "SETUSER", "worker", "on")
        await reaches(bridge, BridgeState.ACTIVE)
