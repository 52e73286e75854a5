"""Agent Relay's shared core: events, Redis model, publishing, recovery."""

__version__ = "0.1.0"
