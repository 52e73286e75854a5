from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import enum
import fractions
import math
import threading
import time
import types
import uuid
import zoneinfo
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import orjson
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.codec import RunEnvelope
from relay.encoding import MAX_DEPTH, encode_json, redact
from relay.errors import EncodingFailed
from relay.events import EventType, validate_data

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXTS | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
ODD = (
    VALUES
    | st.just(object())
    | st.just("\ud800")
    | st.integers(2**64)
    | st.binary(max_size=5)
    | st.decimals()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.uuids()
    | st.floats()
)
ODD_KEYS = TEXTS | st.integers() | st.booleans() | st.floats() | st.binary(max_size=2) | st.text()
ENVELOPE = RunEnvelope("run_1", 2, "t", "alice", "docs")
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


@dataclasses.dataclass
class Point:
    x: int
    y: Any
    _cache: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    token: str
    x: int = 1


class Colour(enum.Enum):
    RED = "red"
    MIXED = ("red", Decimal("0.5"))
    BROKEN = (object(),)


class Name(enum.StrEnum):
    A = "a"


class Level(enum.IntEnum):
    HIGH = 3


class Pair(NamedTuple):
    left: int
    right: Any


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")

    price: Any
    when: datetime.date = datetime.date(2026, 1, 2)


class Order(pydantic.BaseModel):
    items: list[Item]


class Celsius(float):
    """A subclass, as numpy's float64 is one."""


