"""Every error of the relay: what went wrong, whether to retry, and what to do about it.

One root class. Errors that reach a client carry a stable ``code``; their text, guidance and
HTTP status come from one table, from which the protocol documentation is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class RelayError(Exception):
    """Root of all errors raised by the relay's packages."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """What a client is told beside an error code.

    Attributes:
        message: Default sentence, used where no more precise one is known.
        retryable: Whether the same request may succeed later, unchanged.
        recovery_suggestions: What the user or developer can do, most useful first.
        http_status: Status of the same refusal over HTTP.
    """

    message: str
    retryable: bool
    recovery_suggestions: tuple[str, ...]
    http_status: int


WIRE_ERRORS: dict[str, Guidance] = {
    "invalid_json": Guidance(
        "The frame is not valid JSON.",
        False,
        ("Send one JSON object per text frame, encoded as UTF-8.",),
        400,
    ),
    "invalid_frame": Guidance(
        "The request does not match its schema.",
        False,
        ("Compare the request with the field table in docs/protocol.md.",),
        422,
    ),
    "bad_request": Guidance(
        "This is not a valid HTTP request.",
        False,
        ("Check the request line, the headers and the framing of the body.",),
        400,
    ),
    "unknown_type": Guidance(
        "The frame's type is not known.",
        False,
        ("Use user_message, cancel, input_response, refresh_token or ping.",),
        400,
    ),
    "frame_too_large": Guidance(
        "The request is larger than this gateway accepts.",
        False,
        ("Shorten the content, or store large input elsewhere and send a reference.",),
        413,
    ),
    "payload_too_large": Guidance(
        "The content is longer than this gateway accepts.",
        False,
        ("Shorten the content, or store large input elsewhere and send a reference.",),
        413,
    ),
    "binary_not_supported": Guidance(
        "Subprotocol relay.v1 has text frames only.",
        False,
        ("Send JSON as a text frame.",),
        400,
    ),
    "unknown_agent": Guidance(
        "No worker has registered this agent.",
        True,
        ("Check the agent's name.", "Start a worker that serves it: relay worker MODULE:ATTR."),
        404,
    ),
    "unknown_run": Guidance(
        "You have no run with this id.",
        False,
        ("Check the run id.", "Results are kept for 24 hours after the run's end."),
        404,
    ),
    "run_ended": Guidance(
        "The run has already ended.",
        False,
        ("Read its result with GET /v1/runs/{id}.",),
        409,
    ),
    "unknown_request": Guidance(
        "The run has no open input request with this id.",
        False,
        ("It may have been answered in another tab, or have expired.",),
        409,
    ),
    "rate_limited": Guidance(
        "Too many requests.",
        True,
        ("Wait for a running request to end, or cancel one, then try again.",),
        429,
    ),
    "thread_busy": Guidance(
        "The thread already has an active run.",
        True,
        ("Wait for the run to end or cancel it.", "Use another thread_id."),
        409,
    ),
    "unavailable": Guidance(
        "The relay cannot reach its store right now.",
        True,
        ("Try again in a few seconds; nothing that was acknowledged is lost.",),
        503,
    ),
    "invalid_token": Guidance(
        "The token is missing or not valid.",
        False,
        ("Get a new token from your application and connect again.",),
        401,
    ),
    "forbidden": Guidance(
        "This is not allowed.",
        False,
        ("Check the origin and the scopes of the token.",),
        403,
    ),
    "not_found": Guidance(
        "There is nothing at this address.",
        False,
        ("See docs/protocol.md for the addresses of this API.",),
        404,
    ),
    "method_not_allowed": Guidance(
        "This address does not support the method.",
        False,
        ("See docs/protocol.md for the methods of this address.",),
        405,
    ),
    "upgrade_required": Guidance(
        "This address speaks WebSocket only.",
        False,
        (
            "Connect with a WebSocket client: ws:// or wss:// instead of http:// or https://.",
            "Behind a proxy, let it pass the Upgrade header on.",
            "Without WebSocket, read the events from GET /v1/events.",
        ),
        426,
    ),
    "internal": Guidance(
        "The gateway failed to handle the request.",
        True,
        ("Try again. If it persists, give your operator the time of the request.",),
        500,
    ),
}

AGENT_ERRORS: dict[str, Guidance] = {
    "agent_failed": Guidance(
        "The agent ran into a problem and could not finish.",
        True,
        ("Try again.", "If it persists, report the support id."),
        500,
    ),
    "timeout": Guidance(
        "The agent took too long and was stopped.",
        True,
        ("Try again with a smaller request.",),
        504,
    ),
    "rate_limited": Guidance(
        "A service that the agent needs is receiving too many requests.",
        True,
        ("Wait a moment, then try again.",),
        429,
    ),
    "upstream_unavailable": Guidance(
        "A service that the agent needs does not answer.",
        True,
        ("Try again in a few minutes.",),
        503,
    ),
    "invalid_request": Guidance(
        "The agent cannot work with this request.",
        False,
        ("Change the request as described, then send it again.",),
        400,
    ),
    "worker_lost": Guidance(
        "The worker that ran the agent disappeared before it finished.",
        True,
        ("Send the request again.",),
        500,
    ),
    "payload_too_large": Guidance(
        "The agent produced more data than can be delivered.",
        False,
        ("Ask for a smaller part of the result.",),
        413,
    ),
    "internal": Guidance(
        "The relay failed to carry out the run.",
        True,
        ("Try again.", "If it persists, report the support id."),
        500,
    ),
}


class CloseCode(IntEnum):
    """WebSocket close codes of ``relay.v1`` (RFC 6455 section 7.4, 4000-4999 private)."""

    GOING_AWAY = 1001
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL = 1011
    DRAIN = 1012
    TOKEN_EXPIRED = 4401
    FORBIDDEN = 4403
    NO_PONG = 4408
    TOO_SLOW = 4410
    LIMIT = 4429

    @property
    def may_reconnect(self) -> bool:
        """Whether a client may come back with the same credentials and behaviour."""
        return self not in (CloseCode.POLICY, CloseCode.TOKEN_EXPIRED, CloseCode.FORBIDDEN)


class RequestRefused(RelayError):
    """A client's request was refused; it changed nothing.

    Attributes:
        code: Key of ``WIRE_ERRORS``.
        detail: Sentence for this occurrence; the table's message by default.
        retry_after_ms: When trying again makes sense, if that is known.
    """

    def __init__(
        self,
        code: str,
        detail: str | None = None,
        *,
        suggestions: tuple[str, ...] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        self.code = code
        guidance = WIRE_ERRORS[code]
        self.detail = detail or guidance.message
        self.retryable = guidance.retryable
        self.recovery_suggestions = suggestions or guidance.recovery_suggestions
        self.http_status = guidance.http_status
        self.retry_after_ms = retry_after_ms
        super().__init__(code, self.detail)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class AgentError(RelayError):
    """Raised by an agent to end its run with an error that is safe to show to the user.

    Attributes:
        code: Key of ``AGENT_ERRORS``.
        error_message: Sentence for the user. It is shown as it is.
    """

    def __init__(
        self,
        code: str,
        error_message: str | None = None,
        *,
        is_recoverable: bool | None = None,
        recovery_suggestions: list[str] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        if code not in AGENT_ERRORS:
            allowed = ", ".join(AGENT_ERRORS)
            raise ValueError(f"AgentError code {code!r} is not one of: {allowed}")
        guidance = AGENT_ERRORS[code]
        self.code = code
        self.error_message = error_message or guidance.message
        self.is_recoverable = guidance.retryable if is_recoverable is None else is_recoverable
        self.recovery_suggestions = (
            list(guidance.recovery_suggestions)
            if recovery_suggestions is None
            else recovery_suggestions
        )
        self.retry_after_ms = retry_after_ms
        super().__init__(code, self.error_message)

    def __str__(self) -> str:
        return f"{self.code}: {self.error_message}"


class InputNotAnswered(AgentError):
    """The user gave no answer to what the agent asked. It ends the run where nobody catches it.

    Attributes:
        request_id: The question.
    """

    def __init__(self, code: str, error_message: str, suggestion: str, request_id: str) -> None:
        self.request_id = request_id
        super().__init__(code, error_message, recovery_suggestions=[suggestion])


class InputDenied(InputNotAnswered):
    """The user refused to answer."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            "agent_failed",
            "You declined to answer, so the agent stopped.",
            "Send the request again and answer the question.",
            request_id,
        )


