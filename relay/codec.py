"""Bytes of events, live messages, tasks and positions.

Events are JSON, so that a gateway can pass them on as they are stored. Live messages and tasks
are msgpack: they are read by our own processes only, and keep event bytes untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgpack
import orjson

from relay.encoding import encode_json
from relay.errors import DecodingFailed, NewerVersion
from relay.events import EventType, format_timestamp
from relay.keys import WIRE_VERSION


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


class EventEncoder:
    """Encodes the events of one attempt; what they share is encoded once for each type."""

    def __init__(self, envelope: RunEnvelope) -> None:
        self._envelope = envelope
        self._heads: dict[EventType, bytes] = {}

    def encode(self, event_type: EventType, timestamp_ms: int, data: Any) -> bytes:
        """Give the same bytes as ``RunEnvelope.encode``.

        Raises:
            EncodingFailed: A part of the data has no JSON form.
        """
        head = self._heads.get(event_type)
        if head is None:
            # The time is the last of the envelope's fields.
            end = f'{format_timestamp(0)}","data":null}}'
            head = self._envelope.encode(event_type, 0, None)[: -len(end)]
            self._heads[event_type] = head
        time = format_timestamp(timestamp_ms).encode()
        return b'%s%s","data":%s}' % (head, time, encode_json(data))

    def encode_text(self, timestamp_ms: int, message_id: str, position: int, text: str) -> bytes:
        """Give the bytes of a ``text_delta``, as ``encode`` would, at less cost.

        Args:
            timestamp_ms: When it was written.
            message_id: Its message, a name that needs no escapes in JSON.
            position: Characters of the message before it.
            text: With a UTF-8 form.
        """
        head = self._heads.get(EventType.TEXT_DELTA)
        if head is None:
            self.encode(EventType.TEXT_DELTA, timestamp_ms, None)
            head = self._heads[EventType.TEXT_DELTA]
        return b'%s%s","data":{"message_id":"%s","position":%d,"text":%s}}' % (
            head,
            format_timestamp(timestamp_ms).encode(),
            message_id.encode(),
            position,
            orjson.dumps(text),
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
        wire: The frame as one transport writes it, left here by the first connection that sends
            it, for all others.
    """

    # One is made for each event that is delivered: everything that can wait is made when asked for.
    __slots__ = ("_frame", "_stored_bytes", "event", "kind", "offset", "run_id", "seq", "wire")

    def __init__(
        self,
        offset: int,
        seq: int,
        kind: int,
        run_id: str,
        event: bytes,
        stored_bytes: int = 0,
    ) -> None:
        self.offset = offset
        self.seq = seq
        self.kind = kind
        self.run_id = run_id
        self.event = event
        self._stored_bytes = stored_bytes
        self._frame: bytes | None = None
        self.wire: bytes | None = None

    @property
    def size_bytes(self) -> int:
        """Size of a stored body that was not read along, otherwise of ``event``."""
        return self._stored_bytes or len(self.event)

    @property
    def is_claim(self) -> bool:
        """Whether the bytes have to be fetched."""
        return not self.event

    @property
    def frame(self) -> bytes:
        """The frame for clients, built once however many connections it goes to."""
        frame = self._frame
        if frame is None:
            frame = self._frame = splice(self.event, self.offset, self.seq)
        return frame

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


# Final: in a compiled module constants, else a look into a dict for each event.
_unpack: Final = msgpack.unpackb
_ENTRY: Final = 5


def decode_live(payload: bytes) -> LiveBatch:
    """Read a live message; see ``read_live``.

    Raises:
        DecodingFailed: It is not such a message, or its version is not ours.
    """
    return LiveBatch(*read_live(payload))


def read_live(payload: bytes) -> tuple[str, list[Publication]]:
    """Give epoch and publications of a live message.

    It is ``[version, epoch, [[offset, seq, kind, run_id, event], …]]``. Elements that a newer
    writer appends are ignored.

    Raises:
        DecodingFailed: It is not such a message, or its version is not ours.
    """
    try:
        message: list[Any] = _unpack(payload, raw=True)
        if message[0] != WIRE_VERSION:
            raise DecodingFailed(f"live message of version {message[0]!r}, expected {WIRE_VERSION}")
        publications = []
        entries: list[list[Any]] = message[2]
        if type(entries) is not list:
            raise TypeError("no list of entries")  # noqa: TRY301 -- no call for each message
        # Declared, so that the compiled module looks at each value's type once.
        offset: int
        seq: int
        kind: int
        run_id: bytes
        event: bytes
        for entry in entries:
            offset, seq, kind, run_id, event = entry if len(entry) == _ENTRY else entry[:_ENTRY]
            # Only whole numbers can be joined like this: quicker than a question for each.
            if offset | seq | kind < 0 or type(event) is not bytes:
                raise TypeError("an entry of another form")  # noqa: TRY301 -- no call for each event
            publications.append(Publication(offset, seq, kind, run_id.decode(), event))
        epoch: str = message[1].decode()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise DecodingFailed(f"not a live message: {type(error).__name__}") from error
    return epoch, publications


class Task(NamedTuple):
    """A hint to a worker that a run waits. The run hash is the truth.

    Attributes:
        more: Fields of a newer writer; they are kept when the task is passed on.
    """

    user_id: str
    run_id: str
    agent: str
    more: Mapping[str, Any] = MappingProxyType({})


_TASK_FIELDS = frozenset({"v", "user_id", "run_id", "agent"})


def encode_task(task: Task) -> bytes:
    """Give a task's bytes for the task stream."""
    packed: bytes = msgpack.packb(
        {
            **task.more,
            "v": WIRE_VERSION,
            "user_id": task.user_id,
            "run_id": task.run_id,
            "agent": task.agent,
        }
    )
    return packed


def decode_task(payload: bytes) -> Task:
    """Read a task.

    Raises:
        NewerVersion: It is for newer workers.
        DecodingFailed: The bytes are not a task of a version that we know.
    """
    try:
        fields = msgpack.unpackb(payload)
        version = fields["v"]
        if version != WIRE_VERSION:
            is_newer = type(version) is int and version > WIRE_VERSION
            failure = NewerVersion if is_newer else DecodingFailed
            raise failure(f"task of version {version!r}, expected {WIRE_VERSION}")
        more = {name: value for name, value in fields.items() if name not in _TASK_FIELDS}
        user_id, run_id, agent = fields["user_id"], fields["run_id"], fields["agent"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DecodingFailed(f"not a task: {type(error).__name__}: {error}") from error
    if not all(isinstance(name, str) and name for name in (user_id, run_id, agent)):
        raise DecodingFailed("not a task: user_id, run_id and agent must be non-empty text")
    return Task(user_id, run_id, agent, more)
