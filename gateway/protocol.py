"""One client's connection: between its socket, the session's rules and the user's feed.

Decisions are made elsewhere (``session``, ``outbox``, the feed); this carries them out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog
from starlette.types import Receive

from gateway import frames
from gateway.auth import Authenticator
from gateway.commands import RunCommands
from gateway.connection_pool import WebSocketConnectionPool
from gateway.feed import Attachment, FeedHub
from gateway.metrics import GatewayMetrics
from gateway.outbox import Outbox
from gateway.refusals import refusal_of
from gateway.requests import Cancel, InputResponse, UserMessage
from gateway.session import (
    AnswerInput,
    CancelRun,
    Close,
    Effect,
    Pong,
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

log = structlog.stdlib.get_logger(__name__)


def wall_ms() -> int:
    """Give the time of day, for timestamps and tokens."""
    return time.time_ns() // 1_000_000


def steady_ms() -> int:
    """Give a time that never jumps, for intervals."""
    return time.monotonic_ns() // 1_000_000


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

    def limits_for_client(self) -> Mapping[str, int]:
        """Give ``limits`` of ``connection_established``."""
        return {
            "max_frame_bytes": self.session_limits.max_frame_bytes,
            "max_content_chars": self.session_limits.max_content_chars,
            "max_connections": self.max_connections,
            "frames_per_second": self.session_limits.frames_per_second,
        }


Framing = Callable[[bytes, str], bytes]


class Connection:
    """A user's connection, from the accepted upgrade to the close.

    It is the sink of its cursor: the feed writes events into it, synchronously, while there is
    room. It is due on the node's wheel for heartbeats, the token's expiry and its deadlines.

    Args:
        services: Those of the node.
        identity: Whom the verified token speaks for.
        since: Where the client wants to go on.
        place: Its id, and the device, as the client says.
        agents: Registered agents, for the client.
        make_transport: Makes the way to the socket, given this connection as the source.
        framing: Puts a frame, and the position to resume from after it where there is one, into
            the form that the transport writes.
    """

    def __init__(
        self,
        services: ConnectionServices,
        identity: Identity,
        *,
        since: Since,
        place: Place,
        agents: Sequence[AgentInfo],
        make_transport: Callable[[Connection], Transport],
        framing: Framing | None = None,
    ) -> None:
        self.connection_id = place.connection_id
        self.user_id = identity.user_id
        self.identity = identity
        self.client_id = place.client_id
        self.transport = make_transport(self)
        self._services = services
        self._framing = framing
        self._since = since
        self._agents = [agent.as_json() for agent in agents]
        self._session = Session(
            identity.user_id, identity.expires_at_ms, services.session_limits, wall_ms()
        )
        self._outbox = Outbox(services.outbox_bytes)
        self._is_idle_awaited = False
        self._cursor: Attachment | None = None
        # Set when requests may be read: after connection_established, or when it is over.
        self._may_read = asyncio.Event()
        self._closing: Close | None = None
        now_ms = steady_ms()
        self._heartbeat_due_ms = now_ms + services.heartbeat_ms
        self._deadline_ms: int | None = now_ms + ESTABLISH_LIMIT_MS

    # --- Life ---

    async def run(self, receive: Receive) -> None:
        """Serve the connection until it is closed; it leaves nothing behind.

        The caller has registered it in the pool and accepted the upgrade.
        """
        code, reason = int(CloseCode.INTERNAL), "handler failed"
        try:
            self._cursor = self._services.hub.attach(self.user_id, self._since, self)
            self._schedule()
            code, reason = await self._read(receive)
        finally:
            if self._cursor is not None:
                self._cursor.close()
            self._services.wheel.remove(self)
            if self._closing is not None:
                code, reason = self._closing.code, self._closing.reason
            self._services.pool.remove(self, code, reason)

    async def _read(self, receive: Receive) -> tuple[int, str]:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return message.get("code") or 1005, message.get("reason") or "closed by the client"
            await self._may_read.wait()
            if self._closing is not None:
                continue
            self._services.metrics.frames_received += 1
            text = message.get("text")
            effects = (
                self._session.receive_binary(wall_ms())
                if text is None
                else self._session.receive_text(text, wall_ms())
            )
            for effect in effects:
                await self._perform(effect)

    def close(self, code: CloseCode, reason: str) -> None:
        """Close after what is waiting has been sent; no further event is."""
        if self._closing is not None:
            return
        self._closing = Close(code, reason)
        if self._cursor is not None:
            self._cursor.close()
        self._may_read.set()
        self._deadline_ms = steady_ms() + CLOSE_LIMIT_MS
        self.transport.close(code, reason)
        self._schedule()

    def end_access(self, reason: str) -> None:
        """Close with 4401 at once: what waits for the socket belongs to nobody any more."""
        if self._closing is None or self._closing.code is not CloseCode.TOKEN_EXPIRED:
            self._cut_off(CloseCode.TOKEN_EXPIRED, reason)

    def drain(self, after_ms: int) -> None:
        """Ask the client to come back, to any gateway, and close with 1012."""
        if self._closing is None:
            self._send(frames.reconnect(after_ms, "drain"))
            self.close(CloseCode.DRAIN, "this gateway is shutting down")

    # --- Time ---

    def tick(self) -> None:
        """Do what is due. Called by the turn of the node's wheel."""
        now_ms = steady_ms()
        if self._deadline_ms is not None and now_ms >= self._deadline_ms:
            self._miss_deadline()
        elif self._outbox.is_stuck(now_ms):
            self._cut_off(CloseCode.TOO_SLOW, "no frame was taken for a minute")
        else:
            if self._closing is None:
                self._advance(now_ms)
            self._schedule()

    def _advance(self, now_ms: int) -> None:
        for effect in self._session.advance(wall_ms()):
            self._perform_now(effect)
        if now_ms >= self._heartbeat_due_ms:
            self._heartbeat_due_ms = now_ms + self._services.heartbeat_ms
            if self._is_established:
                self._send(frames.heartbeat(self._position, wall_ms()), self._position)

    def _miss_deadline(self) -> None:
        if self._closing is None:
            self.refuse(
                RequestRefused("unavailable", "The subscription was not confirmed in time.")
            )
        else:
            self._cut_off(self._closing.code, self._closing.reason)

    def _cut_off(self, code: CloseCode, reason: str) -> None:
        if self._cursor is not None:
            self._cursor.close()
        self._closing = Close(code, reason)
        self._may_read.set()
        self.transport.force_close(code, reason)

    def _schedule(self) -> None:
        now_ms = steady_ms()
        due_ms = [self._heartbeat_due_ms, now_ms + max(0, self._session.next_due_ms - wall_ms())]
        if self._closing is not None:
            due_ms = []
        more = (self._deadline_ms, self._outbox.stuck_at_ms)
        due_ms += [moment for moment in more if moment is not None]
        self._services.wheel.schedule(self, min(due_ms))

    # --- Effects ---

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
            case Pong(frame_id):
                self._send(frames.pong(frame_id, self._position))
            case Close(CloseCode.TOKEN_EXPIRED, reason):
                self.end_access(reason)
            case Close(code, reason):
                self.close(code, reason)
            case _:
                raise TypeError(f"{type(effect).__name__} needs to wait")

    async def _answer(self, frame_id: str, work: Any) -> None:
        try:
            effects = await work
        except Exception as error:  # noqa: BLE001 -- one bad request must not end the connection
            refused = refusal_of(error)
            self._services.metrics.requests_refused[refused.code] += 1
            effects = self._session.refuse(refused, frame_id)
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

    # --- The outbox's other end ---

    def take_frames(self) -> Sequence[bytes]:
        """Give the writer what waits."""
        return self._outbox.take()

    def frame_written(self, size_bytes: int) -> None:
        """Learn that the socket took a frame."""
        metrics = self._services.metrics
        metrics.sent_frames += 1
        metrics.sent_bytes += size_bytes
        may_go_on = self._outbox.written(size_bytes, steady_ms())
        if self._is_idle_awaited and self._outbox.is_empty:
            self._is_idle_awaited = False
            may_go_on = True
        if may_go_on and self._closing is None and self._cursor is not None:
            self._cursor.writable()

    def _send(self, frame: bytes, position: str = "") -> None:
        if self._framing is not None:
            frame = self._framing(frame, position)
        if self._closing is None and self._outbox.add(frame, steady_ms()):
            self.transport.wake()

    @property
    def _position(self) -> str:
        return "" if self._cursor is None else self._cursor.position

    # --- What the feed writes (its sink) ---

    @property
    def has_room(self) -> bool:
        """Whether events may be written; if not, ``writable`` is called later."""
        return self._outbox.has_room

    @property
    def is_idle(self) -> bool:
        """Whether the socket took everything written; if not, ``writable`` is called when it has.

        Only who asks is called: events that flow cost no such call.
        """
        self._is_idle_awaited = not self._outbox.is_empty
        return not self._is_idle_awaited

    def write(self, publication: Publication) -> None:
        """Send an event."""
        self._services.metrics.delivered_events += 1
        if self._framing is None or self._cursor is None:
            self._send(publication.frame)
        else:
            self._send(publication.frame, str(Position(self._cursor.epoch, publication.offset)))

    def write_part(self, frame: bytes) -> None:
        """Send a piece of a large event."""
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
                agents=self._agents,
                heartbeat_ms=services.heartbeat_ms,
                limits=services.limits_for_client(),
                now_ms=wall_ms(),
            ),
            str(position),
        )
        if self._closing is None:
            self._deadline_ms = None
        self._may_read.set()

    @property
    def _is_established(self) -> bool:
        return self._may_read.is_set() and self._closing is None

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
