"""What clients may ask for: the schemas of frames and HTTP bodies, and clear refusals."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from relay.errors import RequestRefused

MAX_METADATA_DEPTH = 32
"""Deeper values would be refused later, by whoever encodes them, with a worse error."""

Identifier = Annotated[str, Field(min_length=1, max_length=128)]


class Request(BaseModel):
    """Base of all requests: unknown fields are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class MessageFields(Request):
    """What makes a run, over every transport."""

    thread_id: Identifier
    agent: Identifier | None = None
    content: Annotated[str, Field(json_schema_extra={"minLength": 1, "pattern": r"\S"})]
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, Any]) -> dict[str, Any]:
        if _is_deeper_than(value, MAX_METADATA_DEPTH):
            raise ValueError(f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
        return value


class UserMessage(MessageFields):
    """Frame ``user_message``: start a run."""

    type: Literal["user_message"]
    id: Identifier


class Cancel(Request):
    """Frame ``cancel``: ask a run to stop."""

    type: Literal["cancel"]
    id: Identifier
    run_id: Identifier
    reason: Annotated[str, Field(max_length=500)] | None = None


class AnswerFields(Request):
    """What a user says to an agent's question: a value, or a denial; exactly one of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["value"], "properties": {"denied": {"type": "null"}}},
                {
                    "required": ["denied"],
                    "properties": {"denied": {"const": True}},
                    "not": {"required": ["value"]},
                },
            ]
        }
    )

    value: Any = None
    denied: Literal[True] | None = None

    @property
    def is_denied(self) -> bool:
        """Whether the user refused to answer."""
        return self.denied is True

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.is_denied == ("value" in self.model_fields_set):
            raise ValueError("needs either value or denied: true")
        if _is_deeper_than(self.value, MAX_METADATA_DEPTH):
            raise ValueError(f"value must not be nested deeper than {MAX_METADATA_DEPTH} levels")
        return self


class InputResponse(AnswerFields):
    """Frame ``input_response``: answer an agent's question."""

    type: Literal["input_response"]
    id: Identifier
    run_id: Identifier
    request_id: Identifier


class RefreshToken(Request):
    """Frame ``refresh_token``: go on with a newer token of the same user."""

    type: Literal["refresh_token"]
    id: Identifier
    token: Annotated[str, Field(min_length=1, repr=False)]


class Ping(Request):
    """Frame ``ping``: ask for a sign of life and the position."""

    type: Literal["ping"]
    id: Identifier


class RunBody(MessageFields):
    """Body of ``POST /v1/runs``."""

    message_id: Identifier | None = None


class InputBody(AnswerFields):
    """Body of ``POST /v1/runs/{id}/inputs/{request_id}``."""


class CancelBody(Request):
    """Body of ``POST /v1/runs/{id}/cancel``; may be left out."""

    reason: Annotated[str, Field(max_length=500)] | None = None


Frame = UserMessage | Cancel | InputResponse | RefreshToken | Ping

FRAME_MODELS: dict[str, type[Frame]] = {
    "user_message": UserMessage,
    "cancel": Cancel,
    "input_response": InputResponse,
    "refresh_token": RefreshToken,
    "ping": Ping,
}

R = TypeVar("R", bound=Request)


def parse_json_object(data: str | bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RequestRefused: ``invalid_json`` with the place, or ``invalid_frame``: not an object.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestRefused(
            "invalid_json", f"This is not valid JSON: {error.msg} (character {error.pos})."
        ) from None
    if not isinstance(value, dict):
        raise RequestRefused("invalid_frame", "This is not a JSON object.")
    return value


def parse_frame(fields: dict[str, Any]) -> Frame:
    """Check a client frame against its type's schema.

    Raises:
        RequestRefused: ``unknown_type``, or ``invalid_frame`` with every field that is wrong.
    """
    kind = fields.get("type")
    if kind is None:
        raise RequestRefused("invalid_frame", "type: the field is required.")
    model = FRAME_MODELS.get(kind) if isinstance(kind, str) else None
    if model is None:
        shown = f" {kind[:64]!r}" if isinstance(kind, str) else ""
        raise RequestRefused(
            "unknown_type",
            f"The frame's type{shown} is not known.",
            suggestions=(f"Use one of: {', '.join(FRAME_MODELS)}.",),
        )
    return check_fields(model, fields)


def check_fields(model: type[R], fields: dict[str, Any]) -> R:
    """Check a request's fields.

    Raises:
        RequestRefused: ``invalid_frame``; the text names each field that is wrong and why.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise RequestRefused("invalid_frame", _describe(model, error)) from None


def check_content(content: str, max_chars: int) -> None:
    """Hold a message's content to its limit.

    Raises:
        RequestRefused: ``payload_too_large``, with both lengths.
    """
    if len(content) > max_chars:
        raise RequestRefused(
            "payload_too_large",
            f"content: has {len(content)} characters; at most {max_chars} are accepted.",
        )


def _describe(model: type[Request], error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_input=False):
        # A name that the client made up may be as long as the frame.
        name = ".".join(str(part)[:64] for part in item["loc"])
        match item["type"]:
            case "missing":
                text = "the field is required"
            case "extra_forbidden":
                text = f"there is no such field; the fields are {', '.join(model.model_fields)}"
            case _:
                text = item["msg"].removeprefix("Value error, ")
        text = f"{text[0].lower()}{text[1:]}"
        # A rule about several fields has no place of its own.
        problems.append(f"{name}: {text}" if name else text)
    shown = problems[:5]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "; ".join(shown) + "."


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
