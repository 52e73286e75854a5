"""What a worker process counts, in a Prometheus registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class WorkerMetrics:
    """The counters of one worker or bridge.

    Attributes:
        registry: Where they can be read; ``prometheus_client`` serves or merges it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.runs_active = Gauge(
            "relay_worker_runs_active",
            "Runs at work in this process.",
            ["agent"],
            registry=self.registry,
        )
        self.runs_ended = Counter(
            "relay_worker_runs_ended_total",
            "Attempts that ended here: completed, error, cancelled, retrying, released (given back "
            "before they began), refused (ended or taken elsewhere) or unfinished (the worker was "
            "stopped while Redis was away).",
            ["agent", "status"],
            registry=self.registry,
        )
        self.run_seconds = Histogram(
            "relay_worker_run_seconds",
            "Time from agent_started to the end of an attempt.",
            ["agent"],
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
            registry=self.registry,
        )
        self.tasks_skipped = Counter(
            "relay_worker_tasks_skipped_total",
            "Tasks whose run could not be claimed: another worker has it, or it has ended.",
            ["reason"],
            registry=self.registry,
        )
        self.tasks_dead_lettered = Counter(
            "relay_worker_tasks_dead_lettered_total",
            "Tasks moved to the dead letters.",
            registry=self.registry,
        )
        self.agents_abandoned = Counter(
            "relay_worker_agents_abandoned_total",
            "Agents that did not stop within the grace time after a cancellation.",
            ["agent"],
            registry=self.registry,
        )
        self.redis_failures = Counter(
            "relay_worker_redis_failures_total",
            "Failed attempts to reach Redis.",
            ["part"],
            registry=self.registry,
        )
