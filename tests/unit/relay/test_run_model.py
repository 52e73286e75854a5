"""What a run's hash in Redis may hold: a row that cannot be read is said to be so at once."""

import pytest

from relay.errors import DecodingFailed
from relay.run_model import summary_from_row

FIELDS = (
    "run_id", "agent", "thread", "status", "attempt", "seq", "first", "open_tools", "open_inputs",
    "cancel", "created_ms", "ended_ms", "result_offset", "parent",
)  # fmt: skip
SOUND = {
    "run_id": b"run_1",
    "agent": b"writer",
    "thread": b"t1",
    "status": b"running",
    "attempt": b"1",
    "seq": b"3",
    "first": b"7",
    "created_ms": b"1795000000000",
    "open_inputs": b'{"i1":"{\\"kind\\":\\"text\\",\\"prompt\\":\\"?\\"}"}',
}


def row(**changed: bytes) -> list[bytes]:
    return [(SOUND | changed).get(name, b"") for name in FIELDS]


def test_a_row_becomes_an_item_of_runs() -> None:
    item = summary_from_row(row(ended_ms=b"1795000001500")).as_json()

    assert item["created_at"] == "2026-11-18T11:06:40.000Z"
    assert item["ended_at"] == "2026-11-18T11:06:41.500Z"
    assert item["open_inputs"] == [{"request_id": "i1", "kind": "text", "prompt": "?"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("created_ms", b"soon"),
        ("created_ms", b"-1"),
        ("created_ms", b"253402300800000"),
        ("created_ms", b"9" * 40),
        ("ended_ms", b"-1"),
        ("attempt", b""),
        ("run_id", b"\xff"),
        ("open_inputs", b"[]"),
        ("open_inputs", b'{"i1":"text"}'),
        ("open_inputs", b'{"i1":"[1]"}'),
        ("open_inputs", b'{"i1":"[]"}'),
        ("open_inputs", b'{"i1":"\\"\\""}'),
        ("open_inputs", b'{"i1":"[\\"ab\\"]"}'),
        ("open_inputs", b'{"i1":"[[1,2]]"}'),
        ("open_inputs", b'{"i1":5}'),
        ("open_tools", b'"call"'),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_when_it_is_read(field: str, value: bytes) -> None:
    with pytest.raises(DecodingFailed, match="a run's hash cannot be read"):
        summary_from_row(row(**{field: value}))
