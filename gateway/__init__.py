"""Agent Relay's gateway: delivers each user's events to that user's connections."""
