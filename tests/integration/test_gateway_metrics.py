"""What a gateway counts: every event that is delivered, once, whichever way it goes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.app import Gateway, running_gateway
from relay.keys import LARGE_TEXT_BYTES
from tests.integration.gateway_support import Tab, Work, bearer, gateway_settings, raw_tab, tab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    async with running_gateway(gateway_settings(redis_url, key_prefix)) as running:
        yield running


@pytest.fixture
async def work(gateway: Gateway) -> AsyncIterator[Work]:
    async with Work(gateway.settings) as running:
        yield running


async def delivered_to(opened: Tab, last: int) -> int:
    """Give how many events a tab has got, once it has the last one."""
    while opened.frames[-1].get("offset") != last or is_unfinished(opened.frames[-1]):
        await opened.receive()
    return len({frame["offset"] for frame in opened.events})


def is_unfinished(frame: dict[str, object]) -> bool:
    return frame["type"] == "event_part" and frame["index"] != int(str(frame["total"])) - 1


async def test_each_event_is_counted_once_whichever_way_it_goes_out(
    gateway: Gateway, work: Work
) -> None:
    async with tab(gateway) as live:
        await work.run()
        last = (await live.until("agent_completed"))["offset"]
        seen = await delivered_to(live, last)
        assert gateway.metrics.delivered_events == seen > 5
        # From history, in one page.
        async with raw_tab(gateway, query="?since=0", headers=bearer()) as late:
            await late.receive()
            seen += await delivered_to(late, last)
            assert gateway.metrics.delivered_events == seen
    before = gateway.metrics.delivered_events
    async with tab(gateway, query="?since=now") as live:
        # In parts.
        await work.run(pieces=("x" * (LARGE_TEXT_BYTES + 1),))
        seen = await delivered_to(live, 2 * last)
        assert [frame["type"] for frame in live.frames].count("event_part") > 2
        assert gateway.metrics.delivered_events == before + seen
