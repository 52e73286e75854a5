"""Run AI agents as functions and let their users watch them live."""

from agent_worker.bridge import AgentWebSocketBridge, BridgeHealth, BridgeState, UserEmitter
from agent_worker.bridged_run import BridgedRun, RunCancelled
from agent_worker.notifier import WebSocketNotifier
from agent_worker.run import Run
from agent_worker.sync_run import SyncRun
from agent_worker.worker import Worker
from relay.errors import AgentError, InputDenied, InputExpired

__all__ = [
    "AgentError",
    "AgentWebSocketBridge",
    "BridgeHealth",
    "BridgeState",
    "BridgedRun",
    "InputDenied",
    "InputExpired",
    "Run",
    "RunCancelled",
    "SyncRun",
    "UserEmitter",
    "WebSocketNotifier",
    "Worker",
]
