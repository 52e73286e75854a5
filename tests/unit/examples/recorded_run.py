"""A run that records what an agent does with it, in place of a relay."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass
class RecordedRequest:
    content: str
    metadata: dict[str, Any] = field(default_factory=dict)
    message_id: str = "m1"


@dataclass
class RecordedTool:
    name: str
    parameters: dict[str, Any]
    result: Any = None
    status: str = "open"
    percentages: list[float] = field(default_factory=list)
    first_progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def progress(self, percentage: float, note: str | None = None) -> None:
        assert 0 <= percentage <= 100
        assert self.status == "open"
        self.percentages.append(percentage)
        self.first_progress.set()


class RecordedRun:
    """Has the methods of a run that the examples use, and keeps every call."""

    def __init__(self, content: str, metadata: dict[str, Any] | None = None) -> None:
        self.request = RecordedRequest(content, metadata or {})
        self.thoughts: list[str] = []
        self.tools: list[RecordedTool] = []
        self.deltas: list[str] = []
        self.tool_opened = asyncio.Condition()

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def tool_names(self) -> list[str]:
        return [tool.name for tool in self.tools]

    async def thinking(
        self,
        thought: str,
        step: int | None = None,
        total_steps: int | None = None,
        progress_percentage: float | None = None,
        estimated_remaining_ms: int | None = None,
    ) -> None:
        assert (step or 0) <= (total_steps or 0)
        self.thoughts.append(thought)

    @asynccontextmanager
    async def tool(
        self,
        name: str,
        parameters: dict[str, Any],
        purpose: str | None = None,
        estimated_duration_ms: int | None = None,
    ) -> AsyncIterator[RecordedTool]:
        tool = RecordedTool(name, parameters)
        async with self.tool_opened:
            self.tools.append(tool)
            self.tool_opened.notify_all()
        try:
            yield tool
        except asyncio.CancelledError:
            tool.status = "cancelled"
            raise
        except Exception:
            tool.status = "error"
            raise
        tool.status = "ok"

    async def wait_for_tool(self, name: str) -> RecordedTool:
        async with self.tool_opened:
            await self.tool_opened.wait_for(lambda: name in self.tool_names)
        return next(tool for tool in self.tools if tool.name == name)

    async def delta(self, text: str) -> None:
        assert text
        self.deltas.append(text)
