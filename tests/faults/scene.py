"""What most fault tests begin with: gateways, a publisher with its books, users to be harmed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.faults.crew import add_tabs, settings_for
from tests.faults.load import Load
from tests.integration.worker_support import Client
from tests.support.fleet import Fleet, FleetClient
from tests.support.stack import Stack


@contextlib.asynccontextmanager
async def under_load(
    folder: Path,
    redis_url: str,
    *,
    gateways: int = 2,
    settings: Mapping[str, str | int] | None = None,
) -> AsyncIterator[tuple[Stack, Load, Fleet]]:
    """Run gateways, publish from the test, and have a fleet of clients, none connected yet."""
    async with (
        Stack(folder, redis_url, settings=settings) as stack,
        Load(redis_url, stack.key_prefix) as load,
    ):
        await stack.start_gateways(gateways)
        async with Fleet(stack.urls, stack.token) as fleet:
            yield stack, load, fleet


@contextlib.asynccontextmanager
async def user_with_tabs(
    stack: Stack, user_id: str, *, seed: int = 0
) -> AsyncIterator[tuple[Client, list[FleetClient]]]:
    """Have a user with one connected tab on each gateway, and a look at their keys in Redis."""
    async with (
        Fleet(stack.urls, stack.token, seed=seed) as fleet,
        Client(settings_for(stack), user_id) as client,
    ):
        tabs = add_tabs(fleet, user_id)
        await fleet.connect()
        yield client, tabs