class Lazy(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Endless:
    """Iterating over it never ends."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1

    def __len__(self) -> int:
        return 3


class Failing(Lazy):
    def __iter__(self) -> Iterator[str]:
        raise ValueError("the connection behind it is closed")


class Used:
    """Iterating over it once uses it up."""

    def __init__(self) -> None:
        self.is_used = False

    def __iter__(self) -> Iterator[int]:
        self.is_used = True
        return iter([1])


# --- Forms ---


@given(VALUES)
def test_json_values_round_trip(value: Any) -> None:
    decoded = orjson.loads(encode_json(value))
    assert decoded == orjson.loads(orjson.dumps(value))


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC), "2026-01-02T03:00:00Z"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 678), "2026-01-02T03:04:05.000678Z"),  # noqa: DTZ001
        (datetime.datetime(2026, 7, 2, 3, tzinfo=BERLIN), "2026-07-02T03:00:00+02:00"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.time(3, 4), "03:04:00"),
        (Colour.RED, "red"),
        (Colour.MIXED, ["red", "0.5"]),
        (Name.A, "a"),
        (Level.HIGH, 3),
        (uuid.UUID(int=5), str(uuid.UUID(int=5))),
        (Decimal("1.10"), "1.10"),
        (Decimal("1E+400"), "1E+400"),
        (Decimal("NaN"), "NaN"),
        (b"\x00\xff", "AP8="),
        (bytearray(b"\x00\xff"), "AP8="),
        (memoryview(b"\x00\xff"), "AP8="),
        ({3, 10, 1}, [1, 3, 10]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({"b", 1}, ["b", 1]),
        (collections.deque([1, 2]), [1, 2]),
        (Point(1, Decimal(2)), {"x": 1, "y": "2"}),
        (Slotted("t"), {"token": "t", "x": 1}),
        (
            Order.model_validate({"items": [{"price": Decimal("1.5"), "later": 1}]}),
            {"items": [{"price": "1.5", "when": "2026-01-02", "later": 1}]},
        ),
        (Pair(1, b""), [1, ""]),
        (Celsius(1.5), 1.5),
        (Celsius("nan"), None),
        (math.nan, None),
        ([math.inf, -math.inf], [None, None]),
        ((1, 2), [1, 2]),
        (2**64 - 1, 2**64 - 1),
        (-(2**63), -(2**63)),
        (Lazy(a={1}), {"a": [1]}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        ({1: "a", None: 2, False: 3, 1.5: 4}, {"1": "a", "null": 2, "false": 3, "1.5": 4}),
        ({Name.A: 1, uuid.UUID(int=5): 2}, {"a": 1, str(uuid.UUID(int=5)): 2}),
        ({datetime.date(2026, 1, 2): 1}, {"2026-01-02": 1}),
        ("\x00\u2028</script>", "\x00\u2028</script>"),
    ],
)
def test_every_value_has_the_documented_form(value: object, form: object) -> None:
    assert orjson.loads(encode_json(value)) == form
    assert orjson.loads(encode_json({"a": [value]})) == {"a": [form]}


def test_no_digit_of_a_number_is_lost() -> None:
    numbers = [0.1 + 0.2, 1e-308, 2**53 + 1, 2**63, -(2**63), 1.7976931348623157e308]
    assert orjson.loads(encode_json(numbers)) == numbers


# --- Refusals, each with its place ---


def nested(levels: int, leaf: Any = 0) -> Any:
    value = leaf
    for _ in range(levels):
        value = [value]
    return value


def test_the_greatest_depth_is_what_the_error_says() -> None:
    assert orjson.loads(encode_json(nested(MAX_DEPTH)))
    for levels in (MAX_DEPTH + 1, 5_000):
        with pytest.raises(EncodingFailed, match=f"deeper than {MAX_DEPTH} levels") as caught:
            encode_json(nested(levels), "data.result")
        assert caught.value.path.startswith("data.result[0][0]")
        assert len(caught.value.path) < 200


CYCLE: dict[str, Any] = {"next": []}
CYCLE["next"].append(CYCLE)


@pytest.mark.parametrize(
    ("value", "place", "reason"),
    [
        ({"items": [0, 1, 2, {"price": object()}]}, "data.items[3].price", "object has no JSON"),
        ({"a": [1, object()]}, "data.a[1]", "object"),
        ({"a": {"b": "\ud800"}}, "data.a.b", "lone surrogate"),
        ({"a": {"b\udc00": 1}}, "data.a['b\\udc00']", "lone surrogate"),
        ({"n": 2**64}, "data.n", "64 bits"),
        ({"n": [-(2**63) - 1]}, "data.n[0]", "64 bits"),
        ({2**64: 1}, "data", "a key of type int"),
        ({"k": {(1, 2): 1}}, "data.k", "a key of type tuple"),
        ({"k": {b"x": 1}}, "data.k", "a key of type bytes"),
        ({"k": {Decimal(1): 1}}, "data.k", "a key of type Decimal"),
        ({"k": {1: "a", "1": "b"}}, "data.k['1']", "two keys"),
        ({"p": Point(1, object())}, "data.p.y", "object"),
        ({"m": Order(items=[Item(price=1), Item(price=object())])}, "data.m.items[1].price", ""),
        ({"m": pydantic.SecretStr("x")}, "data.m", "SecretStr"),
        ({"e": Colour.BROKEN}, "data.e.value[0]", "object"),
        ({"s": {"t": lambda: 1}}, "data.s.t", "function"),
        ({"s": {frozenset({fractions.Fraction(1, 3)})}}, "data.s[0][0]", "Fraction"),
        ({"t": (1, datetime.timedelta(1))}, "data.t[1]", "timedelta"),
        ({"t": datetime.time(1, tzinfo=datetime.UTC)}, "data.t", "tzinfo"),
        ({"l": Lazy(a=Lazy(b=threading.Lock()))}, "data.l.a.b", "lock"),
        ({"g": (n for n in range(3))}, "data.g", "generator"),
        ({"i": Endless()}, "data.i", "Endless"),
        ({"f": Failing(a=1)}, "data.f", "the connection behind it is closed"),
        ({"c": Point}, "data.c", "type"),
        ({"a b": {"it's": object()}}, "data['a b'][\"it's\"]", "object"),
        ({"k" * 500: object()}, "data." + "k" * 64, "object"),
        (CYCLE, "data.next[0]", "contains itself"),
        (Point(1, {"p": CYCLE}), "data.y.p.next[0]", "contains itself"),
    ],
)
def test_what_has_no_form_is_named_by_its_place(value: object, place: str, reason: str) -> None:
    with pytest.raises(EncodingFailed) as caught:
        encode_json(value)
    assert caught.value.path == place
    assert reason in caught.value.reason
    # Redaction looks at every value before it is encoded, and says the same of what it cannot walk.
    str(caught.value).encode()


def test_what_cannot_be_looked_through_for_secrets_is_named_too() -> None:
    for value, place in [
        ({"a": [CYCLE]}, "data.a[0].next[0]"),
        ({"f": Failing(a=1)}, "data.f"),
        (Point(1, {"p": CYCLE}), "data.y.p.next[0]"),
    ]:
        with pytest.raises(EncodingFailed) as caught:
            redact(value, frozenset({"password"}))
        assert caught.value.path == place


def test_values_that_can_be_read_once_are_not_used_up_by_a_refusal() -> None:
    once = Used()
    with pytest.raises(EncodingFailed):
        encode_json({"a": once})
    assert not once.is_used


def test_the_same_part_twice_is_no_cycle() -> None:
    part = {1: "x"}
    assert orjson.loads(encode_json([part, part])) == [{"1": "x"}] * 2


@given(
    st.recursive(
        ODD,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_KEYS, inner, max_size=4),
        max_leaves=8,
    )
)
def test_encoding_succeeds_or_names_a_place(value: Any) -> None:
    failed = None
    try:
        decoded = orjson.loads(encode_json(value))
    except EncodingFailed as error:
        failed = error
    if failed is not None:
        assert failed.path.startswith("data")
        str(failed).encode()
    elif isinstance(value, dict | list):
        assert len(decoded) == len(value)


# --- Events ---


def test_answer_with_numbers_lists_and_times_arrives_as_it_is() -> None:
    began = datetime.datetime(2026, 11, 22, 14, 0, 0, 123_456, tzinfo=datetime.UTC)
    result = {
        "summary": "Umsätze 📈",
        "confidence": 0.925,
        "totals": [1, -2, 3.5, 2**53 + 1, 1e-12],
        "sections": [{"title": "A", "at": began, "rows": [[1, 2], [3, None]]}, {}],
        "none": None,
        "is_final": True,
    }
    data = validate_data(EventType.AGENT_COMPLETED, {"result": result, "duration_ms": 5})
    decoded = orjson.loads(ENVELOPE.encode(EventType.AGENT_COMPLETED, 0, data))["data"]["result"]
    assert decoded.pop("sections") == [
        {"title": "A", "at": "2026-11-22T14:00:00.123456Z", "rows": [[1, 2], [3, None]]},
        {},
    ]
    assert decoded == {name: value for name, value in result.items() if name != "sections"}
    assert datetime.datetime.fromisoformat("2026-11-22T14:00:00.123456Z") == began


def test_report_of_25_sections_is_complete() -> None:
    sections = [
        {"section": n, "rows": [[n * row + column for column in range(100)] for row in range(50)]}
        for n in range(25)
    ]
    data = {"result": {"sections": sections}, "duration_ms": 1}
    event = ENVELOPE.encode(EventType.AGENT_COMPLETED, 0, redact(data, frozenset({"token"})))
    assert orjson.loads(event)["data"] == data


def test_ten_mebibytes_are_checked_and_encoded_within_a_second() -> None:
    # Deadline generous on purpose; benchmarks/ has the figures.
    row = {"title": "section", "rows": [list(range(100)) for _ in range(20)], "note": "x" * 400}
    data = {"result": [row] * 1_700, "duration_ms": 1}
    began_s = time.process_time()
    checked = redact(validate_data(EventType.AGENT_COMPLETED, data), frozenset({"password"}))
    event = ENVELOPE.encode(EventType.AGENT_COMPLETED, 0, checked)
    took_s = time.process_time() - began_s
    assert len(event) > 10 * 1024 * 1024
    assert took_s < 1


CHAT_PAGE = {
    EventType.AGENT_STARTED: {"model": "m", "context": {"thread": 1}},
    EventType.AGENT_THINKING: {"thought": "Looking", "step": 1, "total_steps": 3},
    EventType.TOOL_EXECUTING: {
        "tool_call_id": "c",
        "tool_name": "search",
        "purpose": "to find it",
        "parameters": {"query": "x"},
    },
    EventType.TOOL_COMPLETED: {
        "tool_call_id": "c",
        "tool_name": "search",
        "status": "ok",
        "result": [1],
        "duration_ms": 12,
    },
    EventType.AGENT_COMPLETED: {"result": "Done.", "summary": "s", "duration_ms": 99},
}


@pytest.mark.parametrize(("event_type", "data"), CHAT_PAGE.items())
def test_event_has_what_a_chat_page_needs(event_type: EventType, data: dict[str, Any]) -> None:
    valid = validate_data(event_type, data)
    event = orjson.loads(ENVELOPE.encode(event_type, 1_700_000_000_123, valid))
    assert event == {
        "type": event_type.value,
        "run_id": "run_1",
        "attempt": 2,
        "thread_id": "t",
        "user_id": "alice",
        "agent": "docs",
        "timestamp": "2023-11-14T22:13:20.123Z",
        "data": data,
    }


# --- Redaction ---

SECRETS = frozenset({"token", "api_key"})


class Credentials(pydantic.BaseModel):
    api_key: str
    user: str = "bob"


def test_only_exact_names_are_redacted() -> None:
    value = {"token": "x", "Token": 1, "token_count": 3, "list": [{"API_KEY": None}, ("a",)]}
    assert redact(value, SECRETS) == {
        "token": "[redacted]",
        "Token": "[redacted]",
        "token_count": 3,
        "list": [{"API_KEY": "[redacted]"}, ("a",)],
    }


@pytest.mark.parametrize(
    "value",
    [
        Credentials(api_key="S3cret"),
        Slotted("S3cret"),
        {"deep": [{"more": (Credentials(api_key="S3cret"),)}]},
        {Slotted("S3cret")},
        Lazy(token="S3cret"),
        collections.deque([{"token": b"S3cret"}]),
        {enum.Enum("Key", {"TOKEN": "token"}).TOKEN: "S3cret"},  # type: ignore[attr-defined]
        Pair(1, {"api_key": {"inner": "S3cret"}}),
        Point(1, Credentials(api_key="S3cret")),
    ],
)
def test_secrets_are_found_in_every_form_that_has_names(value: object) -> None:
    encoded = encode_json(redact({"parameters": value}, SECRETS))
    assert b"[redacted]" in encoded
    assert b"S3cret" not in encoded
    assert b"UzNjcmV0" not in encoded


@given(VALUES)
def test_without_secrets_the_same_object_comes_back(value: Any) -> None:
    assert redact(value, frozenset()) is value


@given(st.integers(0, 2_000))
def test_depth_never_lets_a_secret_through(levels: int) -> None:
    value = nested(levels, {"token": "S3cret"})
    with contextlib.suppress(EncodingFailed):
        assert b"S3cret" not in encode_json(redact(value, SECRETS))
