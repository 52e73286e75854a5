"""Carries out the reads that feeds and cursors ask for: pipelined, shared, until Redis answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, cast

import structlog

from gateway.background import Background
from gateway.complaints import Complaints
from gateway.outage import Outage
from gateway.refusals import unreadable
from gateway.user_feed import ClientSink, UserFeed
from relay.errors import DecodingFailed, RedisMisconfigured, RedisUnavailable
from relay.history import fetch_call, page_from, read_call
from relay.keys import Keys
from relay.recovery import Cursor, FetchBody, Read, Request, RequestQueue, Rotate, SharedRequest
from relay.script_line import ScriptLine
from relay.scripts import KeyTaken, RedisLink, ScriptCall, ScriptFailed

READS_PER_PIPELINE = 64
PIPELINES = 4

TURN_S = 0.002
"""Answers are used for this long before the loop turns to others."""

MOST_FAILURES = 3
"""A client is told when what it waits for could not be read so often in a row."""

_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0

log = structlog.stdlib.get_logger(__name__)


class HistoryReader:
    """Reads history for all feeds of a node.

    Args:
        link: Redis.
        keys: Key names.
        background: Where the reads run.
        outage: Learns whether Redis answers.
        is_subscribed: Whether what is published arrives.
        subscribe: Asks for a feed's channel again; its confirmation lets the feed go on.
        perform: Carries out what a feed asks for after an answer.

    Attributes:
        catch_ups: How many answers went to connections.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        background: Background,
        outage: Outage,
        *,
        is_subscribed: Callable[[], bool],
        subscribe: Callable[[UserFeed], None],
        perform: Callable[[UserFeed], None],
    ) -> None:
        self.catch_ups = 0
        self._link = link
        self._line = ScriptLine(link)
        self._keys = keys
        self._background = background
        self._outage = outage
        self._is_subscribed = is_subscribed
        self._subscribe = subscribe
        self._perform = perform
        self._requests: RequestQueue[UserFeed] = RequestQueue()
        self._wake = asyncio.Event()
        self._pipelines = asyncio.Semaphore(PIPELINES)
        self._complaints = Complaints()
        # How often in a row a request has failed, for those that did.
        self._failures: dict[Request, int] = {}

    @property
    def waiting(self) -> int:
        """How many requests have not been sent yet."""
        return len(self._requests)

    def ask(self, feed: UserFeed, request: Request) -> None:
        """Have a request carried out; the answer goes to whoever made it."""
        self._requests.add(feed, request)
        self._wake.set()

    async def run(self) -> None:
        """Send what is asked for, until cancelled."""
        while True:
            await self._wake.wait()
            # One turn of the loop gathers what a reconnect of all feeds asks for.
            await asyncio.sleep(0)
            self._wake.clear()
            while self._requests:
                await self._pipelines.acquire()
                requests = self._requests.take(READS_PER_PIPELINE)
                self._background.spawn(self._carry_out(requests), "history-read")

    async def _carry_out(self, requests: Sequence[SharedRequest[UserFeed]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            # Whoever left meanwhile, as many do in a storm, needs no answer.
            self._forget_failures([shared for shared in requests if not shared.is_awaited])
            requests = [shared for shared in requests if shared.is_awaited]
            if not requests:
                return
            try:
                calls = [self._call(shared.owner, shared.first) for shared in requests]
                replies = await self._persist(lambda: self._line.run_each(calls))
            except Exception:
                log.exception("history not read", users=len(requests))
                for shared in requests:
                    self._retry_later(shared)
                return
            turn_s = loop.time()
            for shared, reply in zip(requests, replies, strict=True):
                for request, answer in self._answers(shared, reply):
                    self._answer(shared.owner, request, answer)
                    self._perform(shared.owner)
                    if loop.time() - turn_s > TURN_S:
                        await asyncio.sleep(0)
                        turn_s = loop.time()
        finally:
            self._pipelines.release()

    def _call(self, feed: UserFeed, request: Request) -> ScriptCall:
        if isinstance(request, Read):
            return read_call(self._link, self._keys, feed.user_id, request)
        if isinstance(request, FetchBody):
            return fetch_call(self._link, self._keys, feed.user_id, request)
        return self._link.call("rotate", self._keys.user(feed.user_id), None, request.epoch)

    def _answers(
        self, shared: SharedRequest[UserFeed], reply: Any
    ) -> Sequence[tuple[Request, Any]]:
        """Give who gets what. What is wrong with one user's data holds up nobody else."""
        feed, first = shared.owner, shared.first
        try:
            answer = self._understand(feed, first, reply)
        except Exception as error:  # noqa: BLE001 -- also a defect is this user's trouble alone
            self._fail(shared, error)
            return []
        self._forget_failures([shared])
        if isinstance(first, Rotate):
            log.warning("history contradicts itself: new epoch", user_id=feed.user_id)
        return [(request, answer) for request in shared.waiting]

    def _understand(self, feed: UserFeed, request: Request, reply: Any) -> Any:
        if isinstance(reply, ScriptFailed):
            raise reply
        return page_from(feed.user_id, request, reply) if isinstance(request, Read) else reply

    def _fail(self, shared: SharedRequest[UserFeed], error: Exception) -> None:
        """Read again later; whoever has waited in vain is told, and may come back."""
        feed = shared.owner
        if self._complaints.is_due(feed.user_id, asyncio.get_running_loop().time()):
            is_known = isinstance(error, DecodingFailed | ScriptFailed)
            log.error(
                "history not understood",
                user_id=feed.user_id,
                error=str(error),
                exc_info=None if is_known else error,
            )
        for request in shared.waiting:
            failures = self._failures.get(request, 0) + 1
            self._failures[request] = failures
            # What stands at a key stays there until somebody does something about it.
            is_hopeless = isinstance(error, KeyTaken) or failures >= MOST_FAILURES
            if is_hopeless and request.is_awaited:
                self._send_away(feed, request)
        self._retry_later(shared)

    def _forget_failures(self, answered: Sequence[SharedRequest[UserFeed]]) -> None:
        if self._failures:
            for shared in answered:
                for request in shared.waiting:
                    self._failures.pop(request, None)

    def _send_away(self, feed: UserFeed, request: Request) -> None:
        for cursor in _cursors_of(feed, request):
            try:
                cast("ClientSink", cursor.sink).refuse(unreadable())
            except Exception as error:  # noqa: BLE001 -- one broken connection, not all
                feed.give_up(cursor, error)
        self._perform(feed)

    def _answer(self, feed: UserFeed, request: Request, answer: Any) -> None:
        cursor = request.cursor if isinstance(request, FetchBody) else None
        try:
            if isinstance(request, Rotate):
                feed.receive_rotated(request)
            elif isinstance(request, FetchBody):
                request.cursor.receive_body(request, answer)
            else:
                if isinstance(request.requester, Cursor):
                    cursor = request.requester
                    self.catch_ups += 1
                request.requester.receive_page(request, answer)
        except Exception as error:
            if isinstance(cursor, Cursor):
                feed.give_up(cursor, error)
            else:
                log.exception("feed failed", user_id=feed.user_id)
                self._background.later(_RETRY_MOST_S, partial(self._begin_anew, feed))

    def _begin_anew(self, feed: UserFeed) -> None:
        # Whether the channel is subscribed at this moment only its confirmation can say.
        feed.lose()
        self._subscribe(feed)

    def _retry_later(self, shared: SharedRequest[UserFeed]) -> None:
        for request in shared.waiting:
            self._background.later(_RETRY_MOST_S, partial(self._try_again, shared.owner, request))

    def _try_again(self, feed: UserFeed, request: Request) -> None:
        """Ask once more, unless nobody waits for it by now."""
        if request.is_awaited:
            self.ask(feed, request)
        else:
            self._failures.pop(request, None)

    async def _persist(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Read until Redis answers: to the machine, a read may take long, but never fails."""
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                answer = await attempt()
            except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
                self._outage.begin(str(error))
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, _RETRY_MOST_S)
            else:
                if self._is_subscribed():
                    self._outage.end()
                return answer


def _cursors_of(feed: UserFeed, request: Request) -> Sequence[Cursor]:
    """Give the connections that wait for an answer: one, or all of the feed."""
    reader: object = None
    if isinstance(request, FetchBody):
        reader = request.cursor
    elif isinstance(request, Read):
        reader = request.requester
    return (reader,) if isinstance(reader, Cursor) else feed.cursors
