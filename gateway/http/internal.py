"""The internal listener: metrics, readiness in detail, and what operators may do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import ADMIN_SCOPE, require_scope
from gateway.cluster import Cluster
from gateway.connection_pool import WebSocketConnectionPool
from gateway.feed import FeedHub
from gateway.health import Health
from gateway.http.dead_letters import dead_letter_routes
from gateway.http.problems import json_response
from gateway.metrics import CONTENT_TYPE, GatewayMetrics
from gateway.node import Node
from gateway.revocation_watch import RevocationWatch
from relay.tokens import Identity


def health_routes(health: Health, *, with_detail: bool) -> list[Route]:
    """Make ``/healthz`` (the process answers) and ``/readyz`` (events come through).

    Args:
        health: What is known.
        with_detail: Whether to name the checks; the public listener does not.
    """

    async def healthz(_: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(_: Request) -> Response:
        is_ready = health.is_ready
        body: dict[str, object] = {"status": "ready" if is_ready else "not_ready"}
        if with_detail:
            body["checks"] = [
                {
                    "name": check.name,
                    "ok": check.is_ok,
                    "required": check.is_required,
                    "detail": check.detail,
                }
                for check in health.checks()
            ]
        return json_response(body, 200 if is_ready else 503)

    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
    ]


def metrics_routes(metrics: GatewayMetrics) -> list[Route]:
    """Make ``/metrics``."""

    async def exposition(_: Request) -> Response:
        return Response(metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    return [Route("/metrics", exposition, methods=["GET"])]


def admin_routes(
    identify: Callable[[Request], Awaitable[Identity]],
    node: Node,
    pool: WebSocketConnectionPool,
    hub: FeedHub,
    health: Health,
    cluster: Cluster,
    revocations: RevocationWatch,
) -> list[Route]:
    """Make what needs a token with the scope ``relay:admin``."""

    async def authorize(request: Request) -> Identity:
        identity = await identify(request)
        require_scope(identity, ADMIN_SCOPE)
        return identity

    async def stats(request: Request) -> Response:
        await authorize(request)
        return json_response(
            {
                "node": node.node_id,
                "ready": health.is_ready,
                "degraded": hub.is_degraded,
                "feeds": hub.feed_count,
                "catch_ups": hub.catch_ups,
                "revocations": len(revocations),
                **asdict(pool.statistics()),
                **await cluster.figures(),
            }
        )

    async def disconnect(request: Request) -> Response:
        await authorize(request)
        nodes = await node.disconnect_everywhere(request.path_params["user_id"])
        return json_response({"nodes": nodes}, 202)

    return [
        Route("/v1/admin/stats", stats, methods=["GET"]),
        # A user id may hold a slash, which arrives decoded.
        Route("/v1/admin/users/{user_id:path}/disconnect", disconnect, methods=["POST"]),
        *dead_letter_routes(authorize, cluster.dead_letters),
    ]
