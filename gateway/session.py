"""One connection's conversation: frames and time in, effects out. Pure.

Nothing here waits or sends. The shell (``protocol``) carries the effects out in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gateway import frames
from gateway.requests import (
    Cancel,
    Frame,
    InputResponse,
    Ping,
    RefreshToken,
    UserMessage,
    check_content,
    parse_frame,
    parse_json_object,
)
from relay.errors import CloseCode, RequestRefused

ABUSE_LIMIT = 10
ABUSE_WINDOW_MS = 60_000
"""So many frames that cannot be understood within this time are no accident: 1008."""

FLOOD_SECONDS = 10
"""A client that sends this many seconds' worth of frames too much within a window: 4429."""

PINGS_PER_SECOND = 20
PINGS_AT_ONCE = 100
"""Pings of the WebSocket protocol beyond this rate, after so many at once: 4429."""

EXPIRY_WARNING_MS = 30_000
"""Announced so long before a token expires; enough for a page to fetch a new one."""

EXPIRY_LEEWAY_MS = 30_000
"""A token that was accepted after its expiry, within the leeway, ends with it.

However often it connects: it is worth nothing this long after its expiry.
"""


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this frame."""

    frame: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """Send this ``error`` frame: a request is refused."""

    code: str
    frame: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer a ping with the connection's position."""

    frame_id: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a run."""

    message: UserMessage


@dataclass(frozen=True, slots=True)
class CancelRun:
    """Ask a run to stop."""

    request: Cancel


@dataclass(frozen=True, slots=True)
class AnswerInput:
    """Answer an agent's question."""

    response: InputResponse


@dataclass(frozen=True, slots=True)
class VerifyToken:
    """Verify a token; then call ``token_verified``, or ``refuse``."""

    frame_id: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection after what is waiting has been sent."""

    code: int
    reason: str


Effect = Reply | Refuse | Pong | Submit | CancelRun | AnswerInput | VerifyToken | Close


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one connection may do. Sent to the client when it connects."""

    max_frame_bytes: int
    max_content_chars: int
    frames_per_second: int


