"""Holding what clients saw against what was published.

A checker is told what was published and is given every frame that every client received. It then
names each loss, duplicate, reordering, foreign event, hole in ``seq``, step against the grammar
and text that is not what was streamed, and shows the client's last frames with it.

    checker = SequenceChecker()
    checker.published("alice", run_id, "agent_started")
    checker.received("tab 1", "alice", frame)
    checker.verify()
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from relay.errors import GrammarViolation
from relay.events import EventType
from relay.grammar import RunGrammar

SHOWN_FRAMES = 12


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken promise.

    Attributes:
        kind: ``lost``, ``twice``, ``out_of_order``, ``foreign``, ``hole``, ``grammar``,
            ``text`` or ``protocol``.
        client: Who saw it.
        text: What happened, with the numbers.
        timeline: The client's frames that led to it, oldest first.
    """

    kind: str
    client: str
    text: str
    timeline: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "".join(f"\n      {line}" for line in self.timeline)
        return f"{self.kind}: {self.client}: {self.text}{shown}"


@dataclass
class _Run:
    """A run as one client knows it."""

    next_seq: int | None = None
    grammar: RunGrammar | None = None
    has_ended: bool = False
    result: Any = None
    attempt: int = 1
    texts: dict[tuple[int, str], dict[int, str]] = field(default_factory=dict)


