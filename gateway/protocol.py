"""One client's connection: between its socket, the session's rules and the user's feed.

Decisions are made elsewhere (``session``, ``outbox``, the feed); this carries them out.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gateway import frames
from gateway.auth import Authenticator
from gateway.clock import steady_ms, wall_ms
from gateway.commands import RunCommands
from gateway.connection_pool import WebSocketConnectionPool
from gateway.direct import TickWriter
from gateway.feed import Attachment, FeedHub
from gateway.metrics import GatewayMetrics
from gateway.refusals import refusal_of
from gateway.requests import Cancel, InputResponse, UserMessage
from gateway.session import (
    AnswerInput,
    CancelRun,
    Close,
    Effect,
    Pong,
    Refuse,
    Reply,
    Session,
    SessionLimits,
    Submit,
    VerifyToken,
)
from gateway.transport import Transport
from gateway.wheel import Wheel
from relay.codec import Position, Publication
from relay.errors import CloseCode, RequestRefused
from relay.places import Place
from relay.recovery import ActiveRun, Since
from relay.run_model import AgentInfo, RunSummary
from relay.tokens import Identity

ESTABLISH_LIMIT_MS = 10_000
"""A connection whose subscription is not confirmed by then is sent away, to come back later."""

CLOSE_LIMIT_MS = 5_000
"""A peer that does not take what was waiting by then is closed all the same."""

PING_INTERVAL_MS = 20_000
PING_TIMEOUT_MS = 20_000
"""A peer that has not answered a ping within this time, though it reads, is gone: 4408."""

NEVER_MS = 2**62

WAITING = (Submit, CancelRun, AnswerInput, VerifyToken)
"""Effects that need an answer from elsewhere."""


@dataclass(frozen=True, slots=True)
class ConnectionServices:
    """What every connection of a node shares."""

    node_id: str
    hub: FeedHub
    commands: RunCommands
    authenticator: Authenticator
    pool: WebSocketConnectionPool
    wheel: Wheel[Connection]
    metrics: GatewayMetrics
    session_limits: SessionLimits
    max_connections: int
    heartbeat_ms: int
    outbox_bytes: int
    ticks: TickWriter
    tasks: set[asyncio.Task[None]]

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something be done aside; the gateway waits for it, or ends it, when it stops."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def limits_for_client(self) -> Mapping[str, int]:
        """Give ``limits`` of ``connection_established``."""
        return {
            "max_frame_bytes": self.session_limits.max_frame_bytes,
            "max_content_chars": self.session_limits.max_content_chars,
            "max_connections": self.max_connections,
            "frames_per_second": self.session_limits.frames_per_second,
        }


class Connection:
    """A user's connection, from the accepted upgrade to the close.

    It is the sink of its cursor: the feed writes events into it, synchronously, while there is
    room. It is due on the node's wheel for heartbeats, pings, the token's expiry and its
    deadlines. Between these and what comes from the client or from the feed it costs no time, and
    no task.

    Args:
        services: Those of the node.
        identity: Whom the verified token speaks for.
        since: Where the client wants to go on.
        place: Its id, and the device, as the client says.
        agents: Registered agents, for the client.

    Attributes:
        has_room: Whether events may be written; if not, ``writable`` is called later.
    """

    __slots__ = (
        "_agents",
        "_awaits_pong",
        "_closing",
        "_cursor",
        "_deadline_ms",
        "_has_ended",
        "_heartbeat_due_ms",
        "_is_established",
        "_ping_due_ms",
        "_services",
        "_session",
        "_since",
        "_transport",
        "client_id",
        "connection_id",
        "has_room",
        "identity",
        "user_id",
    )

    def __init__(
        self,
        services: ConnectionServices,
        identity: Identity,
        *,
        since: Since,
        place: Place,
        agents: Sequence[AgentInfo],
    ) -> None:
        self.connection_id = place.connection_id
        self.user_id = identity.user_id
        self.identity = identity
        self.client_id = place.client_id
        self.has_room = True
        self._services = services
        self._since: Since = since
        self._agents = agents
        self._session = Session(
            identity.user_id, identity.expires_at_ms, services.session_limits, wall_ms()
        )
        self._transport: Transport | None = None
        self._cursor: Attachment | None = None
        self._is_established = False
        self._closing: Close | None = None
        self._has_ended = False
        now_ms = steady_ms()
        self._heartbeat_due_ms = now_ms + services.heartbeat_ms
        # Connections that came together are pinged one after the other.
        self._ping_due_ms = now_ms + random.randrange(PING_INTERVAL_MS // 2, PING_INTERVAL_MS)  # noqa: S311
        self._awaits_pong = False
        self._deadline_ms: int | None = now_ms + ESTABLISH_LIMIT_MS

    # --- Life ---

    def open(self, transport: Transport) -> None:
        """Begin to serve. The caller has registered it in the pool and accepted the upgrade.

        The transport says when it is over: ``ended``, and ``gone``.
        """
        self._transport = transport
        if self._closing is not None:
            # Somebody closed it while the upgrade was on its way.
            self._deadline_ms = steady_ms() + CLOSE_LIMIT_MS
            transport.close(self._closing.code, self._closing.reason)
            self._schedule()
            return
        self._schedule()
        self._cursor = self._services.hub.attach(self.user_id, self._since, self)
        self._since = "active"

    def close(self, code: CloseCode, reason: str) -> None:
        """Close after what is waiting has been sent; no further event is."""
        if self._closing is not None:
            return
        self._closing = Close(code, reason)
        if self._cursor is not None:
            self._cursor.close()
        self._deadline_ms = steady_ms() + CLOSE_LIMIT_MS
        if self._transport is not None:
            self._transport.close(code, reason)
            self._schedule()

    def end_access(self, reason: str) -> None:
        """Close with 4401 at once: what waits for the socket belongs to nobody any more."""
        if self._closing is None or self._closing.code != CloseCode.TOKEN_EXPIRED:
            self._cut_off(CloseCode.TOKEN_EXPIRED, reason)

    def break_off(self) -> None:
        """Close with 1011 at once: what it would do next cannot be relied on."""
        closing = self._closing or Close(CloseCode.INTERNAL, "connection failed")
        self._cut_off(closing.code, closing.reason)

    def drain(self, after_ms: int) -> None:
        """Ask the client to come back, to any gateway, and close with 1012."""
        if self._closing is None:
            self._send(frames.reconnect(after_ms, "drain"))
            self.close(CloseCode.DRAIN, "this gateway is shutting down")

    def ended(self, code: int, reason: str) -> None:
        """Give up the connection's place: nothing can be sent or received any more.

        Args:
            code: What the transport knows; a close of ours says it better.
            reason: As for ``code``.
        """
        if self._has_ended:
            return
        self._has_ended = True
        if self._closing is None:
            self._closing = Close(code, reason)
        if self._cursor is not None:
            self._cursor.close()
        self._services.pool.remove(self, self._closing.code, self._closing.reason)

    def gone(self) -> None:
        """Leave nothing behind: the socket is closed."""
        self._transport = None
        self._services.wheel.remove(self)

    # --- Time ---

    def tick(self) -> None:
        """Do what is due. Called by the turn of the node's wheel."""
        transport = self._transport
        if transport is None:
            return
        now_ms = steady_ms()
        if self._deadline_ms is not None and now_ms >= self._deadline_ms:
            self._miss_deadline()
        elif transport.is_stuck(now_ms):
            self._cut_off(CloseCode.TOO_SLOW, "no frame was taken for a minute")
        else:
            if self._closing is None:
                self._advance(now_ms, transport)
            self._schedule()

    def _advance(self, now_ms: int, transport: Transport) -> None:
        for effect in self._session.advance(wall_ms()):
            self._perform_now(effect)
        if now_ms >= self._heartbeat_due_ms:
            self._heartbeat_due_ms = now_ms + self._services.heartbeat_ms
            if self._is_established:
                self._send(frames.heartbeat(self._position, wall_ms()), self._position)
        if transport.has_pings and now_ms >= self._ping_due_ms:
            self._check_pong(now_ms, transport)

    def _check_pong(self, now_ms: int, transport: Transport) -> None:
        # A ping of ours may wait behind what the peer has not read, and its answer behind what we
        # have not. Whether such a peer is too slow is for the backlog to say (4410).
        is_silent = transport.stuck_at_ms is None and transport.is_reading
        if self._awaits_pong and is_silent:
            self._cut_off(CloseCode.NO_PONG, "no pong")
            return
        self._awaits_pong = True
        self._ping_due_ms = now_ms + PING_TIMEOUT_MS
        transport.send_ping(_ping_payload(self._ping_due_ms))

    def _miss_deadline(self) -> None:
        if self._closing is None:
            self.refuse(
                RequestRefused("unavailable", "The subscription was not confirmed in time.")
            )
        else:
            self._cut_off(self._closing.code, self._closing.reason)

    def _cut_off(self, code: int, reason: str) -> None:
        if self._cursor is not None:
            self._cursor.close()
        self._closing = Close(code, reason)
        self._deadline_ms = None
        if self._transport is not None:
            self._transport.force_close(code, reason)

    def _schedule(self) -> None:
        transport = self._transport
        if transport is None:
            return
        due_ms = NEVER_MS
        if self._closing is None:
            # Both clocks are looked at once: a token's expiry counts in the time of day.
            now_ms = steady_ms()
            due_ms = min(
                self._heartbeat_due_ms, now_ms + max(0, self._session.next_due_ms - wall_ms())
            )
            if transport.has_pings:
                due_ms = min(due_ms, self._ping_due_ms)
        if self._deadline_ms is not None:
            due_ms = min(due_ms, self._deadline_ms)
        stuck_at_ms = transport.stuck_at_ms
        if stuck_at_ms is not None:
            due_ms = min(due_ms, stuck_at_ms)
        if due_ms < NEVER_MS:
            self._services.wheel.schedule(self, due_ms)

    # --- What the client sends ---

    def receive(self, text: str | None) -> None:
        """Take a message, None for a binary one."""
        self._services.metrics.frames_received += 1
        now_ms = wall_ms()
        effects = (
            self._session.receive_binary(now_ms)
            if text is None
            else self._session.receive_text(text, now_ms)
        )
        for index, effect in enumerate(effects):
            if isinstance(effect, WAITING):
                self._answer_aside(effects[index:])
                return
            self._perform_now(effect)

    def receive_ping(self) -> bool:
        """Take a ping, or a pong that was not asked for; says whether a ping is answered."""
        effects = self._session.receive_ping(wall_ms())
        for effect in effects:
            self._perform_now(effect)
        return not effects

    def receive_pong(self, payload: bytes) -> bool:
        """Take a pong; says whether it was asked for."""
        if not self._awaits_pong or payload != _ping_payload(self._ping_due_ms):
            return False
        self._awaits_pong = False
        self._ping_due_ms += PING_INTERVAL_MS - PING_TIMEOUT_MS
        return True

    # --- Effects ---

    def _answer_aside(self, effects: Sequence[Effect]) -> None:
        """Carry out what has to wait; until it is done, nothing more is read from the client."""
        if self._transport is not None:
            self._transport.hold()
        self._services.run(self._perform_each(effects))

    async def _perform_each(self, effects: Sequence[Effect]) -> None:
        try:
            for effect in effects:
                await self._perform(effect)
        finally:
            if self._transport is not None:
                self._transport.release()

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Submit(message):
                await self._answer(message.id, self._submit(message))
            case CancelRun(request):
                await self._answer(request.id, self._cancel(request))
            case AnswerInput(response):
                await self._answer(response.id, self._answer_input(response))
            case VerifyToken(frame_id, token):
                await self._answer(frame_id, self._refresh(frame_id, token))
            case _:
                self._perform_now(effect)

    def _perform_now(self, effect: Effect) -> None:
        match effect:
            case Reply(frame):
                self._send(frame)
            case Refuse(code, frame):
                self._services.metrics.requests_refused[code] += 1
                self._send(frame)
            case Pong(frame_id):
                self._send(frames.pong(frame_id, self._position))
            case Close(CloseCode.TOKEN_EXPIRED, reason):
                self.end_access(reason)
            case Close(close_code, reason):
                self.close(CloseCode(close_code), reason)
            case _:
                raise TypeError(f"{type(effect).__name__} needs to wait")

    async def _answer(self, frame_id: str, work: Any) -> None:
        try:
            effects = await work
        except Exception as error:  # noqa: BLE001 -- one bad request must not end the connection
            effects = self._session.refuse(refusal_of(error), frame_id)
        for effect in effects:
            self._perform_now(effect)

    async def _submit(self, message: UserMessage) -> list[Effect]:
        submitted = await self._services.commands.submit(self.user_id, message, message.id)
        return [
            Reply(frames.ack(message.id, run_id=submitted.run_id, duplicate=submitted.duplicate))
        ]

    async def _cancel(self, request: Cancel) -> list[Effect]:
        outcome = await self._services.commands.cancel(self.user_id, request.run_id, request.reason)
        return [Reply(frames.ack(request.id, run_id=outcome.run_id, status=outcome.status))]

    async def _answer_input(self, response: InputResponse) -> list[Effect]:
        run_id, request_id = response.run_id, response.request_id
        await self._services.commands.answer_input(self.user_id, run_id, request_id, response)
        return [Reply(frames.ack(response.id, run_id=run_id, request_id=request_id))]

    async def _refresh(self, frame_id: str, token: str) -> list[Effect]:
        identity = await self._services.authenticator.verify_token(token)
        if identity.user_id == self.user_id:
            self.identity = identity
        effects = self._session.token_verified(
            frame_id, identity.user_id, identity.expires_at_ms, wall_ms()
        )
        self._schedule()
        return effects

    # --- What the transport says ---

    def clogged(self) -> None:
        """Learn that the socket holds something back: it may turn out to be stuck."""
        self._schedule()

    def writable(self) -> None:
        """Learn that there is room again, or that the socket has taken everything."""
        if self._closing is None and self._cursor is not None:
            self._cursor.writable()

    def _send(self, frame: bytes, position: str = "") -> None:
        if self._closing is None and self._transport is not None:
            self._transport.send(frame, position)

    @property
    def _position(self) -> str:
        return "" if self._cursor is None else self._cursor.position

    def position_after(self, publication: Publication) -> str:
        """Give the position to resume from after an event that is being written."""
        epoch = "" if self._cursor is None else self._cursor.epoch
        return str(Position(epoch, publication.offset))

    # --- What the feed writes (its sink) ---

    @property
    def is_idle(self) -> bool:
        """Whether the socket took everything written; if not, ``writable`` is called when it has.

        Only who asks is called: events that flow cost no such call.
        """
        return self._transport is not None and self._transport.is_idle

    def write(self, publication: Publication) -> None:
        """Send an event."""
        transport = self._transport
        if transport is not None:
            transport.write(publication)

    def write_all(self, publications: Sequence[Publication]) -> None:
        """Send the events of a page."""
        transport = self._transport
        if transport is not None:
            transport.write_all(publications)

    def write_part(self, frame: bytes, is_last: bool) -> None:
        """Send a piece of a large event, which counts as delivered with its last."""
        if is_last and self._closing is None:
            self._services.metrics.delivered_events += 1
        self._send(frame)

    def established(self, position: Position, recovered: bool, runs: Sequence[ActiveRun]) -> None:
        """Tell the client that from here on nothing is missed."""
        services = self._services
        self._send(
            frames.connection_established(
                connection_id=self.connection_id,
                user_id=self.user_id,
                node=services.node_id,
                position=str(position),
                recovered=recovered,
                runs=_as_json(runs),
                agents=[agent.as_json() for agent in self._agents],
                heartbeat_ms=services.heartbeat_ms,
                limits=services.limits_for_client(),
                now_ms=wall_ms(),
            ),
            str(position),
        )
        self._agents = ()
        self._is_established = True
        if self._closing is None:
            self._deadline_ms = None
            if self._transport is not None:
                self._transport.release()

    def reset(self, position: Position, reason: str, runs: Sequence[ActiveRun]) -> None:
        """Tell the client to forget its runs: history was lost."""
        self._services.metrics.resets += 1
        self._send(frames.reset(str(position), reason, _as_json(runs)), str(position))

    def reposition(self, position: Position) -> None:
        """Tell the client its position in a new epoch; it missed nothing."""
        self._send(frames.heartbeat(str(position), wall_ms()), str(position))

    def degraded(self, reason: str | None) -> None:
        """Tell the client that events may be late, or with None that they no longer are."""
        if reason is None:
            self._send(frames.degraded_ended())
        else:
            self._send(frames.degraded(reason, wall_ms()))

    def fail(self) -> None:
        """Close: an event could not be written, and the client must not believe to have it."""
        self.close(CloseCode.INTERNAL, "delivery failed")

    def refuse(self, error: RequestRefused) -> None:
        """Send the client away, to come back later: the connection cannot be served now."""
        self._services.metrics.requests_refused[error.code] += 1
        self._send(frames.error(error))
        self.close(CloseCode.INTERNAL, error.detail)


def _as_json(runs: Sequence[ActiveRun]) -> list[dict[str, Any]]:
    # The machine only looks at offsets; what the history reader puts through it are summaries.
    return [run.as_json() for run in cast("Sequence[RunSummary]", runs)]


def _ping_payload(due_ms: int) -> bytes:
    # Tells the answer to this ping from that to an earlier one, and is kept nowhere.
    return b"%d" % due_ms
