"""What a worker process counts, in the default Prometheus registry.

A worker opens no port. ``prometheus_client.start_http_server`` in the module that declares the
worker is enough to let these be read.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RUNS_ACTIVE = Gauge("relay_worker_runs_active", "Runs at work in this process.", ["agent"])
RUNS_ENDED = Counter(
    "relay_worker_runs_ended_total",
    "Attempts that ended here: completed, error, cancelled, refused (ended or taken elsewhere) or "
    "unfinished (the worker was stopped while Redis was away).",
    ["agent", "status"],
)
RUN_SECONDS = Histogram(
    "relay_worker_run_seconds",
    "Time from agent_started to the end of an attempt.",
    ["agent"],
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
)
TASKS_SKIPPED = Counter(
    "relay_worker_tasks_skipped_total",
    "Tasks whose run could not be claimed: another worker has it, or it has ended.",
    ["reason"],
)
TASKS_DEAD_LETTERED = Counter(
    "relay_worker_tasks_dead_lettered_total", "Tasks moved to the dead letters."
)
AGENTS_ABANDONED = Counter(
    "relay_worker_agents_abandoned_total",
    "Agents that did not stop within the grace time after a cancellation.",
    ["agent"],
)
REDIS_FAILURES = Counter(
    "relay_worker_redis_failures_total", "Failed attempts to reach Redis.", ["part"]
)
