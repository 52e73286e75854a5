"""WebSocket frames: every rule of the protocol, and the same reading as another implementation."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.frames import Frame
from websockets.frames import Opcode as TheirOpcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from gateway.wire import (
    MAX_FRAGMENTS,
    FrameReader,
    Message,
    Opcode,
    ProtocolViolation,
    close_frame,
    frame,
    read_close,
    text_frame,
)

MAX = 1_000
KEY = b"\x01\x02\x03\x04"


def sent(opcode: int, data: bytes = b"", *, first: int = 0x80, mask: bool = True) -> bytes:
    """A client's frame, as wrong as asked for."""
    size = len(data)
    bit = 0x80 if mask else 0
    if size < 126:
        head = bytes((first | opcode, bit | size))
    elif size < 65_536:
        head = bytes((first | opcode, bit | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first | opcode, bit | 127)) + struct.pack("!Q", size)
    if not mask:
        return head + data
    return head + KEY + bytes(byte ^ KEY[place % 4] for place, byte in enumerate(data))


def read(data: bytes, step: int | None = None) -> tuple[list[Message], int | None]:
    """Give what a reader makes of the bytes, and the code with which it gives up."""
    reader = FrameReader(MAX)
    messages = []
    step = step or max(1, len(data))
    try:
        for start in range(0, len(data), step):
            reader.feed(data[start : start + step])
            while (message := reader.next()) is not None:
                messages.append(message)
    except ProtocolViolation as violation:
        return messages, violation.code
    return messages, None


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 1_023, 1_024, 65_535, 65_536])
def test_frames_are_those_of_another_implementation(size: int) -> None:
    payload = b"x" * size
    theirs = Frame(TheirOpcode.TEXT, payload).serialize(mask=False)
    assert frame(Opcode.TEXT, payload) == text_frame(payload) == theirs


def test_close_frames_are_read_again_and_long_reasons_cut() -> None:
    assert read_close(close_frame(4410, "too slow")[2:]) == (4410, "too slow")
    assert read_close(b"") == (1005, "")
    long = close_frame(1011, "ü" * 100)
    assert len(long) <= 127
    assert read_close(long[2:])[1].strip("ü") == ""


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\x03", 1002),
        (b"\x00\x00", 1002),
        (struct.pack("!H", 1005), 1002),
        (struct.pack("!H", 1006), 1002),
        (struct.pack("!H", 1015), 1002),
        (struct.pack("!H", 2999), 1002),
        (struct.pack("!H", 5000), 1002),
        (struct.pack("!H", 1000) + b"\xff", 1007),
    ],
)
def test_close_frames_that_are_wrong(payload: bytes, code: int) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        read_close(payload)
    assert caught.value.code == code


def test_messages_and_control_frames_between_fragments() -> None:
    data = (
        sent(Opcode.TEXT, b"one")
        + sent(Opcode.TEXT, b"tw", first=0)
        + sent(Opcode.PING, b"p")
        + sent(Opcode.CONTINUATION, b"", first=0)
        + sent(Opcode.CONTINUATION, b"o")
        + sent(Opcode.BINARY, b"\xff")
    )
    expected = [
        Message(Opcode.TEXT, b"one"),
        Message(Opcode.PING, b"p"),
        Message(Opcode.TEXT, b"two"),
        Message(Opcode.BINARY, b"\xff"),
    ]
    for step in (1, 2, 3, 7, None):
        assert read(data, step) == (expected, None)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (sent(Opcode.TEXT, b"x", mask=False), 1002),
        (sent(Opcode.TEXT, b"x", first=0xC0), 1002),
        (sent(Opcode.TEXT, b"x", first=0xA0), 1002),
        (sent(Opcode.TEXT, b"x", first=0x90), 1002),
        (sent(3, b"x"), 1002),
        (sent(11, b"x"), 1002),
        (sent(Opcode.PING, b"x", first=0), 1002),
        (sent(Opcode.PING, b"x" * 126), 1002),
        (sent(Opcode.CONTINUATION, b"x"), 1002),
        (sent(Opcode.TEXT, b"x", first=0) + sent(Opcode.TEXT, b"y"), 1002),
        (sent(Opcode.TEXT, b"\xff"), 1007),
        (sent(Opcode.TEXT, "ü".encode()[:1], first=0) + sent(Opcode.CONTINUATION, b"x"), 1007),
        (sent(Opcode.TEXT, b"x" * (MAX + 1)), 1009),
        (sent(Opcode.TEXT, b"x" * MAX, first=0) + sent(Opcode.CONTINUATION, b"x"), 1009),
        (b"\x82\xff" + b"\xff" * 8, 1009),
        (
            sent(Opcode.TEXT, first=0) + sent(Opcode.CONTINUATION, first=0) * MAX_FRAGMENTS,
            1008,
        ),
    ],
)
def test_violations_end_the_connection_with_their_code(data: bytes, code: int) -> None:
    for step in (1, None):
        assert read(data, step)[1] == code


