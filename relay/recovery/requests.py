"""Which requests one answer of Redis serves.

Many tabs of one user, or all of them after a restart, ask the same at the same moment. What has not
been sent yet is asked once for all of them. A request under way is never joined: its answer may be
older than what the newcomer has seen already, on another gateway.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice
from typing import Generic, TypeVar

from relay.recovery.effects import Read, Request
from relay.recovery.pages import HEADER_ONLY

Owner = TypeVar("Owner", bound=Hashable)


class SharedRequest(Generic[Owner]):
    """A question to Redis about one channel, and all who wait for its answer.

    Attributes:
        owner: Whose channel it is.
        first: What is asked.
        waiting: Who gets the answer, in the order in which they asked.
    """

    __slots__ = ("first", "owner", "waiting")

    def __init__(self, owner: Owner, first: Request) -> None:
        self.owner = owner
        self.first = first
        self.waiting: list[Request] = [first]

    @property
    def is_awaited(self) -> bool:
        """Whether anybody would still use an answer."""
        return any(request.is_awaited for request in self.waiting)

    def take_over(self, other: SharedRequest[Owner]) -> None:
        """Answer also those who waited for less than this, before our own."""
        self.waiting[:0] = other.waiting


class RequestQueue(Generic[Owner]):
    """Requests that have not been sent yet, in order."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[tuple[Owner, Hashable], SharedRequest[Owner]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, owner: Owner, request: Request) -> None:
        """Put a request behind the others, or to one that asks the same."""
        question = request.question
        if question is None:
            self._waiting[owner, object()] = SharedRequest(owner, request)
            return
        known = self._waiting.get((owner, question))
        if known is not None:
            known.waiting.append(request)
            return
        shared = SharedRequest(owner, request)
        if isinstance(request, Read) and not request.is_header_only:
            self._absorb(shared, request)
        self._waiting[owner, question] = shared

    def _absorb(self, shared: SharedRequest[Owner], read: Read) -> None:
        # Any page has the channel's state in it. A feed's own read, without runs, goes first:
        # a cursor can use nothing before its feed has a history.
        for with_runs in (True, False) if read.with_runs else (False,):
            header = self._waiting.pop((shared.owner, (HEADER_ONLY, with_runs)), None)
            if header is not None:
                shared.take_over(header)

    def take(self, count: int) -> list[SharedRequest[Owner]]:
        """Give the first requests; from here on nobody can join them."""
        return [self._waiting.pop(key) for key in list(islice(self._waiting, count))]
