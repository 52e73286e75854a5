"""Every stream that a test recorded, held against the grammar of runs at the test's end.

Clients of tests hand in what they receive by ``record``. Where somebody watches, as the fixture
``relay_streams`` does, all of it is checked by one checker, whatever the test itself looks at:
legal events only, each once, in order, ``seq`` without a hole, and nobody else's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from relay.testing.sequence import Problem, SequenceChecker


@dataclass(frozen=True, slots=True)
class RecordedStream:
    """What one client received.

    Attributes:
        name: Names the client in failures.
        user_id: Whose token it had; None for whom the gateway says it is.
        frames: Gives its frames, in the order of arrival.
    """

    name: str
    user_id: str | None
    frames: Callable[[], Iterable[Mapping[str, Any]]]


class StreamWatch:
    """Keeps the streams of one test."""

    def __init__(self) -> None:
        self.streams: list[RecordedStream] = []

    def problems(self) -> list[Problem]:
        """Name everything that is wrong with what was recorded."""
        checker = SequenceChecker(holds_texts=False)
        for number, stream in enumerate(self.streams):
            # The same name may be there twice: a tab of its own for each connection.
            name = f"{stream.name} ({number})"
            frames = list(stream.frames())
            user_id = stream.user_id if stream.user_id is not None else _established_user(frames)
            if user_id is None:
                continue  # It was never let in.
            checker.client(name, user_id, sees_all=False)
            for frame in frames:
                checker.received(name, user_id, frame)
        return checker.problems()

    def complaint(self) -> str:
        """Say everything that is wrong, with what led to it; nothing where all is well."""
        problems = self.problems()
        if not problems:
            return ""
        lines = "\n  ".join(str(problem) for problem in problems)
        return f"{len(problems)} broken promises in the streams of this test:\n  {lines}"


_watches: list[StreamWatch] = []


def _established_user(frames: Iterable[Mapping[str, Any]]) -> str | None:
    for frame in frames:
        if frame.get("type") == "connection_established":
            return str(frame["user_id"])
    return None


def record(
    name: str, user_id: str | None, frames: Callable[[], Iterable[Mapping[str, Any]]]
) -> None:
    """Hand in a stream; whoever began to watch last keeps it.

    Args:
        name: Names the client.
        user_id: Whose token it has; None for whom the gateway says it is.
        frames: Gives all frames so far; called when the test has ended.
    """
    if _watches:
        _watches[-1].streams.append(RecordedStream(name, user_id, frames))


@contextlib.contextmanager
def watching() -> Iterator[StreamWatch]:
    """Keep all streams that are recorded while the block runs. It checks nothing by itself."""
    watch = StreamWatch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)