class _Client:
    def __init__(self, name: str, user_id: str, *, sees_all: bool, holds_texts: bool) -> None:
        self.name = name
        self.holds_texts = holds_texts
        self.user_id = user_id
        self.sees_all = sees_all
        self.epoch: str | None = None
        self.offset = 0
        self.offsets: set[int] = set()
        self.runs: dict[str, _Run] = {}
        self.lifecycle: Counter[tuple[str, str, str]] = Counter()
        self.parts: dict[int, list[str]] = {}
        self.recent: deque[str] = deque(maxlen=SHOWN_FRAMES)
        self.problems: list[Problem] = []

    def complain(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, self.name, text, tuple(self.recent)))

    def receive(self, frame: Mapping[str, Any]) -> None:
        self.recent.append(_describe(frame))
        kind = frame.get("type")
        if kind == "connection_established":
            self._establish(frame)
        elif kind in ("heartbeat", "pong"):
            self._move(frame["position"])
        elif kind == "reset":
            self.forget()
            self._rebase(frame["position"])
        elif kind == "event_part":
            self._receive_part(frame)
        elif "offset" in frame:
            self._receive_event(frame)

    def forget(self) -> None:
        self.sees_all = False
        self.runs.clear()
        self.lifecycle.clear()

    def _rebase(self, position: str) -> None:
        epoch, _, offset = position.rpartition(":")
        self.epoch, self.offset = epoch, int(offset)
        self.offsets.clear()
        self.parts.clear()

    def _establish(self, frame: Mapping[str, Any]) -> None:
        self.parts.clear()
        if frame["user_id"] != self.user_id:
            self.complain("foreign", f"the connection is {frame['user_id']!r}'s")
        if self.epoch is None or not frame["recovered"]:
            # Not recovered: the reset follows.
            self._rebase(frame["position"])
        else:
            self._move(frame["position"])

    def _move(self, position: str) -> None:
        epoch, _, offset = position.rpartition(":")
        if epoch != self.epoch:
            # Another history: the same numbers name other events from here on.
            self.offsets = {known for known in self.offsets if known <= int(offset)}
        elif int(offset) < self.offset:
            self.complain("protocol", f"position {position} lies before {self.offset}")
            return
        self.epoch, self.offset = epoch, int(offset)

    def _receive_part(self, frame: Mapping[str, Any]) -> None:
        offset, index = frame["offset"], frame["index"]
        parts = self.parts.setdefault(offset, [])
        if index == 0:
            parts.clear()
        if index != len(parts):
            self.complain("protocol", f"part {index} of event {offset} after {len(parts)} parts")
            return
        parts.append(frame["text"])
        if len(parts) == frame["total"]:
            del self.parts[offset]
            self._receive_event(orjson.loads("".join(parts)))

    def _receive_event(self, event: Mapping[str, Any]) -> None:
        offset, kind = event["offset"], event["type"]
        if event.get("user_id", self.user_id) != self.user_id:
            self.complain("foreign", f"{kind} at {offset} belongs to {event['user_id']!r}")
            return
        if offset in self.offsets:
            self.complain("twice", f"{kind} at {offset}")
            return
        if offset <= self.offset:
            self.complain("out_of_order", f"{kind} at {offset} after {self.offset}")
        self.offset = max(self.offset, offset)
        self.offsets.add(offset)
        run_id = event.get("run_id")
        if run_id is None:
            return
        run = self.runs.setdefault(run_id, _Run())
        if "seq" in event:
            self._check_seq(run, event)
            self.lifecycle[run_id, kind, _canonical(event["data"])] += 1
        self._check_grammar(run, event)
        if kind == EventType.TEXT_DELTA:
            if self.holds_texts:
                self._place_text(run, event)
        elif kind in (EventType.AGENT_STARTED, EventType.AGENT_RETRYING):
            run.attempt = event["attempt"]

    def _check_seq(self, run: _Run, event: Mapping[str, Any]) -> None:
        seq = event["seq"]
        if run.next_seq is None:
            if self.sees_all and seq != 1:
                self.complain("hole", f"run {event['run_id']} begins with seq {seq}")
        elif seq != run.next_seq:
            self.complain(
                "hole", f"run {event['run_id']} goes on with seq {seq} instead of {run.next_seq}"
            )
        run.next_seq = seq + 1

    def _check_grammar(self, run: _Run, event: Mapping[str, Any]) -> None:
        if event["type"] not in iter(EventType):
            return  # Of a newer worker: the grammar says nothing about it (ADR 0010).
        kind = EventType(event["type"])
        if run.has_ended:
            self.complain("grammar", f"{kind} after the end of run {event['run_id']}")
        if kind.is_terminal:
            run.has_ended = True
            run.result = event["data"].get("result")
        if run.grammar is None:
            if event.get("seq") != 1:
                return  # Joined in the middle: what is open is not known.
            run.grammar = RunGrammar()
        try:
            run.grammar.apply(kind, event["data"])
        except GrammarViolation as violation:
            self.complain("grammar", f"run {event['run_id']}: {violation}")
            run.grammar = None

    def _place_text(self, run: _Run, event: Mapping[str, Any]) -> None:
        data = event["data"]
        text = run.texts.setdefault((event["attempt"], data["message_id"]), {})
        for index, char in enumerate(data["text"], data["position"]):
            if text.setdefault(index, char) != char:
                self.complain("text", f"{data['message_id']} changes at {index}")
                return

    def text(self, run_id: str, attempt: int) -> str | None:
        """Give an attempt's text over all its messages; None where it has a hole."""
        joined = []
        for (number, _), chars in self.runs[run_id].texts.items():
            if number == attempt:
                if sorted(chars) != list(range(len(chars))):
                    return None
                joined.append("".join(chars[index] for index in range(len(chars))))
        return "".join(joined)


