"""An agent that finds a train, asks its user, and books it."""

from __future__ import annotations

import asyncio

from agent_worker import AgentError, Run, Worker

TRAINS = {"Lisbon": ("18:40", 49), "Porto": ("17:05", 35)}

worker = Worker("travel")


@worker.agent("travel", description="Finds a train and books it when you say so.")
async def travel(run: Run) -> str:
    """Find a train to where the user wants to go, and book it if they agree."""
    await run.thinking("Looking for a train")
    async with run.tool("find_train", {"to": run.request.content}) as tool:
        found = TRAINS.get(run.request.content)
        if found is None:
            raise AgentError("invalid_request", f"No train goes to {run.request.content}.")
        departure, price = found
        tool.result = {"departure": departure, "price": price}
    for word in f"There is a train at {departure} for {price} euros.".split():
        await run.delta(word + " ")
        await asyncio.sleep(0.05)
    if not await run.approve(f"Book it for {price} euros?", timeout_s=60):
        return "Nothing was booked."
    async with run.tool("book_train", {"departure": departure}) as tool:
        tool.result = {"ticket": "T-1"}
    return f"Booked: {departure} to {run.request.content}."