class _Bucket:
    """So many at once, and so many a second."""

    __slots__ = ("_filled_ms", "_left", "_most", "_per_second")

    def __init__(self, per_second: int, most: int, now_ms: int) -> None:
        self._per_second = per_second
        self._most = float(most)
        self._left = self._most
        self._filled_ms = now_ms

    def take(self, now_ms: int) -> bool:
        """Take one, if there is one."""
        passed_s = max(0, now_ms - self._filled_ms) / 1000
        self._left = min(self._most, self._left + passed_s * self._per_second)
        self._filled_ms = now_ms
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Session:
    """The rules that one connection is held to.

    Args:
        user_id: Whose connection it is; a refreshed token must name the same user.
        expires_at_ms: When its token expires.
        limits: Sizes and rates.
        now_ms: When it was opened.
    """

    __slots__ = (
        "_end_ms",
        "_excess",
        "_expires_at_ms",
        "_frames",
        "_is_warned",
        "_limits",
        "_offences",
        "_pings",
        "_user_id",
    )

    def __init__(
        self, user_id: str, expires_at_ms: int, limits: SessionLimits, now_ms: int
    ) -> None:
        self._user_id = user_id
        self._limits = limits
        # Made when they are needed: most connections only listen.
        self._offences: deque[int] | None = None
        self._excess: deque[int] | None = None
        self._frames: _Bucket | None = None
        self._pings: _Bucket | None = None
        self._set_expiry(expires_at_ms, now_ms)

    # --- Frames ---

    def receive_text(self, text: str, now_ms: int) -> list[Effect]:
        """Take a text frame."""
        limit = self._limits.max_frame_bytes
        # No character needs more than four bytes, so most frames need not be measured.
        if len(text) * 4 > limit and (size := len(text.encode())) > limit:
            return self._offend(_too_large(size, limit), None, now_ms)
        frame_id = None
        try:
            fields = parse_json_object(text)
            frame_id = _usable_id(fields.get("id"))
            frame = parse_frame(fields)
        except RequestRefused as refused:
            return self._offend(refused, frame_id, now_ms)
        if not self._take_token(now_ms):
            return self._exceed(frame.id, now_ms)
        return self._accept(frame)

    def receive_binary(self, now_ms: int) -> list[Effect]:
        """Take a binary frame; ``relay.v1`` has none."""
        return self._offend(RequestRefused("binary_not_supported"), None, now_ms)

    def receive_ping(self, now_ms: int) -> list[Effect]:
        """Take a ping of the WebSocket protocol, or a pong that nobody asked for.

        They are answered below this, or ignored; nothing is due but the end, if they are a flood.
        """
        if self._pings is None:
            self._pings = _Bucket(PINGS_PER_SECOND, PINGS_AT_ONCE, now_ms)
        if self._pings.take(now_ms):
            return []
        return [Close(CloseCode.LIMIT, "too many pings")]

    def _accept(self, frame: Frame) -> list[Effect]:
        match frame:
            case UserMessage():
                try:
                    check_content(frame.content, self._limits.max_content_chars)
                except RequestRefused as refused:
                    return self.refuse(refused, frame.id)
                return [Submit(frame)]
            case Cancel():
                return [CancelRun(frame)]
            case InputResponse():
                return [AnswerInput(frame)]
            case RefreshToken():
                return [VerifyToken(frame.id, frame.token)]
            case Ping():
                return [Pong(frame.id)]

    def refuse(self, refused: RequestRefused, frame_id: str | None) -> list[Effect]:
        """Answer a request that was understood and is refused; this is no offence."""
        return [Refuse(refused.code, frames.error(refused, frame_id))]

    # --- Limits ---

    def _offend(self, refused: RequestRefused, frame_id: str | None, now_ms: int) -> list[Effect]:
        effects = self.refuse(refused, frame_id)
        if self._offences is None:
            self._offences = deque()
        if _count(self._offences, now_ms) >= ABUSE_LIMIT:
            effects.append(Close(CloseCode.POLICY, "too many frames that are not understood"))
        return effects

    def _exceed(self, frame_id: str, now_ms: int) -> list[Effect]:
        rate = self._limits.frames_per_second
        refused = RequestRefused(
            "rate_limited",
            f"At most {rate} frames a second are accepted.",
            suggestions=("Wait a second, then send the frame again.",),
            retry_after_ms=1_000,
        )
        effects = self.refuse(refused, frame_id)
        if self._excess is None:
            self._excess = deque()
        if _count(self._excess, now_ms) >= rate * FLOOD_SECONDS:
            effects.append(Close(CloseCode.LIMIT, "too many frames"))
        return effects

    def _take_token(self, now_ms: int) -> bool:
        if self._frames is None:
            # A full bucket lets a page send what it had queued while it was away.
            rate = self._limits.frames_per_second
            self._frames = _Bucket(rate, rate, now_ms)
        return self._frames.take(now_ms)

    # --- The token ---

    def _set_expiry(self, expires_at_ms: int, now_ms: int) -> None:
        self._expires_at_ms = expires_at_ms
        is_in_leeway = expires_at_ms <= now_ms
        self._end_ms = expires_at_ms + (EXPIRY_LEEWAY_MS if is_in_leeway else 0)
        self._is_warned = False

    @property
    def next_due_ms(self) -> int:
        """When ``advance`` has something to say next."""
        return self._end_ms if self._is_warned else self._expires_at_ms - EXPIRY_WARNING_MS

    def advance(self, now_ms: int) -> list[Effect]:
        """Let time pass."""
        if now_ms >= self._end_ms:
            return [Close(CloseCode.TOKEN_EXPIRED, "token expired")]
        if not self._is_warned and now_ms >= self.next_due_ms:
            self._is_warned = True
            return [Reply(frames.token_expiring(self._expires_at_ms))]
        return []

    def token_verified(
        self, frame_id: str, user_id: str, expires_at_ms: int, now_ms: int
    ) -> list[Effect]:
        """Go on with a new token, if it is the same user's."""
        if user_id != self._user_id:
            refused = RequestRefused(
                "invalid_token",
                "The new token names another user than this connection's.",
                suggestions=("Open a new connection for another user.",),
            )
            return self.refuse(refused, frame_id)
        self._set_expiry(expires_at_ms, now_ms)
        return [Reply(frames.refreshed(frame_id, expires_at_ms))]


def _too_large(size_bytes: int, limit_bytes: int) -> RequestRefused:
    return RequestRefused(
        "frame_too_large",
        f"The frame has {size_bytes} bytes; at most {limit_bytes} are accepted.",
    )


def _usable_id(value: object) -> str | None:
    return value if isinstance(value, str) and 1 <= len(value) <= 128 else None


def _count(moments: deque[int], now_ms: int) -> int:
    """Note one more, and tell how many there were within the window."""
    moments.append(now_ms)
    while moments[0] <= now_ms - ABUSE_WINDOW_MS:
        moments.popleft()
    return len(moments)