class SequenceChecker:
    """Accounts for every event of every user and client. Not tied to any test framework.

    Args:
        holds_texts: Whether streamed text is put together, which costs time with long texts.
    """

    def __init__(self, *, holds_texts: bool = True) -> None:
        self._holds_texts = holds_texts
        self._clients: dict[str, _Client] = {}
        self._published: dict[str, Counter[tuple[str, str, str]]] = {}
        self._owner: dict[str, str] = {}
        self._texts: dict[tuple[str, int], list[str]] = {}

    def published(
        self, user_id: str, run_id: str, event_type: str, data: Mapping[str, Any] | None = None
    ) -> None:
        """Note a lifecycle event that Redis has acknowledged.

        Args:
            user_id: Whose event it is.
            run_id: Its run.
            event_type: One of the lifecycle types.
            data: Its data, as published.
        """
        self._owner[run_id] = user_id
        ledger = self._published.setdefault(user_id, Counter())
        ledger[run_id, str(event_type), _canonical(_without_none(data or {}))] += 1

    def streamed(self, user_id: str, run_id: str, text: str, attempt: int = 1) -> None:
        """Note a piece of text that was streamed, in order."""
        self._owner[run_id] = user_id
        self._texts.setdefault((run_id, attempt), []).append(text)

    def client(self, name: str, user_id: str, *, sees_all: bool = True) -> None:
        """Announce a client.

        Args:
            name: Names it in problems; one page or one device, over all its connections.
            user_id: Whose token it has.
            sees_all: Whether it is there from the beginning. Otherwise what it has missed before
                its first event of a run counts for nothing.
        """
        self._clients[name] = _Client(
            name, user_id, sees_all=sees_all, holds_texts=self._holds_texts
        )

    def reloaded(self, name: str) -> None:
        """Note that a client dropped all that it knew, as a reloaded page does."""
        client = self._clients[name]
        client.forget()
        client.epoch = None
        client.offsets.clear()
        client.recent.append("-- reloaded --")

    def received(self, name: str, user_id: str, frame: Mapping[str, Any] | str | bytes) -> None:
        """Take a frame of any kind that a client received, in the order of arrival."""
        if name not in self._clients:
            self.client(name, user_id)
        decoded = orjson.loads(frame) if isinstance(frame, str | bytes) else frame
        self._clients[name].receive(decoded)

    def problems(self) -> list[Problem]:
        """Name everything that is wrong by now. What is still on its way counts as lost."""
        return [
            problem
            for client in self._clients.values()
            for problem in (*client.problems, *self._missing(client), *self._wrong_texts(client))
        ]

    def verify(self) -> None:
        """Make sure that nothing is wrong.

        Raises:
            AssertionError: Something is; the text names it all.
        """
        problems = self.problems()
        if problems:
            lines = "\n  ".join(str(problem) for problem in problems)
            raise AssertionError(f"{len(problems)} broken promises:\n  {lines}")

    def _missing(self, client: _Client) -> Sequence[Problem]:
        found: list[Problem] = []
        for run_id in client.runs:
            owner = self._owner.get(run_id, client.user_id)
            if owner != client.user_id:
                found.append(Problem("foreign", client.name, f"run {run_id} belongs to {owner!r}"))
        ledger = self._published.get(client.user_id, Counter())
        for key, count in ledger.items():
            run_id, kind, data = key
            run = client.runs.get(run_id)
            seen = client.lifecycle[key]
            text = f"{kind} of run {run_id}: published {count}, seen {seen}: {data[:200]}"
            if seen > count:
                found.append(Problem("twice", client.name, text, tuple(client.recent)))
            elif seen < count and (client.sees_all or _must_have(run, kind)):
                found.append(Problem("lost", client.name, text, tuple(client.recent)))
        return found

    def _wrong_texts(self, client: _Client) -> Sequence[Problem]:
        found: list[Problem] = []
        for (run_id, attempt), pieces in self._texts.items():
            run = client.runs.get(run_id)
            if run is None or run.attempt != attempt or self._owner[run_id] != client.user_id:
                continue
            if isinstance(run.result, str) and run.result == "".join(pieces):
                continue  # The result carries the whole text: whoever has it lacks nothing.
            text = client.text(run_id, attempt)
            if text != "".join(pieces) and (client.sees_all or run.grammar is not None):
                shown = "a text with a hole" if text is None else f"{len(text)} characters"
                wanted = f"{len(''.join(pieces))} characters were streamed"
                found.append(
                    Problem(
                        "text",
                        client.name,
                        f"run {run_id}: {shown}, {wanted}",
                        tuple(client.recent),
                    )
                )
        return found


def _must_have(run: _Run | None, kind: str) -> bool:
    """Whether a client that joined later must have seen an event: a run's end, of those it saw."""
    return run is not None and EventType(kind).is_terminal


def _canonical(data: Mapping[str, Any]) -> str:
    return orjson.dumps(data, option=orjson.OPT_SORT_KEYS).decode()


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in data.items()
        if value is not None or name in ("result", "value", "parameters")
    }


def _describe(frame: Mapping[str, Any]) -> str:
    names = ("position", "offset", "seq", "run_id", "attempt", "index", "total", "reason")
    fields = " ".join(f"{name}={frame[name]}" for name in names if name in frame)
    return f"{frame.get('type')} {fields}"
