"""The port on which a worker's metrics can be read, where one is configured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from relay.config import Settings
from relay.errors import ConfigurationError


@contextmanager
def metrics_port(settings: Settings, registry: CollectorRegistry) -> Iterator[int | None]:
    """Serve a registry for the block, in a thread, if the settings name a port; give the port.

    Raises:
        ConfigurationError: The port cannot be opened.
    """
    if settings.worker_metrics_port is None:
        yield None
        return
    host, port = settings.admin_host, settings.worker_metrics_port
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigurationError(
            f"RELAY_WORKER_METRICS_PORT: {host}:{port} cannot be opened: {error.strerror}. Choose "
            "another port, or unset it."
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
