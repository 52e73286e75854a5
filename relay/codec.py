"""Bytes of events, live messages, tasks and positions.

Events are JSON, so that a gateway can pass them on as they are stored. Live messages and tasks
are msgpack: they are read by our own processes only, and keep event bytes untouched.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import msgpack
import orjson
from pydantic import BaseModel

from relay.errors import DecodingFailed, EncodingFailed
from relay.events import EventType, format_timestamp

WIRE_VERSION = 1
"""First element of every live message and task; a reader refuses only newer major forms."""

MAX_DEPTH = 128

_ENCODE_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC | orjson.OPT_NON_STR_KEYS
_SMALLEST_INT, _LARGEST_INT = -(2**63), 2**64 - 1


class Position(NamedTuple):
    """A place in one user's channel, written ``epoch:offset``.

    Offsets alone are not enough: a Redis that fell back to an older copy counts the same
    numbers again for other events. The epoch names the history that the offset counts in.
    """

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.offset}"


def parse_position(text: str) -> Position:
    """Read ``epoch:offset``.

    Raises:
        DecodingFailed: The text does not have that form.
    """
    epoch, colon, offset = text.partition(":")
    if not (colon and 0 < len(epoch) <= 64 and epoch.isascii() and epoch.isalnum()):
        raise DecodingFailed("a position is written epoch:offset, e.g. 4f1a9c:42")
    if not (offset.isascii() and offset.isdecimal() and len(offset) <= 16):
        raise DecodingFailed("a position's offset is a whole number below 10^16")
    return Position(epoch, int(offset))


def text_of(value: bytes | str | None) -> str:
    """Give a part of an answer of Redis as text; none is the empty one.

    Raises:
        DecodingFailed: It is not UTF-8.
    """
    try:
        return value.decode() if isinstance(value, bytes) else (value or "")
    except UnicodeDecodeError as error:
        raise DecodingFailed(f"a name that is not UTF-8: {value!r:.100}") from error


def encode_json(value: Any, path: str = "data") -> bytes:
    """Give a value's JSON form as UTF-8.

    Beyond JSON's own types: dates and times as ISO 8601 (UTC, ``Z``), enums as their value,
    UUIDs as text, Decimals as text (no digit is lost), bytes as base64, sets as lists,
    dataclasses and pydantic models as objects, NaN and infinities as null.

    Args:
        value: What to encode.
        path: Name of the value in error texts.

    Raises:
        EncodingFailed: A part has no JSON form; the error names where it is.
    """
    try:
        return orjson.dumps(value, _convert, _ENCODE_OPTIONS)
    except (TypeError, ValueError, RecursionError) as error:
        # The encoder does not say where it failed; the slow search for the place is worth
        # its time only now.
        found = _find_unencodable(value, path, 0, [])
        raise found or EncodingFailed(path, str(error)) from None


def _convert(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _find_unencodable(
    value: Any, path: str, depth: int, ancestors: list[int]
) -> EncodingFailed | None:
    if id(value) in ancestors:
        return EncodingFailed(path, "the value contains itself")
    if depth > MAX_DEPTH:
        return EncodingFailed(path, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int) and not _SMALLEST_INT <= value <= _LARGEST_INT:
        return EncodingFailed(path, "the integer needs more than 64 bits; send it as text")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return EncodingFailed(path, "the text has a lone surrogate and no UTF-8 form")
        return None
    ancestors.append(id(value))
    try:
        for name, item in _children(value, path):
            found = _find_unencodable(item, name, depth + 1, ancestors)
            if found is not None:
                return found
    except TypeError as error:
        return EncodingFailed(path, str(error))
    finally:
        ancestors.pop()
    return None


def _children(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                orjson.dumps({key: None}, option=_ENCODE_OPTIONS)
            yield f"{path}.{key}", item
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f"{path}.{field.name}", getattr(value, field.name)
    elif isinstance(value, float) and not math.isfinite(value):
        return
    else:
        try:
            orjson.dumps(value, option=_ENCODE_OPTIONS)
        except TypeError:
            converted = _convert(value)
            if isinstance(converted, Mapping | list):
                yield from _children(converted, path)


def redact(value: Any, names: frozenset[str]) -> Any:
    """Replace the values of keys whose lower-case name is exactly one of ``names``.

    Never by substring: ``token_count`` is not a secret. Returns the same object where nothing
    had to be replaced.
    """
    if isinstance(value, dict):
        changed = {
            key: "[redacted]"
            if isinstance(key, str) and key.lower() in names
            else redact(item, names)
            for key, item in value.items()
        }
        return changed if any(changed[key] is not value[key] for key in value) else value
    if isinstance(value, list | tuple):
        items = [redact(item, names) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return items
    return value


@dataclass(frozen=True, slots=True)
class RunEnvelope:
    """What all events of one attempt share, encoded once."""

    run_id: str
    attempt: int
    thread_id: str
    user_id: str
    agent: str

    def encode(
        self, event_type: EventType, timestamp_ms: int, data: Any, *, data_path: str = "data"
    ) -> bytes:
        """Give an event's stored bytes: a JSON object without ``offset`` and ``seq``.

        Raises:
            EncodingFailed: A part of the data has no JSON form.
        """
        return encode_fields(
            {
                "type": event_type.value,
                "run_id": self.run_id,
                "attempt": self.attempt,
                "thread_id": self.thread_id,
                "user_id": self.user_id,
                "agent": self.agent,
                "timestamp": format_timestamp(timestamp_ms),
            },
            data,
            data_path,
        )


def encode_fields(fields: dict[str, Any], data: Any, data_path: str = "data") -> bytes:
    """Give the stored bytes of an event with these envelope fields and this data."""
    body = encode_json(data, data_path)
    return b'%s,"data":%s}' % (orjson.dumps(fields)[:-1], body)


def splice(event: bytes, offset: int, seq: int) -> bytes:
    """Put offset and seq into stored event bytes; gives the frame that a client receives.

    Events without a place in the run's sequence (text, progress, notices) have seq 0 here
    and none in the frame.
    """
    if seq:
        return b'{"offset":%d,"seq":%d,%s' % (offset, seq, event[1:])
    return b'{"offset":%d,%s' % (offset, event[1:])


def encode_part(offset: int, index: int, total: int, text: str) -> bytes:
    """Give the frame of one part of a large event.

    The texts of all parts, joined in order, are the event's frame.
    """
    return b'{"type":"event_part","offset":%d,"index":%d,"total":%d,"text":%s}' % (
        offset,
        index,
        total,
        orjson.dumps(text),
    )


class Publication:
    """An event at an offset.

    Attributes:
        offset: Place in the user's channel.
        seq: Number among the run's lifecycle events, 0 for events outside that sequence.
        kind: How the event is kept.
        run_id: The event's run, empty for notices.
        event: Stored bytes; empty for a claim, whose bytes are read from the log.
        size_bytes: Size of a stored body that was not read along, otherwise of ``event``.
    """

    __slots__ = ("_frame", "event", "kind", "offset", "run_id", "seq", "size_bytes")

    def __init__(
        self,
        offset: int,
        seq: int,
        kind: int,
        run_id: str,
        event: bytes,
        size_bytes: int | None = None,
    ) -> None:
        self.offset = offset
        self.seq = seq
        self.kind = kind
        self.run_id = run_id
        self.event = event
        self.size_bytes = len(event) if size_bytes is None else size_bytes
        self._frame: bytes | None = None

    @property
    def is_claim(self) -> bool:
        """Whether the bytes have to be fetched."""
        return not self.event

    @property
    def frame(self) -> bytes:
        """The frame for clients, built once however many connections it goes to."""
        if self._frame is None:
            self._frame = splice(self.event, self.offset, self.seq)
        return self._frame

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Publication):
            return NotImplemented
        return (self.offset, self.seq, self.kind, self.run_id, self.event) == (
            other.offset,
            other.seq,
            other.kind,
            other.run_id,
            other.event,
        )

    def __hash__(self) -> int:
        return hash((self.offset, self.run_id, self.event))

    def __repr__(self) -> str:
        return (
            f"Publication(offset={self.offset}, seq={self.seq}, kind={self.kind}, "
            f"run_id={self.run_id!r}, {self.size_bytes} bytes)"
        )


class LiveBatch(NamedTuple):
    """What one PUBLISH carried: publications in offset order, possibly none."""

    epoch: str
    publications: Sequence[Publication]


def _decode_entry(entry: Sequence[Any]) -> Publication:
    offset, seq, kind, run_id, event = entry[:5]
    if not (type(offset) is type(seq) is type(kind) is int and type(event) is bytes):
        raise TypeError("an entry of another form")
    return Publication(offset, seq, kind, run_id.decode(), event)


def decode_live(payload: bytes) -> LiveBatch:
    """Read a live message ``[version, epoch, [[offset, seq, kind, run_id, event], …]]``.

    Elements that a newer writer appends are ignored.

    Raises:
        DecodingFailed: It is not such a message, or its version is not ours.
    """
    try:
        message = msgpack.unpackb(payload, raw=True)
        version, epoch, entries = message[0], message[1], message[2]
        if version != WIRE_VERSION:
            raise DecodingFailed(f"live message of version {version!r}, expected {WIRE_VERSION}")
        return LiveBatch(epoch.decode("ascii"), [_decode_entry(entry) for entry in entries])
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise DecodingFailed(f"not a live message: {type(error).__name__}") from error


class Task(NamedTuple):
    """A hint to a worker that a run waits. The run hash is the truth."""

    user_id: str
    run_id: str
    agent: str


def encode_task(task: Task) -> bytes:
    """Give a task's bytes for the task stream."""
    packed: bytes = msgpack.packb(
        {"v": WIRE_VERSION, "user_id": task.user_id, "run_id": task.run_id, "agent": task.agent}
    )
    return packed


def decode_task(payload: bytes) -> Task:
    """Read a task.

    Raises:
        DecodingFailed: The bytes are not a task of a version that we know.
    """
    try:
        fields = msgpack.unpackb(payload)
        if fields["v"] != WIRE_VERSION:
            raise DecodingFailed(f"task of version {fields['v']!r}, expected {WIRE_VERSION}")
        task = Task(fields["user_id"], fields["run_id"], fields["agent"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DecodingFailed(f"not a task: {type(error).__name__}: {error}") from error
    if not all(isinstance(part, str) and part for part in task):
        raise DecodingFailed("not a task: user_id, run_id and agent must be non-empty text")
    return task
