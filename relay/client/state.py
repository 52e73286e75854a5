"""What a client makes of the frames that it receives: pure, without clock, chance or socket.

``ClientState`` turns frames into updates, keeps the position to resume from, joins event parts,
ignores what came before and notices what is missing. The functions below decide what to do after
a connection was closed or refused. ``relay.client`` is the shell around both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from relay.codec import Position, parse_position
from relay.errors import CloseCode, DecodingFailed, RelayError
from relay.events import TERMINAL

Fields: TypeAlias = Mapping[str, Any]

FIRST_TRY_WITHIN_MS = 300
BACKOFF_BASE_MS = 500
BACKOFF_CAP_MS = 30_000
MAX_RETRY_AFTER_MS = 300_000
MAX_PART_BYTES = 64 * 1_048_576
"""More than this is not collected for one event; its sender is broken."""


class ConnectionEnded(RelayError):
    """The gateway does not want this client back as it is, or none could be reached.

    An application's token function raises it to end its client.

    Attributes:
        code: Close code or HTTP status, None where there was no answer at all.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        self.code = code
        super().__init__(message)


class EventsMissing(RelayError):
    """A run's events have a hole in ``seq``: what was delivered is not the whole run."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the user's channel. ``data`` has the fields of its type.

    Attributes:
        raw: The event as it came, with all of its fields.
    """

    type: str
    offset: int
    data: Fields
    raw: Fields = field(repr=False)
    run_id: str | None = None
    seq: int | None = None
    attempt: int | None = None
    thread_id: str | None = None
    user_id: str | None = None
    agent: str | None = None
    timestamp: str | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether the run ends with this event."""
        return self.type in TERMINAL


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection is open; events after ``position`` follow.

    Attributes:
        runs: Each run that is active or has just ended.
        raw: All that the gateway said, as it came.
        agents: ``name`` and ``description`` of each agent that can be asked.
    """

    position: str
    recovered: bool
    connection_id: str
    node: str
    runs: Sequence[Fields]
    raw: Fields = field(repr=False)
    agents: Sequence[Fields] = ()


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget what you know about runs: what follows starts anew after ``position``."""

    position: str
    reason: str
    runs: Sequence[Fields]


@dataclass(frozen=True, slots=True)
class Degraded:
    """The gateway cannot reach its store (``reason``), or can again (None)."""

    reason: str | None


@dataclass(frozen=True, slots=True)
class SequenceHole:
    """Events of a run did not arrive: after ``expected - 1`` came ``seen``."""

    run_id: str
    expected: int
    seen: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; the next try begins in ``retry_in_ms``."""

    reason: str
    retry_in_ms: int


@dataclass(frozen=True, slots=True)
class TokenExpiring:
    """The connection will be closed at ``expires_at`` unless the token is refreshed."""

    expires_at: str


@dataclass(frozen=True, slots=True)
class Complaint:
    """The gateway refused a frame that it could not match to a request."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the request with this id: an ``ack``, ``pong`` or ``error`` frame."""

    id: str
    frame: Fields


Update: TypeAlias = (
    Event | Connected | Reset | Degraded | SequenceHole | Disconnected | TokenExpiring | Complaint
)


