"""The plugin's fixtures for tests with an event loop; loaded where pytest-asyncio is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from relay.testing.relay_stack import RelayStack
    from relay.testing.streams import StreamWatch
    from relay.testing.utility import WebSocketTestUtility


@pytest_asyncio.fixture
async def relay_stack_factory(
    relay_stack_options: Callable[..., RelayStack],
    relay_streams: StreamWatch,
) -> AsyncIterator[Callable[..., Awaitable[RelayStack]]]:
    """Starts one more stack each time it is awaited; takes what the ``relay`` mark takes."""
    async with contextlib.AsyncExitStack() as stacks:

        async def start(**options: Any) -> RelayStack:
            return await stacks.enter_async_context(relay_stack_options(**options))

        yield start


@pytest_asyncio.fixture
async def relay_stack(
    relay_stack_factory: Callable[..., Awaitable[RelayStack]],
) -> RelayStack:
    """A whole relay for this test, as its ``relay`` marks describe it."""
    return await relay_stack_factory()


@pytest.fixture
def relay_client(relay_stack: RelayStack) -> Callable[..., Awaitable[WebSocketTestUtility]]:
    """Connects a user's client each time it is awaited; takes what ``RelayStack.client`` takes."""
    return relay_stack.client


@pytest.fixture
def relay_token(relay_stack: RelayStack) -> Callable[..., str]:
    """Makes real tokens: ``relay_token("alice", ttl_s=60)``."""
    return relay_stack.token
