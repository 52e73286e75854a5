"""Reading a channel's history: the read script's answers as pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relay.codec import Position, Publication, RunEnvelope
from relay.errors import DecodingFailed
from relay.events import EventType, Kind
from relay.keys import Keys
from relay.recovery import FetchBody, LargeText, Page, Read, TextMark
from relay.run_model import summary_from_row
from relay.scripts import RedisLink, ScriptCall

PAGE_BYTES = 256 * 1024

_EVENT = int(Kind.EVENT)
_TEXT_END = b'"}}'
"""What stands behind the text in a ``text_delta`` event."""


def read_call(link: RedisLink, keys: Keys, user_id: str, read: Read) -> ScriptCall:
    """Prepare the script call of a read."""
    known: list[str | int] = []
    for name, mark in read.known.items():
        known += (name, mark.size_bytes)
    with_runs = "runs" if read.with_runs else ""
    user = keys.user(user_id)
    return link.call("read", user, None, read.after, PAGE_BYTES, with_runs, read.epoch, *known)


def page_from(user_id: str, read: Read, reply: Sequence[Any]) -> Page:
    """Understand the script's answer.

    Raises:
        DecodingFailed: Redis holds something else than it should.
    """
    try:
        epoch, offset, floor, previous, covered, entries, texts, runs = reply
        publications = [
            Publication(int(at), int(seq), _EVENT, run_id.decode(), event, int(size))
            for at, seq, run_id, event, size in entries
        ]
        marks: dict[int, TextMark] = {}
        for text in texts:
            publication, mark = _text(user_id, text, read.known)
            publications.append(publication)
            marks[publication.offset] = mark
        if texts:
            publications.sort(key=lambda publication: publication.offset)
        return Page(
            epoch=epoch.decode("ascii"),
            offset=int(offset),
            floor=int(floor),
            previous=_previous(previous.decode("ascii")),
            covered=int(covered),
            publications=publications,
            marks=marks,
            runs=[summary_from_row(row) for row in runs],
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise DecodingFailed(f"the history of a channel cannot be read: {error}") from error


def _text(
    user_id: str, entry: Sequence[bytes], known: Mapping[str, TextMark]
) -> tuple[Publication, TextMark]:
    last, raw_name, before, raw_text, agent, thread, updated_ms, size = entry
    name, text = raw_name.decode(), raw_text.decode()
    run_id, attempt, message_id = name.split(":", 2)
    start = known[name] if int(before) else TextMark(name, 0, 0)
    envelope = RunEnvelope(run_id, int(attempt), thread.decode(), user_id, agent.decode())
    data = {"message_id": message_id, "position": start.chars, "text": text}
    event = envelope.encode(EventType.TEXT_DELTA, int(updated_ms), data)
    size_bytes = int(size)
    mark = TextMark(name, start.size_bytes + size_bytes, start.chars + len(text))
    if len(raw_text) == size_bytes:
        return Publication(int(last), 0, Kind.TEXT, run_id, event), mark
    large = LargeText(
        int(last),
        run_id,
        name,
        start=start,
        size_bytes=size_bytes,
        opening=event[: -len(_TEXT_END)],
        closing=_TEXT_END,
    )
    return large, mark


def _previous(text: str) -> list[Position]:
    positions = []
    for entry in text.split():
        epoch, _, offset = entry.partition(":")
        positions.append(Position(epoch, int(offset)))
    return positions


def fetch_call(link: RedisLink, keys: Keys, user_id: str, fetch: FetchBody) -> ScriptCall:
    """Prepare the script call for a piece of a large event or text."""
    name = f"text:{fetch.text}" if fetch.text else f"body:{fetch.offset}"
    asked = (fetch.epoch, name, fetch.size_bytes, fetch.start, fetch.length)
    return link.call("piece", keys.user(user_id), None, *asked)
