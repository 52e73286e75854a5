"""The Python client of the gateway's WebSocket: events in order, each once, over reconnects.

```python
async with RelayClient("http://127.0.0.1:8080", token) as client:
    ack = await client.send_message("How does resume work?", thread_id="t1")
    async for event in client:
        if event.run_id == ack.run_id and event.is_terminal:
            break
```
"""

from __future__ import annotations

from relay.client.client import RelayClient, RequestFailed, RunAccepted
from relay.client.state import (
    Complaint,
    Connected,
    ConnectionEnded,
    Degraded,
    Disconnected,
    Event,
    EventsMissing,
    Reset,
    SequenceHole,
    TokenExpiring,
    Update,
)

__all__ = [
    "Complaint",
    "Connected",
    "ConnectionEnded",
    "Degraded",
    "Disconnected",
    "Event",
    "EventsMissing",
    "RelayClient",
    "RequestFailed",
    "Reset",
    "RunAccepted",
    "SequenceHole",
    "TokenExpiring",
    "Update",
]
