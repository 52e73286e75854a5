"""Run AI agents as functions and let their users watch them live."""

from agent_worker.run import Run
from agent_worker.sync_run import SyncRun
from agent_worker.worker import Worker
from relay.errors import AgentError, InputDenied, InputExpired

__all__ = ["AgentError", "InputDenied", "InputExpired", "Run", "SyncRun", "Worker"]
