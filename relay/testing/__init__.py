"""What test authors use: a whole relay for a test, clients that forget nothing, and proof.

The pytest plugin is ``relay.testing.plugin``; docs/testing.md describes its fixtures. Nothing is
imported before it is used, so that the plugin costs a project nothing that does not use it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.testing.blocking import BlockingStack
    from relay.testing.processes import ManagedProcess
    from relay.testing.recording import Outage, RecordingClient
    from relay.testing.redis_server import RedisServer
    from relay.testing.relay_stack import RelayStack
    from relay.testing.sequence import Problem, SequenceChecker
    from relay.testing.stack import GatewayProcess, Stack
    from relay.testing.utility import WebSocketTestUtility

__all__ = [
    "BlockingStack",
    "GatewayProcess",
    "ManagedProcess",
    "Outage",
    "Problem",
    "RecordingClient",
    "RedisServer",
    "RelayStack",
    "SequenceChecker",
    "Stack",
    "WebSocketTestUtility",
]

_HOME = {
    "BlockingStack": "blocking",
    "GatewayProcess": "stack",
    "ManagedProcess": "processes",
    "Outage": "recording",
    "Problem": "sequence",
    "RecordingClient": "recording",
    "RedisServer": "redis_server",
    "RelayStack": "relay_stack",
    "SequenceChecker": "sequence",
    "Stack": "stack",
    "WebSocketTestUtility": "utility",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