def test_too_large_a_message_is_refused_before_it_is_here() -> None:
    reader = FrameReader(MAX)
    reader.feed(sent(Opcode.BINARY, b"x" * 5_000)[:10])
    with pytest.raises(ProtocolViolation):
        reader.next()


def test_text_split_within_a_character_is_whole() -> None:
    text = "größe".encode()
    for cut in range(len(text)):
        data = sent(Opcode.TEXT, text[:cut], first=0) + sent(Opcode.CONTINUATION, text[cut:])
        assert read(data) == ([Message(Opcode.TEXT, text)], None)


def test_reader_at_rest_holds_nothing() -> None:
    reader = FrameReader(MAX)
    data = sent(Opcode.TEXT, b"ab", first=0) + sent(Opcode.CONTINUATION, b"c")
    for place in range(len(data)):
        reader.feed(data[place : place + 1])
        is_last = place == len(data) - 1
        assert (reader.next() is not None) is is_last
        assert reader.is_at_rest is is_last


def theirs(data: bytes) -> tuple[list[Message], int | None]:
    """What the websockets library makes of the same bytes."""
    protocol = ServerProtocol(state=State.OPEN, max_size=MAX)
    protocol.receive_data(data)
    messages: list[Message] = []
    opcode, parts = 0, b""
    code = None
    for event in protocol.events_received():
        assert isinstance(event, Frame)
        if event.opcode >= 8:
            messages.append(Message(int(event.opcode), bytes(event.data)))
            continue
        if event.opcode != TheirOpcode.CONT:
            opcode, parts = int(event.opcode), b""
        parts += bytes(event.data)
        if event.fin:
            if opcode == Opcode.TEXT:
                # The library leaves this to whoever reads the message.
                try:
                    parts.decode()
                except UnicodeDecodeError:
                    return messages, 1007
            messages.append(Message(opcode, parts))
    if protocol.parser_exc is not None and protocol.close_sent is not None:
        code = protocol.close_sent.code
    return messages, int(code) if code is not None else None


FRAMES = st.builds(
    sent,
    st.sampled_from([0, 1, 2, 9, 10, 1, 0]),
    st.binary(max_size=120) | st.text(max_size=30).map(str.encode),
    first=st.sampled_from([0x80, 0x80, 0x80, 0x00, 0xC0, 0x90]),
    mask=st.sampled_from([True] * 9 + [False]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(FRAMES, max_size=8), st.integers(1, 40))
@example([sent(1, b"a", first=0), sent(1, b"b")], 1)
@example([sent(0, b"a")], 2)
def test_reads_what_another_implementation_reads(frames: list[bytes], step: int) -> None:
    data = b"".join(frames)
    assert read(data, step) == theirs(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_give_messages_or_a_code(data: bytes, step: int) -> None:
    messages, code = read(data, step)
    assert code in (None, 1002, 1007, 1009)
    assert all(message.opcode in set(Opcode) for message in messages)
    assert read(data) == (messages, code)