class ClientState:
    """One client's place in its channel, over all of its connections.

    Attributes:
        since: What to ask the next connection for: a position once one is known.
        heartbeat_ms: How often the gateway promised to write; None before it said so.
        reconnect_after_ms: What the gateway asked for in a ``reconnect`` frame.
    """

    def __init__(self, since: str = "active") -> None:
        self.since = since
        self.heartbeat_ms: int | None = None
        self.reconnect_after_ms: int | None = None
        self._position: Position | None = None
        self._next_seq: dict[str, int] = {}
        self._parts: dict[int, dict[int, str]] = {}

    @property
    def position(self) -> str | None:
        """Where the next event follows; None before the first connection."""
        return str(self._position) if self._position else None

    def opening(self) -> None:
        """A new connection is about to open: parts of the old one will not be completed."""
        self._parts.clear()
        self.reconnect_after_ms = None

    def receive(self, text: str | bytes) -> list[Update | Reply]:
        """Take one frame.

        Raises:
            DecodingFailed: The frame is not one of ``relay.v1``.
        """
        try:
            frame = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise DecodingFailed(f"the gateway sent a frame that is not JSON: {error}") from error
        if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
            raise DecodingFailed("the gateway sent a frame without a type")
        try:
            return self._receive(frame["type"], frame)
        except (KeyError, TypeError, ValueError) as error:
            raise DecodingFailed(f"a {frame['type']} frame is malformed: {error!r}") from error

    def _receive(self, kind: str, frame: Fields) -> list[Update | Reply]:
        match kind:
            case "connection_established":
                return [self._establish(frame)]
            case "heartbeat":
                self._advance(parse_position(frame["position"]))
                return []
            case "ack" | "pong" | "error":
                return [self._receive_reply(frame)]
            case "reset":
                self._rebase(parse_position(frame["position"]))
                return [Reset(frame["position"], frame["reason"], frame.get("runs", ()))]
            case "degraded":
                return [Degraded(None if frame.get("ended") else str(frame.get("reason")))]
            case "reconnect":
                self.reconnect_after_ms = int(frame["after_ms"])
                return []
            case "token_expiring":
                return [TokenExpiring(str(frame["expires_at"]))]
            case "event_part":
                return self._receive_part(frame)
            case _ if "offset" in frame:
                return self._receive_event(frame)
            case _:
                # A newer gateway may say more than this client understands.
                return []

    def _establish(self, frame: Fields) -> Connected:
        # A reset follows where nothing could be recovered. Should the connection end before it
        # has come, the next one must be asked about the old position again.
        if frame["recovered"] or self._position is None:
            self._move(parse_position(frame["position"]))
        self.heartbeat_ms = int(frame["heartbeat_ms"])
        return Connected(
            position=frame["position"],
            recovered=bool(frame["recovered"]),
            connection_id=frame["connection_id"],
            node=frame.get("node", ""),
            runs=frame.get("runs", ()),
            raw=frame,
            agents=frame.get("agents", ()),
        )

    def _receive_reply(self, frame: Fields) -> Reply | Complaint:
        if frame["type"] == "pong":
            self._advance(parse_position(frame["position"]))
        if frame["type"] == "error" and frame.get("id") is None:
            return Complaint(str(frame["code"]), str(frame.get("message", "")))
        return Reply(str(frame["id"]), frame)

    def _move(self, position: Position) -> None:
        self._position = position
        self.since = str(position)

    def _advance(self, position: Position) -> None:
        known = self._position
        # Another epoch re-labels our place: its offsets do not compare with the old ones.
        if known is None or known.epoch != position.epoch or known.offset < position.offset:
            self._move(position)

    def _rebase(self, position: Position) -> None:
        self._next_seq.clear()
        self._parts.clear()
        self._move(position)

    def _receive_part(self, frame: Fields) -> list[Update | Reply]:
        offset, index, total = int(frame["offset"]), int(frame["index"]), int(frame["total"])
        if not 0 <= index < total:
            raise ValueError(f"part {index} of {total}")
        parts = self._parts.setdefault(offset, {})
        if index in parts:
            # The event is sent anew from its beginning; after a rewind it may be another one.
            parts.clear()
        parts[index] = str(frame["text"])
        if len(parts) < total:
            if sum(map(len, parts.values())) > MAX_PART_BYTES:
                raise ValueError(f"event {offset} has more than {MAX_PART_BYTES} characters")
            return []
        del self._parts[offset]
        event = orjson.loads("".join(parts[number] for number in range(total)))
        return self._receive_event(event)

    def _receive_event(self, frame: Fields) -> list[Update | Reply]:
        offset = int(frame["offset"])
        position = self._position
        if position is None:
            raise ValueError("an event before connection_established")
        if offset <= position.offset:
            return []
        self._move(position._replace(offset=offset))
        event = Event(
            type=frame["type"],
            offset=offset,
            data=frame.get("data") or {},
            raw=frame,
            run_id=frame.get("run_id"),
            seq=frame.get("seq"),
            attempt=frame.get("attempt"),
            thread_id=frame.get("thread_id"),
            user_id=frame.get("user_id"),
            agent=frame.get("agent"),
            timestamp=frame.get("timestamp"),
        )
        hole = self._check_seq(event)
        return [hole, event] if hole else [event]

    def _check_seq(self, event: Event) -> SequenceHole | None:
        # Offsets may have gaps (joined text, progress); seq is the proof of completeness. Where
        # the first event seen of a run is not its first one, we began in the middle on purpose.
        if event.run_id is None or event.seq is None:
            return None
        expected = self._next_seq.get(event.run_id, event.seq)
        if event.is_terminal:
            self._next_seq.pop(event.run_id, None)
        else:
            self._next_seq[event.run_id] = event.seq + 1
        if event.seq == expected:
            return None
        return SequenceHole(event.run_id, expected, event.seq)


