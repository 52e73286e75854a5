"""What encoding a large result costs: the check of its fields, redaction, JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.figures import Check, Section, Table
from benchmarks.stage import Plan
from relay.codec import RunEnvelope
from relay.encoding import SECRET_NAMES, redact
from relay.events import EventType, validate_data

NAME = "encoding"

_MIB = 1024 * 1024
_METHOD = """\
One `agent_completed` of 10 MiB from the agent's value to the stored bytes: the check of its fields,
the search for secrets, and JSON; and the standard library's `json.dumps` of the same value, which
does none of the others. Single-threaded, medians of {rounds} interleaved rounds."""


@dataclasses.dataclass
class _Row:
    name: str
    values: list[int]
    at: datetime.datetime


def _numbers() -> Any:
    return [{"title": "section", "rows": [list(range(100))] * 20, "note": "x" * 400}] * 1_700


def _text() -> Any:
    return "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 154_000


def _objects() -> Any:
    now = datetime.datetime(2026, 11, 22, 14, tzinfo=datetime.UTC)
    return [_Row(f"row {number}", list(range(40)), now) for number in range(65_000)]


def measure(plan: Plan) -> Section:
    rounds = plan.size(5, 1)
    checks = []
    table = Table(("result", "MiB", "ms", "ms `json.dumps`", "ratio"))
    for name, make in (
        ("numbers in nested lists", _numbers),
        ("one text", _text),
        ("dataclasses with times", _objects),
    ):
        value = make()
        ours, theirs, size = [], [], 0
        for _ in range(rounds):
            took_s, event = _timed(lambda value=value: _encode(value))
            size = len(event)
            ours.append(took_s)
            theirs.append(_timed(lambda value=value: json.dumps(value, default=_plain))[0])
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        table.rows.append(
            [
                name,
                f"{size / _MIB:.1f}",
                f"{median(ours) * 1000:.0f}",
                f"{median(theirs) * 1000:.0f}",
                f"{ratio:.2f}",
            ]
        )
        checks.append(Check(f"10 MiB, {name}", median(ours), 1.0, "s"))
    method = _METHOD.format(rounds=rounds)
    return Section(NAME, "Encoding large results", method, [table], checks)


def _encode(value: Any) -> bytes:
    data = validate_data(EventType.AGENT_COMPLETED, {"result": value, "duration_ms": 1})
    envelope = RunEnvelope("run_1", 1, "t", "alice", "docs")
    return envelope.encode(EventType.AGENT_COMPLETED, 0, redact(data, SECRET_NAMES))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return dataclasses.asdict(value)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began_s = time.perf_counter()
    result = work()
    return time.perf_counter() - began_s, result
