"""WebSocket frames as bytes (RFC 6455, section 5): written for the server, read from clients. Pure.

No extension is ever agreed on, so a reserved bit is always an error. What a message says is for
others to judge; here it is complete, unmasked, within its size and, where it is text, UTF-8.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

MAX_FRAGMENTS = 1_000
"""Of one message. A message in so many pieces is there to keep us busy."""

_FIN = 0x80
_RESERVED = 0x70
_MASKED = 0x80
_MAX_CONTROL = 125
_NO_STATUS = 1005

# RFC 6455, section 7.4, and the registry that it founds: what may stand in a close frame.
_CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, *range(1007, 1015)})
_OWN_CLOSE_CODES = range(3000, 5000)


class Opcode(IntEnum):
    """What a frame is."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


_KNOWN = frozenset(Opcode)


class ProtocolViolation(Exception):
    """A client broke the WebSocket protocol; the connection ends with this code.

    Attributes:
        code: 1002, 1007, 1008 or 1009.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Message(NamedTuple):
    """A complete text or binary message, or a control frame."""

    opcode: int
    data: bytes


def header(opcode: int, size_bytes: int) -> bytes:
    """Give what stands before an unmasked payload, in one frame."""
    if size_bytes < 126:
        return bytes((_FIN | opcode, size_bytes))
    if size_bytes < 65_536:
        return bytes((_FIN | opcode, 126)) + size_bytes.to_bytes(2)
    return bytes((_FIN | opcode, 127)) + size_bytes.to_bytes(8)


_COMMON_BYTES: Final = 1_024
_TEXT_HEADERS: Final = tuple(header(Opcode.TEXT, size_bytes) for size_bytes in range(_COMMON_BYTES))


def frame(opcode: int, payload: bytes) -> bytes:
    """Give a frame for a client."""
    return header(opcode, len(payload)) + payload


def text_frame(payload: bytes) -> bytes:
    """Give a text message for a client. Quicker than ``frame`` where most events are."""
    size_bytes = len(payload)
    if size_bytes < _COMMON_BYTES:
        return _TEXT_HEADERS[size_bytes] + payload
    return header(Opcode.TEXT, size_bytes) + payload


def close_frame(code: int, reason: str) -> bytes:
    """Give a close frame for a client; a reason that is too long is cut between characters."""
    text = reason.encode()[: _MAX_CONTROL - 2].decode(errors="ignore").encode()
    return frame(Opcode.CLOSE, code.to_bytes(2) + text)


def read_close(data: bytes) -> tuple[int, str]:
    """Give code and reason of a close frame's payload; 1005 where it names none.

    Raises:
        ProtocolViolation: 1002, or 1007 for a reason that is not UTF-8.
    """
    if not data:
        return _NO_STATUS, ""
    code = int.from_bytes(data[:2])
    if len(data) < 2 or not (code in _CLOSE_CODES or code in _OWN_CLOSE_CODES):
        raise ProtocolViolation(1002, "invalid close frame")
    try:
        return code, data[2:].decode()
    except UnicodeDecodeError:
        raise ProtocolViolation(1007, "a reason that is not UTF-8") from None


class FrameReader:
    """Reads a client's frames from whatever pieces they arrive in.

    Args:
        max_bytes: The largest message, all of its fragments together.
    """

    __slots__ = ("_buffer", "_fragments", "_max_bytes", "_opcode", "_parts")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        # The message under way, while its fragments come.
        self._opcode = 0
        self._parts = bytearray()
        self._fragments = 0

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is held: another reader would go on just as well."""
        return not self._buffer and not self._opcode

    def feed(self, data: bytes) -> None:
        """Take bytes as they came."""
        self._buffer += data

    def next(self) -> Message | None:
        """Give the next complete message or control frame; None until more bytes come.

        Raises:
            ProtocolViolation: The connection cannot go on.
        """
        while True:
            taken = self._take_frame()
            if taken is None:
                return None
            is_final, opcode, data = taken
            if opcode >= Opcode.CLOSE:
                return Message(opcode, data)
            message = self._join(is_final, opcode, data)
            if message is not None:
                return message

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, second = buffer[0], buffer[1]
        opcode, size = first & 0x0F, second & 0x7F
        _check_head(first, opcode, second, size)
        start = 2
        if size == 126:
            start = 4
            size = int.from_bytes(buffer[2:4])
        elif size == 127:
            start = 10
            size = int.from_bytes(buffer[2:10])
        if len(buffer) < start:
            return None
        if opcode < Opcode.CLOSE and size + len(self._parts) > self._max_bytes:
            raise ProtocolViolation(1009, f"at most {self._max_bytes} bytes are accepted")
        end = start + 4 + size
        if len(buffer) < end:
            return None
        data = _unmask(bytes(buffer[start + 4 : end]), bytes(buffer[start : start + 4]))
        del buffer[:end]
        return bool(first & _FIN), opcode, data

    def _join(self, is_final: bool, opcode: int, data: bytes) -> Message | None:
        if opcode == Opcode.CONTINUATION:
            if not self._opcode:
                raise ProtocolViolation(1002, "a continuation of nothing")
        elif self._opcode:
            raise ProtocolViolation(1002, "a new message within another")
        elif is_final:
            return _complete(opcode, data)
        else:
            self._opcode = opcode
        self._fragments += 1
        if self._fragments > MAX_FRAGMENTS:
            raise ProtocolViolation(1008, f"more than {MAX_FRAGMENTS} fragments")
        self._parts += data
        if not is_final:
            return None
        message = _complete(self._opcode, bytes(self._parts))
        self._opcode, self._parts, self._fragments = 0, bytearray(), 0
        return message


def _check_head(first: int, opcode: int, second: int, size: int) -> None:
    if first & _RESERVED:
        raise ProtocolViolation(1002, "reserved bits are set")
    if opcode not in _KNOWN:
        raise ProtocolViolation(1002, "an unknown opcode")
    if not second & _MASKED:
        raise ProtocolViolation(1002, "a frame that is not masked")
    if opcode >= Opcode.CLOSE and (size > _MAX_CONTROL or not first & _FIN):
        raise ProtocolViolation(1002, "a control frame in fragments, or too long")


def _complete(opcode: int, data: bytes) -> Message:
    if opcode == Opcode.TEXT:
        try:
            data.decode()
        except UnicodeDecodeError:
            raise ProtocolViolation(1007, "text that is not UTF-8") from None
    return Message(opcode, data)


def _unmask(data: bytes, key: bytes) -> bytes:
    # One operation on two large numbers: many times quicker than byte by byte.
    size = len(data)
    whole = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data) ^ int.from_bytes(whole)).to_bytes(size)
