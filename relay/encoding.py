"""The JSON form of whatever an agent's author hands over, and what is kept out of it.

``docs/agents.md`` has the table of forms. A value without one is refused with its place; nothing
is shortened, rounded or left out on the way.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import orjson
from pydantic import BaseModel

from relay.errors import EncodingFailed

MAX_DEPTH = 254
"""Levels of nesting that the encoder takes."""

SECRET_NAMES = frozenset(
    {
        "access_token",
        "api_key",
        "apikey",
        "authorization",
        "client_secret",
        "cookie",
        "id_token",
        "passwd",
        "password",
        "private_key",
        "refresh_token",
        "secret",
        "token",
    }
)
"""Keys whose values no event carries."""

SHOWN_KEY_CHARS = 64

_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC
_OTHER_KEYS = _OPTIONS | orjson.OPT_NON_STR_KEYS
_SMALLEST_INT, _LARGEST_INT = -(2**63), 2**64 - 1
_PLAIN = frozenset({str, int, float, bool, type(None)})


def encode_json(value: Any, path: str = "data") -> bytes:
    """Give a value's JSON form as UTF-8.

    Beyond JSON's own types: dates and times as ISO 8601 (a time without a zone counts as UTC,
    UTC is written ``Z``), enums as their value, UUIDs as text, Decimals as text (no digit is
    lost), bytes as base64, tuples, deques and sets as lists (sets sorted), dataclasses, pydantic
    models and other mappings as objects, NaN and infinities as null.

    Args:
        value: What to encode.
        path: Name of the value in error texts.

    Raises:
        EncodingFailed: A part has no JSON form; the error names where it is.
    """
    try:
        return orjson.dumps(value, _convert, _OPTIONS)
    except (TypeError, ValueError, RecursionError) as error:
        # The encoder does not say where it failed, and would write two keys that have the same
        # text both; the slow walk is worth its time only now.
        _check(value, path)
        reason = error
    try:
        return orjson.dumps(value, _convert, _OTHER_KEYS)
    except (TypeError, ValueError, RecursionError):
        raise EncodingFailed(path, str(reason)) from None


def _convert(value: Any) -> Any:
    """Give the next simpler form of what the encoder does not know.

    Raises:
        TypeError: There is none.
    """
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, tuple | deque):
        return list(value)
    if isinstance(value, set | frozenset):
        return _sorted(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    # Whatever else can be iterated over may never end, or be used up by it.
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _sorted(values: Iterable[Any]) -> list[Any]:
    items = list(values)
    try:
        return sorted(items)
    except TypeError:
        return sorted(items, key=repr)


def _check(value: Any, path: str) -> None:
    """Find what has no JSON form.

    Raises:
        EncodingFailed: The first such part, with its place.
    """
    # Not recursive: the value may be nested deeper than Python's stack reaches.
    names = [path]
    ancestors: list[int] = [id(value)]
    levels: list[Iterator[tuple[str, Any]]] = [_children(value, path)]
    while levels:
        found = next(levels[-1], None)
        if found is None:
            levels.pop()
            ancestors.pop()
            names.pop()
            continue
        name, item = found
        if type(item) in _PLAIN and type(item) not in (str, int):
            continue
        place = names[-1] + name
        if id(item) in ancestors:
            raise EncodingFailed(place, "the value contains itself")
        if len(levels) > MAX_DEPTH:
            raise EncodingFailed(_shorten(place), f"nested deeper than {MAX_DEPTH} levels")
        names.append(place)
        ancestors.append(id(item))
        levels.append(_children(item, place))


def _shorten(place: str) -> str:
    return place if len(place) <= 200 else f"{place[:100]}…{place[-60:]}"


def _children(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Check one value without its parts, and give these with their names.

    Raises:
        EncodingFailed: It has no JSON form, whatever its parts are.
    """
    if isinstance(value, enum.Enum):
        yield ".value", value.value
    elif isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, int):
        if not _SMALLEST_INT <= value <= _LARGEST_INT:
            raise EncodingFailed(place, "the integer needs more than 64 bits; send it as text")
    elif isinstance(value, dict):
        yield from _items(value, place)
    elif isinstance(value, list) or type(value) is tuple:
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if not field.name.startswith("_"):
                yield f".{field.name}", getattr(value, field.name)
    else:
        converted = _simpler(value, place)
        if converted is not value:
            yield from _children(converted, place)


def _simpler(value: Any, place: str) -> Any:
    try:
        orjson.dumps(value, _shallow, _OTHER_KEYS)
    except (TypeError, ValueError) as error:
        # An exception of the value's own code is the cause of the encoder's.
        cause = error.__cause__ or error
        raise EncodingFailed(place, str(cause) or type(cause).__name__) from None
    try:
        return _convert(value)
    except TypeError:
        return value


def _shallow(value: Any) -> None:
    _convert(value)


def _items(value: dict[Any, Any], place: str) -> Iterator[tuple[str, Any]]:
    written: set[str] = set()
    has_other = not all(type(key) is str for key in value)
    for key, item in value.items():
        if type(key) is str:
            text = key
        else:
            try:
                text = next(iter(orjson.loads(orjson.dumps({key: None}, option=_OTHER_KEYS))))
            except (TypeError, ValueError) as error:
                kind = type(key).__name__
                raise EncodingFailed(place, f"a key of type {kind}: {error}") from None
        _check_text(text, place + _name_of(text))
        if has_other:
            if text in written:
                raise EncodingFailed(place + _name_of(text), "two keys have this text")
            written.add(text)
        yield _name_of(text), item


def _name_of(key: str) -> str:
    if key.isidentifier():
        return f".{key[:SHOWN_KEY_CHARS]}"
    return f"[{key[:SHOWN_KEY_CHARS]!a}]"


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EncodingFailed(place, "the text has a lone surrogate and no UTF-8 form") from None


def redact(value: Any, names: frozenset[str], path: str = "data") -> Any:
    """Replace the values of keys whose lower-case name is exactly one of ``names``.

    Never by substring: ``token_count`` is not a secret. Fields of dataclasses and pydantic models
    count as keys. Returns the same object where nothing had to be replaced.

    Raises:
        EncodingFailed: The value contains itself, or is nested too deeply to be looked through.
    """
    try:
        return _redact(value, names)
    except RecursionError:
        _check(value, path)
        raise EncodingFailed(path, "nested too deeply") from None
    except (TypeError, ValueError) as error:
        # A model or mapping that cannot give its parts.
        _check(value, path)
        raise EncodingFailed(path, str(error)) from None


def _redact(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, dict):
        changed = {}
        for key, item in value.items():
            new = item if type(item) in _PLAIN else _redact(item, names)
            text = key.value if isinstance(key, enum.Enum) else key
            if isinstance(text, str) and text.lower() in names:
                new = "[redacted]"
            if new is not item:
                changed[key] = new
        return {**value, **changed} if changed else value
    if isinstance(value, list | tuple | deque):
        if _PLAIN.issuperset(map(type, value)):
            # Long lists of numbers are what makes a large result.
            return value
        items = [item if type(item) in _PLAIN else _redact(item, names) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return items
        return value
    if type(value) in _PLAIN or isinstance(value, str | bytes | type):
        return value
    inner = _inner(value)
    if inner is None:
        return value
    changed_inner = _redact(inner, names)
    return value if changed_inner is inner else changed_inner


def _inner(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Give what a value consists of, where its parts could have names."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value):
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if not field.name.startswith("_")
        }
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return _sorted(value)
    return None
