"""Byte sequences for the gateway's port: nearly right handshakes and frames, made from a seed."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

GIANT_LENGTHS = (2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
LENGTHS = (0, 1, 2, 124, 125, 126, 127, 128, 1_000, 65_535, 65_536, 70_000)
CLOSE_CODES = (
    0,
    999,
    1000,
    1001,
    1004,
    1005,
    1006,
    1015,
    1016,
    2999,
    3000,
    4401,
    4999,
    5000,
    65535,
)

ODD_HEADERS = (
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    b"Transfer-Encoding: identity, chunked",
    b"Expect: 100-continue",
    b"Upgrade: h2c",
    b"Upgrade: websocket, h2c",
    b"Connection: close, Upgrade",
    b"Connection: keep-alive",
    b"Sec-WebSocket-Version: 8",
    b"Sec-WebSocket-Version: 13, 8",
    b"Sec-WebSocket-Key: AAAA",
    b"Sec-WebSocket-Key: \xff\xfe",
    b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99",
    b"Sec-WebSocket-Extensions: ;;;",
    b"Sec-WebSocket-Protocol: ,,,",
    b"Sec-WebSocket-Protocol: relay.v1, bearer.x.y.z",
    b"Sec-WebSocket-Protocol: \xc3\xa4",
    b"Origin: null",
    b"Origin: http://[::1",
    b"Origin: \xff",
    b"Host: a\r\nHost: b",
    b"Host:",
    b"Authorization: Bearer \xff",
    b"Authorization: Bearer a.b.c",
    b"Authorization: Bearer",
    b" folded: yes",
    b"\tfolded",
    b"no colon",
    b": no name",
    b"na me: x",
    b"x: " + b"y" * 9_000,
    b"x: \x00",
    b"\x00: x",
)

ODD_TARGETS = (
    b"/v1/ws?since=%ff%fe",
    b"/v1/ws?since=" + b"9" * 5_000,
    b"/v1/ws?since=a:99999999999999999999",
    b"/v1/ws?client_id=%00",
    b"/v1/ws?ticket=%f0%9f%98%80",
    b"/v1/ws?ticket=" + b"x" * 3_000,
    b"/v1/ws?%",
    b"/v1/ws?&&&===",
    b"/v1/ws#x",
    b"/v1/ws/",
    b"//v1/ws",
    b"/v1/%2e%2e/v1/ws",
    b"/\xc3\xa4",
    b"/\xff\x80",
    b"*",
    b"http://evil.example/v1/ws",
    b"",
    b"/" + b"a" * 70_000,
    b"/v1/runs/%00%0d%0a",
    b"/v1/events?since=%00",
)


class Case(NamedTuple):
    """One connection's bytes.

    Attributes:
        pieces: What is written, one after the other.
        is_slow: Whether every byte is written by itself.
        is_reset: Whether the connection ends by RST, and not by FIN.
        awaits_answer: Whether the first piece is a handshake whose answer has to come before more.
    """

    pieces: Sequence[bytes]
    is_slow: bool
    is_reset: bool
    awaits_answer: bool


def make_case(random: Random, port: int, token: str) -> Case:
    """Make the bytes of one connection."""
    kind = random.randrange(10)
    awaits_answer = False
    if kind == 0:
        pieces = [random.randbytes(random.choice((1, 10, 300, 5_000)))]
    elif kind <= 3:
        pieces = [_mutated(random, handshake(random, port, token, is_odd=True))]
        pieces += [frames(random)] if random.random() < 0.5 else []
    else:
        pieces = [handshake(random, port, token)]
        sent = [frames(random) for _ in range(random.randint(1, 4))]
        pieces += [_mutated(random, piece) if random.random() < 0.2 else piece for piece in sent]
        awaits_answer = random.random() < 0.7
        if not awaits_answer and random.random() < 0.5:
            # The frames come with the handshake, before anybody has answered it.
            pieces = [b"".join(pieces)]
    size = sum(len(piece) for piece in pieces)
    is_slow = size < 600 and random.random() < 0.15
    return Case(pieces, is_slow, random.random() < 0.3, awaits_answer)


def handshake(random: Random, port: int, token: str, *, is_odd: bool = False) -> bytes:
    """Give a handshake that is accepted, or one with odd parts."""
    target = random.choice(ODD_TARGETS) if is_odd and random.random() < 0.5 else b"/v1/ws"
    method = random.choice((b"GET", b"GET", b"POST", b"get", b"\xffGET")) if is_odd else b"GET"
    version = random.choice((b"1.1", b"1.1", b"1.0", b"2.0", b"9")) if is_odd else b"1.1"
    lines = [
        b"%b %b HTTP/%b" % (method, target, version),
        b"Host: 127.0.0.1:%d" % port,
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: " + base64.b64encode(random.randbytes(16)),
        b"Authorization: Bearer " + token.encode(),
    ]
    if is_odd:
        for _ in range(random.randint(0, 3)):
            lines.insert(random.randint(1, len(lines)), random.choice(ODD_HEADERS))
        if random.random() < 0.3:
            del lines[random.randrange(1, len(lines))]
    end = random.choice((b"\n", b"\r", b"\r\r\n")) if is_odd and random.random() < 0.1 else b"\r\n"
    return end.join([*lines, b"", b""])


def frames(random: Random) -> bytes:
    """Give a few frames, most of which break a rule of RFC 6455 or of ``relay.v1``."""
    return b"".join(_frame(random) for _ in range(random.randint(1, 5)))


def _frame(random: Random) -> bytes:
    kind = random.randrange(8)
    if kind == 0:
        # A giant that never comes to its end.
        length = random.choice(GIANT_LENGTHS)
        head = bytes([0x80 | random.choice((0, 1, 2, 9)), 0x80 | 127])
        return head + struct.pack("!Q", length) + random.randbytes(4 + random.randrange(50))
    if kind == 1:
        reason = random.choice((b"", b"why", b"\xff\xfe", b"x" * 124))
        body = random.choice((b"", b"\x03", struct.pack("!H", random.choice(CLOSE_CODES)) + reason))
        return encode_frame(random, 8, body)
    if kind == 2:
        return encode_frame(
            random, random.choice((9, 10)), random.randbytes(random.choice(LENGTHS))
        )
    if kind == 3:
        # Fragments, with another frame in their midst, or without their beginning.
        first = encode_frame(random, random.choice((0, 1, 2)), b'{"type":', fin=False)
        middle = (
            encode_frame(random, random.choice((1, 9, 8)), b"x") if random.random() < 0.5 else b""
        )
        return first + middle + encode_frame(random, 0, b'"ping"}', fin=random.random() < 0.7)
    if kind == 4:
        return encode_frame(random, random.randrange(16), random.randbytes(random.choice(LENGTHS)))
    return encode_frame(random, 1, _text(random))


def encode_frame(random: Random, opcode: int, body: bytes, *, fin: bool = True) -> bytes:
    """Give a frame; now and then unmasked, with reserved bits, or with an overlong length."""
    rsv = random.choice((0x10, 0x20, 0x40, 0x70)) if random.random() < 0.1 else 0
    is_masked = random.random() > 0.1
    head = bytes([(0x80 if fin else 0) | rsv | opcode])
    mark = 0x80 if is_masked else 0
    form = random.random()
    if len(body) < 126 and form > 0.1:
        head += bytes([mark | len(body)])
    elif len(body) < 65_536 and form > 0.05:
        head += bytes([mark | 126]) + struct.pack("!H", len(body))
    else:
        head += bytes([mark | 127]) + struct.pack("!Q", len(body))
    if not is_masked:
        return head + body
    mask = random.randbytes(4)
    key = (mask * (len(body) // 4 + 1))[: len(body)]
    masked = int.from_bytes(body, "big") ^ int.from_bytes(key, "big")
    return head + mask + masked.to_bytes(len(body), "big")


def _text(random: Random) -> bytes:
    kinds = ("user_message", "cancel", "input_response", "refresh_token", "ping", "x", "", None, 1)
    values = ("a", "", None, 0, -1, 1e308, [], {}, "\x00", "é" * 200, [[]] * 50, True)
    names = ("id", "thread_id", "content", "run_id", "request_id", "token", "metadata", "value")
    value: dict[str, object] = {"type": random.choice(kinds), "id": "1"}
    value |= {random.choice(names): random.choice(values) for _ in range(random.randrange(6))}
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).encode()
    shape = random.random()
    if shape < 0.1:
        return b"[" * random.choice((10, 1_000, 50_000))
    if shape < 0.2:
        return b'{"type":"ping","id":"1","x":' + b'{"a":' * 2_000 + b"1" + b"}" * 2_001
    return _mutated(random, text) if shape < 0.5 else text


def _mutated(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(0, 4)):
        place = random.randrange(len(changed) + 1)
        match random.randrange(4):
            case 0:
                changed[place:place] = random.randbytes(random.randint(1, 4))
            case 1:
                del changed[place : place + random.randint(1, 20)]
            case 2 if place < len(changed):
                changed[place] ^= 1 << random.randrange(8)
            case _:
                changed = changed[: max(1, place)]
    return bytes(changed)
