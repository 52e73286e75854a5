"""A run's stream without Redis: the real grammar, checks and encoding, events kept in a list."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from agent_worker.outlet import Outlet
from agent_worker.run import Request, Run, RunInfo
from relay.codec import RunEnvelope
from relay.encoding import encode_json
from relay.errors import PublishRefused
from relay.events import EventType, validate_data
from relay.grammar import RunGrammar
from relay.run_model import Claim, RunDetail, RunRequest


class RecordingStream:
    def __init__(self, attempt: int = 1) -> None:
        self.grammar = RunGrammar(attempt=attempt - 1)
        envelope = RunEnvelope("run_1", attempt, "t1", "alice", "echo")
        request = RunRequest("m1", "hello", {"lang": "en"})
        self.claim = Claim(envelope, request, "fence", 1, "epoch", 0)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.cancel_requested: bytes | None = None
        self.refused: PublishRefused | None = None
        self.gate: asyncio.Event | None = None
        self.is_closed = False
        self.text = ""

    @property
    def types(self) -> list[str]:
        return [event_type for event_type, _ in self.events]

    def of_type(self, event_type: EventType) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == event_type]

    async def publish(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        await self._pass()
        valid = validate_data(event_type, dict(data))
        encoded = encode_json(valid)
        self.grammar.apply(event_type, valid)
        self.events.append((event_type.value, orjson.loads(encoded)))

    async def delta(self, text: str) -> None:
        await self._pass()
        text.encode()
        if text:
            self.grammar.apply(EventType.TEXT_DELTA, {})
            self.text += text

    async def progress(self, tool_call_id: str, percentage: float | None, note: str | None) -> None:
        data = {"tool_call_id": tool_call_id, "progress_percentage": percentage, "note": note}
        await self.publish(EventType.TOOL_PROGRESS, data)

    async def finish(self, event_type: EventType, data: Mapping[str, Any]) -> None:
        encode_json(validate_data(event_type, dict(data)))
        for tool_call_id, tool_name in list(self.grammar.open_tools.items()):
            closing = {"tool_call_id": tool_call_id, "tool_name": tool_name, "duration_ms": 0}
            await self.publish(EventType.TOOL_COMPLETED, {**closing, "status": "cancelled"})
        await self.publish(event_type, data)

    async def retry(self, data: Mapping[str, Any]) -> None:
        for tool_call_id, tool_name in list(self.grammar.open_tools.items()):
            closing = {"tool_call_id": tool_call_id, "tool_name": tool_name, "duration_ms": 0}
            await self.publish(EventType.TOOL_COMPLETED, {**closing, "status": "error"})
        await self.publish(EventType.AGENT_RETRYING, data)

    async def flush(self) -> None:
        await self._pass()

    def input_closed(self, request_id: str) -> None:
        self.grammar.apply(EventType.INPUT_RESOLVED, {"request_id": request_id})

    def close(self) -> None:
        self.is_closed = True

    async def _pass(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.refused is not None:
            raise self.refused


class RecordingErrands:
    """Errands without Redis: keeps what was asked for; the test says how runs below end."""

    def __init__(self) -> None:
        self.looks: list[int] = []
        self.started: list[tuple[str, str, dict[str, Any]]] = []
        self.stopped: list[str] = []
        self.waiting = 0
        self.is_released = False
        self.child: RunDetail | None = None

    async def look_no_later(self, at_ms: int) -> None:
        self.looks.append(at_ms)

    async def release(self) -> bool:
        return self.is_released

    async def start_child(
        self, agent: str, content: str, metadata: Mapping[str, Any], message_id: str
    ) -> None:
        self.started.append((agent, content, dict(metadata)))

    async def read_child(self, run_id: str) -> RunDetail | None:
        return self.child

    async def stop_child(self, run_id: str, reason: str) -> None:
        self.stopped.append(run_id)

    def wait_begins(self) -> None:
        self.waiting += 1

    def wait_ends(self) -> None:
        self.waiting -= 1


def make_info(content: str = "hello", attempt: int = 1) -> RunInfo:
    request = Request(content, {"lang": "en"}, "m1")
    return RunInfo("run_1", "alice", "t1", "echo", attempt, request)


async def make_run(
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Run, RecordingStream, Outlet]:
    stream = RecordingStream()
    await stream.publish(EventType.AGENT_STARTED, {})
    outlet = Outlet(stream, clock=clock)  # type: ignore[arg-type]
    return Run(make_info(), outlet, RecordingErrands()), stream, outlet
