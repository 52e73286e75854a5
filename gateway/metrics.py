"""What Prometheus is told. Counting is an integer addition; the rest happens when it is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class GatewayMetrics:
    """Counters of one gateway, in a registry of its own.

    The parts count by writing to the attributes; what others know better is read through the
    functions given to ``observe`` when the metrics are collected.
    """

    def __init__(self) -> None:
        self.opened = 0
        self.closed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.frames_received = 0
        self.requests_refused: Counter[str] = Counter()
        self.delivered_events = 0
        self.sent_frames = 0
        self.sent_bytes = 0
        self.resets = 0
        self.loop_lag_s = 0.0
        self.loop_lag_max_s = 0.0
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._counters: list[tuple[str, str, Callable[[], float]]] = []
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def observe(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each collection."""
        self._gauges.append((name, text, value))

    def observe_count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a counter whose value is read at each collection."""
        self._counters.append((name, text, value))

    def note_loop_lag(self, lag_s: float) -> None:
        """Note by how much the event loop was late."""
        self.loop_lag_s = lag_s
        self.loop_lag_max_s = max(self.loop_lag_max_s, lag_s)

    def describe(self) -> Iterable[Metric]:
        """Name no metrics in advance; the registry would otherwise collect when registering."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Give all metrics (the interface of a Prometheus collector)."""
        yield _count("relay_connections_opened", "Connections taken in.", self.opened)
        yield _labelled("relay_connections_closed", "Connections that ended.", "code", self.closed)
        yield _labelled("relay_handshakes_refused", "Refused upgrades.", "reason", self.refused)
        yield _count("relay_frames_received", "Frames from clients.", self.frames_received)
        yield _labelled(
            "relay_requests_refused", "Requests refused.", "code", self.requests_refused
        )
        yield _count("relay_delivered_events", "Events given to sockets.", self.delivered_events)
        yield _count("relay_sent_frames", "Frames taken by sockets.", self.sent_frames)
        yield _count("relay_sent_bytes", "Bytes of frames taken by sockets.", self.sent_bytes)
        yield _count("relay_resets", "Clients told that history was lost.", self.resets)
        yield GaugeMetricFamily(
            "relay_loop_lag_seconds", "How late the event loop was last.", self.loop_lag_s
        )
        yield GaugeMetricFamily(
            "relay_loop_lag_max_seconds",
            "How late the event loop was at worst since the last collection.",
            self.loop_lag_max_s,
        )
        self.loop_lag_max_s = 0.0
        for name, text, value in self._gauges:
            yield GaugeMetricFamily(name, text, value())
        for name, text, value in self._counters:
            yield CounterMetricFamily(name, text, value())

    def exposition(self) -> bytes:
        """Give all metrics in the text format."""
        return generate_latest(self.registry)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


def _labelled(name: str, text: str, label: str, values: Counter[str]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key in sorted(values):
        family.add_metric([key], values[key])
    return family
