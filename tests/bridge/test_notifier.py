"""The deprecated notifier: the old calls, the bridge's events, one warning for each call site."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
import structlog

from agent_worker import AgentError, AgentWebSocketBridge, WebSocketNotifier
from relay.config import Settings
from relay.errors import GrammarViolation, StaleFence
from relay.run_model import derive_run_id
from tests.bridge.support import essence, texts_of
from tests.integration.worker_support import Client, worker_settings

pytestmark = pytest.mark.filterwarnings("ignore:WebSocketNotifier:DeprecationWarning")


@dataclass(frozen=True)
class OldContext:
    run_id: str = "job-1"
    user_id: str = "alice"
    thread_id: str = "t1"
    agent_name: str = "researcher"

    @property
    def relay_run_id(self) -> str:
        return derive_run_id(self.user_id, self.run_id)


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


@pytest_asyncio.fixture
async def bridge(settings: Settings) -> AsyncIterator[AgentWebSocketBridge]:
    async with AgentWebSocketBridge(settings) as bridge:
        yield bridge


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with Client(settings) as client:
        yield client


@pytest.mark.parametrize("outcome", ["completed", "text", "error"])
async def test_notifier_publishes_what_the_bridge_publishes(
    bridge: AgentWebSocketBridge, client: Client, outcome: str
) -> None:
    notifier, context = WebSocketNotifier(bridge), OldContext()
    await notifier.send_agent_started(context, content="What?")
    await notifier.send_agent_thinking(context, "Looking", step_number=1, progress_percentage=10)
    await notifier.send_tool_executing(context, "search", "To find it", 300, {"q": "x"})
    await notifier.send_tool_completed(context, "search", {"hits": 3})
    await notifier.send_stream_chunk(context, "c1", "Hello ")
    await notifier.send_stream_chunk(context, "c2", "world", is_final=True)
    match outcome:
        case "completed":
            await notifier.send_agent_completed(context, {"answer": 42}, duration_ms=5.0)
        case "text":
            await notifier.send_agent_completed(context)
        case "error":
            await notifier.send_agent_error(
                context,
                "The library is closed.",
                "upstream_unavailable",
                {"trace": "…"},
                ["Come back tomorrow."],
                estimated_retry_delay_ms=900,
            )

    async def through_the_bridge() -> str:
        run_id = ""
        try:
            async with bridge.run(
                user_id="alice", thread_id="t1", agent="researcher", content="What?"
            ) as run:
                run_id = run.run_id
                await run.thinking("Looking", step=1, progress_percentage=10)
                async with run.tool("search", {"q": "x"}, "To find it", 300) as tool:
                    tool.result = {"hits": 3}
                await run.delta("Hello ")
                await run.delta("world")
                if outcome == "completed":
                    run.result = {"answer": 42}
                elif outcome == "error":
                    raise AgentError(
                        "upstream_unavailable",
                        "The library is closed.",
                        recovery_suggestions=["Come back tomorrow."],
                        retry_after_ms=900,
                    )
        except AgentError:
            return run_id
        return run_id

    bridged = await through_the_bridge()
    noted = context.relay_run_id
    assert essence(await client.checked_log(noted)) == essence(await client.checked_log(bridged))
    assert await texts_of(client, noted) == await texts_of(client, bridged) == ["Hello world"]


async def test_runs_of_several_users_do_not_mix(
    settings: Settings, bridge: AgentWebSocketBridge
) -> None:
    notifier = WebSocketNotifier(bridge)
    # The same id of two users names two runs.
    contexts = [OldContext(user_id=user) for user in ("alice", "bob", "carol")]
    for context in contexts:
        await notifier.send_agent_started(context)
    for context in contexts:
        await notifier.send_tool_executing(context, "t")
        await notifier.send_agent_thinking(context, context.user_id)
    for context in reversed(contexts):
        await notifier.send_tool_completed(context, "t", context.user_id)
        await notifier.send_agent_completed(context, context.user_id)
    for context in contexts:
        async with Client(settings, context.user_id) as client:
            events = await client.checked_log(context.relay_run_id)
            assert events[-1]["data"]["result"] == context.user_id
            assert {event["user_id"] for event in events} == {context.user_id}


async def test_calls_of_one_tool_that_overlap_are_closed_in_their_order(
    bridge: AgentWebSocketBridge, client: Client
) -> None:
    notifier, context = WebSocketNotifier(bridge), OldContext()
    await notifier.send_agent_started(context)
    for number in (1, 2):
        await notifier.send_tool_executing(context, "t", parameters={"n": number})
    for number in (1, 2):
        await notifier.send_tool_completed(context, "t", number)
    with pytest.raises(GrammarViolation, match="no call of t is open"):
        await notifier.send_tool_completed(context, "t", 3)
    await notifier.send_agent_completed(context)
    events = await client.checked_log(context.relay_run_id)
    calls = {
        event["data"]["tool_call_id"]: event["data"]["parameters"]["n"]
        for event in events
        if event["type"] == "tool_executing"
    }
    for event in events:
        if event["type"] == "tool_completed":
            assert calls[event["data"]["tool_call_id"]] == event["data"]["result"]


async def test_calls_out_of_place_are_refused(bridge: AgentWebSocketBridge, client: Client) -> None:
    notifier, context = WebSocketNotifier(bridge), OldContext()
    with pytest.raises(GrammarViolation, match="send_agent_started"):
        await notifier.send_agent_thinking(context, "too early")
    await notifier.send_agent_started(context)
    with pytest.raises(StaleFence):
        await notifier.send_agent_started(context)
    await client.registry.cancel("alice", context.relay_run_id)
    assert (await client.ended(context.relay_run_id)).summary.status == "cancelled"
    with pytest.raises(GrammarViolation):
        await notifier.send_agent_thinking(context, "too late")


class Unreadable(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise LookupError("gone")

    def __iter__(self) -> Iterator[str]:
        raise LookupError("gone")

    def __len__(self) -> int:
        return 1


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("details", "logged"),
    [
        ("ValueError: boom", "ValueError: boom"),
        (["a", {"password": "hunter2"}], ["a", {"password": "[redacted]"}]),
        ({"password": "hunter2", "at": 3}, {"password": "[redacted]", "at": 3}),
        (7, 7),
        (endless(), "not shown: dict"),
        (Unreadable(), "not shown: Unreadable"),
    ],
)
async def test_details_of_any_form_end_the_run(
    bridge: AgentWebSocketBridge, client: Client, details: Any, logged: Any
) -> None:
    notifier, context = WebSocketNotifier(bridge), OldContext()
    await notifier.send_agent_started(context)
    with structlog.testing.capture_logs() as logs:
        await notifier.send_agent_error(context, "It broke.", error_details=details)
    [line] = [line for line in logs if line["event"] == "agent_error_details"]
    assert line["details"] == logged
    error = (await client.ended(context.relay_run_id)).as_json()["error"]
    assert error["error_message"] == "It broke."
    assert bridge.health().active_runs == 0


@pytest.mark.filterwarnings("default:WebSocketNotifier:DeprecationWarning")
async def test_each_call_site_is_warned_once(bridge: AgentWebSocketBridge) -> None:
    notifier, context = WebSocketNotifier(bridge), OldContext()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await notifier.send_agent_started(context)
        for number in range(3):
            await notifier.send_agent_thinking(context, f"{number}")
        await notifier.send_agent_thinking(context, "elsewhere")
        await notifier.send_agent_completed(context)
    found: list[Any] = [item for item in caught if item.category is DeprecationWarning]
    assert len(found) == 4
    assert {item.filename for item in found} == {__file__}
    assert len({item.lineno for item in found}) == 4
    assert "use bridge.run(…) of AgentWebSocketBridge" in str(found[0].message)
