"""The bridge seen from a browser: its runs, its notices, and the Stop button."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from agent_worker import AgentWebSocketBridge, BridgedRun, RunCancelled
from gateway.app import Gateway, running_gateway
from relay.events import EventType
from relay.grammar import RunGrammar
from tests.integration.gateway_support import gateway_settings, tab
from tests.support.acl import settings_as


@pytest_asyncio.fixture
async def gateway(redis_url: str, key_prefix: str) -> AsyncIterator[Gateway]:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as gateway:
        yield gateway


async def test_browser_sees_runs_and_notices_and_stops_what_it_wants(
    gateway: Gateway, redis_url: str, key_prefix: str
) -> None:
    settings = gateway_settings(redis_url, key_prefix)
    opened: asyncio.Future[BridgedRun] = asyncio.get_running_loop().create_future()

    async def carry_out(bridge: AgentWebSocketBridge) -> None:
        async with bridge.run(user_id="alice", thread_id="t1", agent="mine", content="Go") as run:
            opened.set_result(run)
            await run.delta("One moment")
            await asyncio.Event().wait()

    async with (
        AgentWebSocketBridge(settings_as(settings, "worker")) as bridge,
        tab(gateway) as alice,
        tab(gateway, "bob") as bob,
    ):
        await bridge.notify("alice", "success", "Done", "All of it", link="/x")
        notice = await alice.until("notice")
        assert "run_id" not in notice
        assert "seq" not in notice
        assert notice["data"]["link"] == "/x"
        task = asyncio.create_task(carry_out(bridge))
        run_id = (await opened).run_id
        await alice.until("text_delta", run_id=run_id)
        await alice.ask(type="cancel", run_id=run_id)
        with pytest.raises(RunCancelled):
            await task
        if not any(frame["type"] == "agent_cancelled" for frame in alice.frames):
            await alice.until("agent_cancelled", run_id=run_id)
        events = [frame for frame in alice.events if frame.get("run_id") == run_id]
        grammar = RunGrammar()
        for event in events:
            grammar.apply(EventType(event["type"]), event["data"])
        seqs = [event["seq"] for event in events if "seq" in event]
        assert seqs == list(range(1, len(seqs) + 1))
        # What was missed comes on return as well, notice included.
        async with tab(gateway, query="?since=0") as later:
            await later.until("agent_cancelled", run_id=run_id)
            assert next(event["type"] for event in later.events) == "notice"
        assert await bob.is_alive()
        assert bob.events == []
