"""``relay gateway`` and ``relay worker``: one process each, until SIGTERM or Ctrl-C."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvloop

from relay.cli.console import warn_of_unknown
from relay.cli.load import load_worker
from relay.cli.logs import configure_logging
from relay.config import find_unknown_variables, load_settings
from relay.errors import RelayError

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        metavar="URL",
        help="Where Redis is. [dim]RELAY_REDIS_URL[/dim]",
        show_default=False,
    ),
]


def gateway(
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Address to listen on. [dim]RELAY_HOST[/dim]",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            help="Port to listen on. [dim]RELAY_PORT[/dim]",
            show_default=False,
        ),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            "--admin-port",
            metavar="PORT",
            help="Port of metrics and readiness in detail. [dim]RELAY_ADMIN_PORT[/dim]",
            show_default=False,
        ),
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Serve the page, WebSockets and HTTP to users.

    Any number of gateways can share a Redis; put a load balancer in front, without stickiness.

    On SIGTERM it hands its connections over to the others before it ends.
    """
    from gateway.app import serve_until_asked

    settings = load_settings(host=host, port=port, admin_port=admin_port, redis_url=redis_url)
    settings.require_token_keys()
    warn_of_unknown(find_unknown_variables())
    configure_logging(settings)
    _run(serve_until_asked(settings))


def worker(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:ATTR",
            help="Your worker, e.g. [bold]agents:worker[/bold] for `worker = Worker()` in "
            "agents.py.",
            show_default=False,
        ),
    ],
    redis_url: RedisUrl = None,
    app_dir: Annotated[
        Path,
        typer.Option("--app-dir", metavar="FOLDER", help="Folder in which the module is."),
    ] = Path(),
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            metavar="N",
            help="Runs at once in this process. [dim]RELAY_WORKER_CONCURRENCY[/dim]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run agents.

    Any number of workers can share a Redis; runs are spread over those that have the agent.

    On SIGTERM it takes no more runs and lets those at work finish.
    """
    settings = load_settings(redis_url=redis_url, worker_concurrency=concurrency)
    warn_of_unknown(find_unknown_variables())
    configure_logging(settings)
    _run(load_worker(reference, app_dir).serve(settings))


def _run(process: Coroutine[Any, Any, None]) -> None:
    try:
        uvloop.run(process)
    except RelayError:
        raise
    except Exception:  # noqa: BLE001 (it is logged, and ends the process)
        # A server's defect belongs into its log, with its place.
        structlog.get_logger(__name__).exception("process_failed")
        raise typer.Exit(1) from None
