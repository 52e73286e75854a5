"""The gateway put together: the only place that knows all of its parts.

Read from here down. ``serve`` runs a gateway as a process; ``running_gateway`` runs one inside
another program, such as a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import structlog
import uvloop
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from gateway.auth import Authenticator
from gateway.clock import steady_ms, wall_ms
from gateway.cluster import Cluster
from gateway.commands import RunCommands
from gateway.connection_pool import PoolLimits, WebSocketConnectionPool
from gateway.direct import TickWriter
from gateway.doorkeeper import Doorkeeper, DoorLimits, Lobby
from gateway.feed import FeedHub
from gateway.handover import hand_over
from gateway.handshake import StraightToSocket, connector, websocket_routes
from gateway.health import Health
from gateway.http.events import event_routes
from gateway.http.internal import admin_routes, health_routes, metrics_routes
from gateway.http.middleware import ApiCors, SafeHeaders
from gateway.http.openapi import openapi_routes
from gateway.http.page import page_routes
from gateway.http.problems import exception_handlers
from gateway.http.revocations import revocation_routes
from gateway.http.runs import run_routes
from gateway.http.tickets import ticket_routes
from gateway.metrics import GatewayMetrics
from gateway.node import Node
from gateway.place_keeper import PlaceKeeper
from gateway.protocol import Connection, ConnectionServices
from gateway.refusals import UNAVAILABLE_RETRY_MS
from gateway.revocation_watch import RevocationWatch
from gateway.server import Listener, bind, server_config
from gateway.session import SessionLimits
from gateway.tickets import TicketOffice
from gateway.wheel import TICK_MS, Wheel
from relay.cancellation import end_tasks
from relay.config import Settings
from relay.errors import CloseCode, RequestRefused
from relay.jwks import KeySet
from relay.keys import Keys
from relay.places import PlaceBook
from relay.probe import Probe
from relay.reaper import Reaper
from relay.revocations import RevocationLog
from relay.run_model import RunLimits
from relay.runs import RunRegistry
from relay.scripts import LogLimits, RedisLink
from relay.tokens import Identity, TokenVerifier

FIRST_PROBES = 5
FIRST_PROBE_DEADLINE_S = 0.3
"""The first probes may overtake the subscription that should catch them: give up on them soon."""

GC_THRESHOLDS = (2_000, 10, 10)

TICKS_AT_ONCE = 100
"""So many connections are looked at before others get their turn."""

log = structlog.stdlib.get_logger(__name__)


class Gateway:
    """One gateway process's parts, started and stopped together.

    Args:
        settings: Its configuration.

    Raises:
        ConfigurationError: There is no way to verify tokens.
        RedisMisconfigured: The Redis address is not one.
    """

    def __init__(self, settings: Settings) -> None:
        settings.require_token_keys()
        self.settings = settings
        self.metrics = GatewayMetrics()
        keys = Keys(settings.key_prefix)
        self.link = RedisLink(settings.redis_url, limits=LogLimits.of(settings))
        self.hub = FeedHub(self.link, keys)
        self.node = Node(
            self.link,
            keys,
            on_disconnect_user=self._disconnect_user,
            on_replaced=self._close_replaced,
            on_presumed_dead=self._hold_places,
        )
        per_user = settings.max_connections_per_user
        self._places = PlaceKeeper(
            PlaceBook(self.link, keys, self.node.node_id, per_user), per_user
        )
        self.pool = WebSocketConnectionPool(
            PoolLimits(per_user=per_user, per_node=settings.max_connections_per_node),
            self.metrics,
            self._places,
            node_id=self.node.node_id,
            tell_replaced=self.node.tell_replaced,
        )
        self._probe = Probe(self.link, self.node.channel)
        self.health = Health(
            self._probe,
            is_subscribed=lambda: self.hub.subscriber.is_connected,
            agents_error=lambda: self._commands.agents_error,
            revocations_age_s=lambda: self._revocations.age_s,
        )
        self._verifier = TokenVerifier(
            settings.secrets,
            key_set=KeySet(settings.jwt_jwks_url) if settings.jwt_jwks_url else None,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
        )
        limits = DoorLimits(
            waiting=settings.max_waiting_sockets,
            waiting_per_address=settings.max_waiting_sockets_per_address,
            failures_per_minute=settings.max_failed_logins_per_minute,
            trusted_proxies=settings.proxies,
        )
        self._door = Doorkeeper(limits, time.monotonic)
        self._lobby = Lobby(limits)
        self._tickets = TicketOffice(self.link, keys)
        self._revocation_log = RevocationLog(self.link, keys)
        self._revocations = RevocationWatch(self._revocation_log, self._close_revoked, wall_ms)
        self._authenticator = Authenticator(
            self._verifier,
            self._tickets,
            settings.allowed_origins,
            self._revocations.is_revoked,
            self._door,
            time.time,
        )
        registry = RunRegistry(
            self.link,
            keys,
            RunLimits.of(settings),
        )
        self._cluster = Cluster(self.link, keys, registry)
        self._commands = RunCommands(
            registry,
            default_agent=settings.default_agent,
            max_content_chars=settings.max_content_chars,
        )
        self._reaper = Reaper(
            self.link, keys, lease_ms=settings.lease_ms, cancel_grace_ms=settings.cancel_grace_ms
        )
        self._wheel: Wheel[Connection] = Wheel(steady_ms())
        self._answering: set[asyncio.Task[None]] = set()
        self._services = ConnectionServices(
            node_id=self.node.node_id,
            hub=self.hub,
            commands=self._commands,
            authenticator=self._authenticator,
            pool=self.pool,
            wheel=self._wheel,
            metrics=self.metrics,
            session_limits=SessionLimits(
                max_frame_bytes=settings.max_frame_bytes,
                max_content_chars=settings.max_content_chars,
                frames_per_second=settings.frames_per_second,
            ),
            max_connections=settings.max_connections_per_user,
            heartbeat_ms=settings.heartbeat_ms,
            outbox_bytes=settings.outbox_bytes,
            ticks=TickWriter(self.metrics),
            tasks=self._answering,
        )
        self.connect = connector(self._services, self.check_open)
        self._observe()
        self._public: Listener | None = None
        self._internal: Listener | None = None
        self._background: list[asyncio.Task[None]] = []
        self._stop_asked = asyncio.Event()
        self._has_started = False
        self._failure: BaseException | None = None

    # --- Life ---

    @property
    def url(self) -> str:
        """Address of the public listener, with the real port."""
        if self._public is None:
            raise RuntimeError("the gateway has not been started")
        return self._public.url

    @property
    def admin_url(self) -> str:
        """Address of the internal listener, with the real port."""
        if self._internal is None:
            raise RuntimeError("the gateway has not been started")
        return self._internal.url

    async def start(self) -> None:
        """Return when clients are served.

        Raises:
            ConfigurationError: A port cannot be had.
            RedisUnavailable, RedisMisconfigured: Redis cannot serve us.
        """
        settings = self.settings
        config = server_config(
            build_app(self),
            max_frame_bytes=settings.max_frame_bytes,
            lobby=self._lobby,
            metrics=self.metrics,
        )
        admin_config = server_config(
            build_internal_app(self),
            max_frame_bytes=settings.max_frame_bytes,
            metrics=self.metrics,
        )
        self._public = Listener(
            config,
            bind(
                settings.host, settings.port, host_variable="RELAY_HOST", port_variable="RELAY_PORT"
            ),
            hand_over=self._drain,
        )
        self._internal = Listener(
            admin_config,
            bind(
                settings.admin_host,
                settings.admin_port,
                host_variable="RELAY_ADMIN_HOST",
                port_variable="RELAY_ADMIN_PORT",
            ),
        )
        await self.link.check()
        await self.hub.start()
        self._run_in_background(self.hub.watch(), "feeds")
        self.hub.listen(self.node.channel, self._receive_signal)
        self.hub.listen(self._revocations.channel, self._revocations.receive)
        await self._revocations.look()
        await self.node.renew()
        await self._probe_first()
        self._run_in_background(self.node.run(), "node")
        self._run_in_background(self._places.run(), "places")
        self._run_in_background(self._revocations.run(), "revocations")
        self._run_in_background(self.health.run(), "health")
        self._run_in_background(self._turn_wheel(), "wheel")
        self._run_in_background(self._reaper.run(), "reaper")
        await self._internal.start()
        await self._public.start()
        self._has_started = True
        log.info("gateway started", node=self.node.node_id, url=self.url, admin_url=self.admin_url)

    async def stop(self) -> None:
        """Hand the connections over, then end everything. Also after a start that failed."""
        self.health.is_draining = True
        if self._public is not None:
            await self._public.stop()
        if self._internal is not None:
            await self._internal.stop()
        await end_tasks(self._answering)
        await end_tasks(self._background)
        await self._places.aclose()
        await self.node.leave()
        await self.hub.aclose()
        await self._verifier.aclose()
        await self.link.aclose()
        if self._has_started:
            log.info("gateway stopped", node=self.node.node_id)

    def ask_to_stop(self) -> None:
        """Let ``wait`` return; asked twice, stop without waiting for anybody."""
        if self._stop_asked.is_set() and self._public is not None:
            self._public.force_exit = True
        self._stop_asked.set()

    async def wait(self) -> None:
        """Return when somebody asked to stop.

        Raises:
            BaseException: What made a part fail that the gateway cannot do without.
        """
        await self._stop_asked.wait()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what a part of the gateway failed with, if one did and nobody was told."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # --- Parts that run all the time ---

    def _run_in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._background_ended)
        self._background.append(task)

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        # None of them ends by itself. A gateway without one would serve, but wrongly.
        self._failure = task.exception() or RuntimeError(f"{task.get_name()} ended")
        log.critical("a part of the gateway failed", part=task.get_name(), exc_info=self._failure)
        self._stop_asked.set()

    async def _turn_wheel(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            await asyncio.sleep(TICK_MS / 1000)
            self.metrics.note_loop_lag(max(0.0, loop.time() - began_s - TICK_MS / 1000))
            for index, connection in enumerate(self._wheel.turn(steady_ms()), 1):
                _tick(connection)
                if not index % TICKS_AT_ONCE:
                    # Connections that came together have their heartbeats together.
                    await asyncio.sleep(0)

    async def _probe_first(self) -> None:
        patience_s, self._probe.deadline_s = self._probe.deadline_s, FIRST_PROBE_DEADLINE_S
        for _ in range(FIRST_PROBES):
            if await self.health.probe_once():
                break
        # Otherwise Redis is slow or forbids our channel: readiness stays red and says so.
        self._probe.deadline_s = patience_s

    def _receive_signal(self, payload: bytes) -> None:
        if not self._probe.receive(payload):
            self.node.receive(payload)

    def _disconnect_user(self, user_id: str) -> None:
        for connection in self.pool.of_user(user_id):
            connection.close(CloseCode.FORBIDDEN, "disconnected by an operator")

    def _close_replaced(self, connection_id: str, user_id: str) -> None:
        self.pool.close_replaced(connection_id, user_id)

    def _hold_places(self) -> None:
        self._places.hold_all()

    def _close_revoked(self) -> None:
        for connection in self.pool:
            if self._revocations.is_revoked(connection.identity):
                connection.end_access("token revoked")

    # --- The end ---

    def check_open(self) -> None:
        """Make sure that this gateway takes connections.

        Raises:
            RequestRefused: ``unavailable`` while it hands its connections over.
        """
        if self.health.is_draining:
            raise RequestRefused(
                "unavailable",
                "This gateway is shutting down. Another one serves you.",
                retry_after_ms=UNAVAILABLE_RETRY_MS,
            )

    async def _drain(self) -> None:
        self.health.is_draining = True
        if self._public is not None:
            await hand_over(self.pool, self._public)

    # --- Figures ---

    def _observe(self) -> None:
        observe = self.metrics.observe
        observe("relay_connections", "Open connections.", lambda: len(self.pool))
        observe("relay_users", "Users connected.", lambda: self.pool.statistics().users)
        observe("relay_feeds", "Channels that are open.", lambda: self.hub.feed_count)
        observe(
            "relay_subscriber_connected",
            "Whether the pub/sub connection is up.",
            lambda: float(self.hub.subscriber.is_connected),
        )
        observe("relay_degraded", "Whether Redis is away.", lambda: float(self.hub.is_degraded))
        observe("relay_ready", "Whether readiness is green.", lambda: float(self.health.is_ready))
        observe(
            "relay_probe_age_seconds",
            "Time since a probe came back through Redis.",
            lambda: self.health.probe_age_s,
        )
        observe(
            "relay_waiting_sockets", "Sockets without a whole request.", lambda: len(self._lobby)
        )
        observe(
            "relay_failing_addresses",
            "Addresses that showed tokens or tickets that were worth nothing.",
            lambda: self._door.addresses,
        )
        self.metrics.observe_count(
            "relay_sockets_turned_away",
            "Sockets without a whole request that had to make room.",
            lambda: self._lobby.turned_away,
        )
        observe("relay_revocations", "Revocations in force.", lambda: len(self._revocations))
        self.metrics.observe_count(
            "relay_catch_ups",
            "Pages of history read for connections that were behind.",
            lambda: self.hub.catch_ups,
        )
        self.metrics.observe_count(
            "relay_live_messages_not_understood",
            "Live messages of an unknown form; what they said was read from history.",
            lambda: self.hub.not_understood,
        )

    # --- Requests ---

    async def identify(self, request: Request) -> Identity:
        """Give the identity behind an HTTP request.

        Raises:
            RequestRefused, TokenRejected: There is none.
        """
        return await self._authenticator.identify_peer(request)

    def public_routes(self) -> list[BaseRoute]:
        """Give the routes of the public listener."""
        limit = self.settings.max_frame_bytes
        return [
            *websocket_routes(self._services, self.connect),
            *event_routes(self._services, self.check_open),
            *run_routes(self.identify, self._commands, limit),
            *ticket_routes(self._services, self._tickets, self.check_open),
            *health_routes(self.health, with_detail=False),
            *openapi_routes(),
            *page_routes(),
        ]

    def internal_routes(self) -> list[BaseRoute]:
        """Give the routes of the internal listener."""
        return [
            *metrics_routes(self.metrics),
            *health_routes(self.health, with_detail=True),
            *admin_routes(
                self.identify,
                self.node,
                self.pool,
                self.hub,
                self.health,
                self._cluster,
                self._revocations,
            ),
            *revocation_routes(self.identify, self._revocation_log),
        ]


def _tick(connection: Connection) -> None:
    """Do what is due at a connection; one that fails is cut off, the others go on."""
    try:
        connection.tick()
    except Exception:
        log.exception("connection failed", user_id=connection.user_id)
    else:
        return
    try:
        connection.break_off()
    except Exception:
        log.exception("connection not cut off", user_id=connection.user_id)


def build_app(gateway: Gateway) -> ASGIApp:
    """Make the public application of a gateway."""
    app = Starlette(
        routes=gateway.public_routes(),
        middleware=[
            Middleware(SafeHeaders),
            Middleware(ApiCors, allowed_origins=gateway.settings.allowed_origins),
        ],
        exception_handlers=exception_handlers(gateway.metrics),
    )
    return StraightToSocket(app, connect=gateway.connect)


def build_internal_app(gateway: Gateway) -> Starlette:
    """Make the internal application of a gateway."""
    return Starlette(
        routes=gateway.internal_routes(),
        middleware=[Middleware(SafeHeaders)],
        exception_handlers=exception_handlers(gateway.metrics),
    )


@contextlib.asynccontextmanager
async def running_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Run a gateway inside this program: started in the block, drained and gone after it.

    Raises:
        ConfigurationError, RedisUnavailable, RedisMisconfigured: It cannot start; one sentence
            says why.
        BaseException: What a part of it failed with meanwhile, after the block.
    """
    gateway = Gateway(settings)
    try:
        await gateway.start()
        yield gateway
        gateway.raise_failure()
    finally:
        await gateway.stop()


def relieve_gc() -> None:
    """Keep the garbage collector from pausing the loop for what never becomes garbage.

    For a process that does nothing else. What has been loaded is not looked at again. And the
    collector runs where it may find something: events come and go by reference counts, and most
    connections stay, so the default of 700 new objects would walk through them for nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def serve_until_asked(settings: Settings) -> None:
    """Run a gateway until SIGTERM or SIGINT; a second one ends it without waiting.

    Raises:
        ConfigurationError, RedisUnavailable, RedisMisconfigured: It cannot start.
    """
    loop = asyncio.get_running_loop()
    async with running_gateway(settings) as gateway:
        relieve_gc()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, gateway.ask_to_stop)
        await gateway.wait()


def serve(settings: Settings) -> None:
    """Run a gateway as this process, on uvloop, until it is told to stop.

    Raises:
        ConfigurationError, RedisUnavailable, RedisMisconfigured: It cannot start; one sentence
            says why.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_until_asked(settings))
