"""What the bridge's tests share: runs compared without what differs from one run to the next."""

from __future__ import annotations

from typing import Any

from tests.integration.worker_support import Client

_PER_CALL = frozenset({"tool_call_id", "duration_ms", "support_id", "message_id"})


def essence(events: list[dict[str, Any]]) -> list[tuple[str, int, int, str, dict[str, Any]]]:
    """Give what a run told its user, without ids and durations."""
    return [
        (
            event["type"],
            event["seq"],
            event["attempt"],
            event["agent"],
            {name: value for name, value in event["data"].items() if name not in _PER_CALL},
        )
        for event in events
    ]


async def texts_of(client: Client, run_id: str) -> list[str]:
    """Give a run's streamed messages in their order."""
    user = client.keys.user(client.user_id)
    names = [name.decode() for name in await client.link.client.zrange(user.texts, 0, -1)]
    texts = []
    for name in names:
        run, attempt, message_id = name.split(":", 2)
        if run == run_id:
            stored = await client.link.client.get(user.text(run, int(attempt), message_id))
            texts.append(stored.decode())
    return texts
