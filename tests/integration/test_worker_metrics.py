"""What a worker counts is its own, and can be read where a port is configured."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import REGISTRY

from agent_worker import Run, Worker
from agent_worker.metrics import WorkerMetrics
from agent_worker.metrics_port import metrics_port
from relay.config import Settings
from relay.errors import ConfigurationError
from tests.integration.worker_support import Client, worker_settings


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix)


async def test_two_workers_of_a_process_count_apart(settings: Settings) -> None:
    worker = Worker()

    @worker.agent("quick")
    async def quick(run: Run) -> str:
        return "done"

    async with Client(settings) as client, worker.running(settings) as one:
        await client.ended(await client.submit("quick"))
        assert await one.drain(2)
        async with worker.running(settings) as other:
            counts = [
                running.metrics.registry.get_sample_value(
                    "relay_worker_runs_ended_total", {"agent": "quick", "status": "completed"}
                )
                for running in (one, other)
            ]
    assert counts == [1, None]
    assert not [family for family in REGISTRY.collect() if family.name.startswith("relay_worker")]


def test_port_serves_the_metrics_for_as_long_as_the_worker_runs(
    redis_url: str, key_prefix: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, worker_metrics_port=0)
    metrics = WorkerMetrics()
    metrics.runs_active.labels("a").set(3)
    with metrics_port(settings, metrics.registry) as port:
        address = f"http://127.0.0.1:{port}/metrics"
        with httpx.Client(trust_env=False) as browser:
            assert 'relay_worker_runs_active{agent="a"} 3.0' in browser.get(address).text
        taken = worker_settings(redis_url, key_prefix, worker_metrics_port=port)
        with (
            pytest.raises(ConfigurationError, match="RELAY_WORKER_METRICS_PORT"),
            metrics_port(taken, metrics.registry),
        ):
            pass
    with httpx.Client(trust_env=False) as browser, pytest.raises(httpx.ConnectError):
        browser.get(address)


def test_no_port_is_opened_unless_it_is_configured(settings: Settings) -> None:
    with metrics_port(settings, WorkerMetrics().registry) as port:
        assert port is None