class InputExpired(InputNotAnswered):
    """The user did not answer in time."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            "timeout",
            "The agent's question was not answered in time.",
            "Send the request again and answer the question.",
            request_id,
        )


class ConfigurationError(RelayError):
    """Settings are missing or wrong. The text names the variable, the value and what is allowed."""


class RedisUnavailable(RelayError):
    """Redis did not answer, refused the connection, or the connection broke.

    Whether the command took effect is unknown; every script may be sent again.
    """


class RedisMisconfigured(RelayError):
    """Redis answered that it cannot serve us as it is set up: wrong password, rights, version."""


class GrammarViolation(RelayError):
    """An event that is not legal at this point of its run. It reached nobody."""

    def __init__(self, event_type: str, reason: str) -> None:
        self.event_type = event_type
        self.reason = reason
        super().__init__(event_type, reason)

    def __str__(self) -> str:
        return f"{self.event_type} is not legal here: {self.reason}"


class InvalidEvent(RelayError):
    """Event data that does not match its type's fields. It reached nobody."""


class EncodingFailed(RelayError):
    """A value has no JSON form.

    Attributes:
        path: Where the value is, e.g. ``data.result.items[3].price``.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class DecodingFailed(RelayError):
    """Bytes read from Redis or a peer that do not have the agreed form."""


class NewerVersion(DecodingFailed):
    """Bytes of a newer version than this process knows: a newer peer understands them."""


class PublishRefused(RelayError):
    """Redis refused a batch; nothing of it was appended."""


class StaleFence(PublishRefused):
    """This attempt has been superseded: another one owns the run."""


class RunEnded(PublishRefused):
    """The run already has its terminal event.

    Attributes:
        status: How it ended: ``completed``, ``error`` or ``cancelled``.
    """

    def __init__(self, run_id: str, status: str) -> None:
        self.run_id = run_id
        self.status = status
        super().__init__(run_id, status)

    def __str__(self) -> str:
        return f"run {self.run_id} has already ended: {self.status}"


class TokenRejected(RelayError):
    """A token did not pass verification. The text never contains the token."""