@dataclass(frozen=True, slots=True)
class Retry:
    """Come back after this time."""

    delay_ms: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Do not come back as you are."""

    error: ConnectionEnded


def backoff_ms(failures: int, chance: float) -> int:
    """Give how long to wait before the next try.

    Args:
        failures: Tries that have failed since the last connection that was established.
        chance: A random number from 0 to 1. The whole delay is random ("full jitter"), so that
            the clients of a lost gateway do not return in step.
    """
    if failures == 0:
        return int(FIRST_TRY_WITHIN_MS * chance)
    # The exponent is bounded: 2 ** 10_000 is a number that takes time to compute.
    ceiling = min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** min(failures, 10))
    return int(ceiling * chance)


def after_close(
    code: int | None,
    reason: str,
    *,
    failures: int,
    asked_ms: int | None,
    chance: float,
    renews_token: bool = False,
) -> Retry | Stop:
    """Decide what to do after an established connection was closed.

    Args:
        code: The close code, None where the connection broke without one.
        reason: The close reason, or what broke.
        failures: As in ``backoff_ms``.
        asked_ms: ``after_ms`` of a ``reconnect`` frame, if there was one.
        chance: As in ``backoff_ms``.
        renews_token: Whether the next connection is asked for with another token.
    """
    stopping = {
        CloseCode.TOKEN_EXPIRED: "The gateway ended the connection: the token has expired or was "
        "revoked. Get a new token and connect again",
        CloseCode.FORBIDDEN: "The gateway ended the connection: this token may not do that",
        CloseCode.POLICY: "The gateway ended the connection: this client broke its rules",
    }
    for stopping_code, message in stopping.items():
        if code == stopping_code and not (renews_token and code == CloseCode.TOKEN_EXPIRED):
            return Stop(ConnectionEnded(f"{message}{f' ({reason})' if reason else ''}.", code))
    if asked_ms is not None and failures == 0:
        return Retry(asked_ms + backoff_ms(0, chance))
    return Retry(backoff_ms(failures, chance))


def after_refusal(
    status: int, detail: str, retry_after: str | None, *, failures: int, chance: float
) -> Retry | Stop:
    """Decide what to do after the gateway, or a proxy before it, refused to open a connection.

    Args:
        status: The HTTP status.
        detail: What the answer says, for people.
        retry_after: The header; waiting less would only be refused again.
        failures: As in ``backoff_ms``.
        chance: As in ``backoff_ms``.
    """
    said = f": {detail}" if detail else ""
    if status == 401:
        return Stop(ConnectionEnded(f"The gateway did not accept the token{said}", status))
    if status == 403:
        return Stop(ConnectionEnded(f"The gateway does not allow this connection{said}", status))
    # 408, 425 and 429 ask to come back (RFC 9110, 8470, 6585); other 4xx will not change.
    if 400 <= status < 500 and status not in (408, 425, 429):
        # Only the relay's own answers explain themselves: a wrong `since` is no wrong address.
        what = "The gateway refused the connection" if status == 422 else "No relay at this address"
        return Stop(ConnectionEnded(f"{what} (HTTP {status}){said}", status))
    wait_ms = 0
    if retry_after is not None and retry_after.strip().isdecimal():
        wait_ms = min(int(retry_after) * 1_000, MAX_RETRY_AFTER_MS)
    return Retry(wait_ms + backoff_ms(failures, chance))
