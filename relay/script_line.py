"""Script calls of many callers on one connection: written together, answered in their order.

A connection of the pool is one caller's while it waits, and taking it, waiting with a time limit
and giving it back costs more than the call. Here all calls of one turn of the event loop are one
write, whoever makes them, and the next ones do not wait for the answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from relay.errors import RedisMisconfigured, RedisUnavailable, RelayError
from relay.pipeline import Pipeline
from relay.resp import pack
from relay.scripts import RedisLink, Script, ScriptCall, ScriptFailed


class _Exchange:
    """Commands of one caller, and the answers so far."""

    __slots__ = ("calls", "future", "replies", "scripts", "sent_s")

    def __init__(
        self,
        scripts: Sequence[Script],
        calls: Sequence[ScriptCall],
        future: asyncio.Future[list[Any]],
    ) -> None:
        self.scripts = scripts
        self.calls = calls
        self.future = future
        self.replies: list[Any] = []
        self.sent_s = 0.0

    def answer(self, reply: Any) -> bool:
        """Take an answer; tells whether it was the last one."""
        self.replies.append(reply)
        if len(self.replies) < len(self.scripts) + len(self.calls):
            return False
        if not self.future.done():
            self.future.set_result(self.replies)
        return True

    def fail(self, error: Exception) -> None:
        """Tell the caller that there is no answer."""
        if not self.future.done():
            self.future.set_exception(error)


class ScriptLine:
    """One connection for script calls; made when it is needed, and closed with its link.

    A connection that breaks, or on which nothing is answered in time, fails all calls that are
    under way on it, as with ``RedisLink.run_each``; the next call makes another.

    Args:
        link: Which Redis.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._waiting: list[_Exchange] = []
        self._in_flight: deque[_Exchange] = deque()
        self._pipeline: Pipeline | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._is_closed = False
        self._answered_s = 0.0
        self._flush_handle: asyncio.Handle | None = None
        self._watch: asyncio.TimerHandle | None = None
        link.on_close.append(self.aclose)

    async def run_each(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Make script calls; one that fails does not hide the others' answers.

        Returns:
            For each call its answer, or the ``ScriptFailed`` that it ended with; ``KeyTaken``
            where a key holds something else.

        Raises:
            RedisUnavailable, RedisMisconfigured: No connection, no answer in time, "not now" from
                the server, or missing rights.
        """
        replies = await self._ask((), calls)
        missing = [index for index, reply in enumerate(replies) if _is_unknown_script(reply)]
        if missing:
            by_name = {calls[index].script.name: calls[index].script for index in missing}
            scripts = list(by_name.values())
            again = await self._ask(scripts, [calls[index] for index in missing])
            for script, reply in zip(scripts, again, strict=False):
                refused = self._outcome_of(script, reply)
                if isinstance(refused, ScriptFailed):
                    raise refused
            for index, reply in zip(missing, again[len(scripts) :], strict=True):
                replies[index] = reply
        for index, call in enumerate(calls):
            outcome = self._outcome_of(call.script, replies[index])
            if isinstance(outcome, ScriptFailed):
                outcome = await self._link.locate(call.keys, outcome)
            replies[index] = outcome
        return replies

    async def _ask(self, scripts: Sequence[Script], calls: Sequence[ScriptCall]) -> list[Any]:
        """Load scripts and make calls; gives what Redis answers, errors as exceptions."""
        if not calls:
            return []
        if self._is_closed:
            raise RedisUnavailable("Redis is not asked any more: its connections have been closed")
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Exchange(scripts, calls, future))
        self._flush_soon()
        return await future

    def _outcome_of(self, script: Script, reply: Any) -> Any:
        if not isinstance(reply, Exception):
            return reply
        try:
            return self._link.understood(script, reply)
        except (RedisUnavailable, RedisMisconfigured) as error:
            # What such a connection leads to may be another server by now, or a replica.
            self._give_up(error)
            raise

    # --- Out ---

    def _flush_soon(self) -> None:
        if self._flush_handle is None:
            self._flush_handle = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_handle = None
        pipeline = self._pipeline
        if pipeline is None:
            if self._waiting and self._keeper is None:
                self._keeper = asyncio.create_task(self._keep(), name="script-line")
            return
        if not pipeline.is_writable:
            return
        waiting, self._waiting = self._waiting, []
        chunks: list[bytes] = []
        loop = asyncio.get_running_loop()
        for exchange in waiting:
            # Whoever has been cancelled has not asked.
            if exchange.future.done():
                continue
            try:
                commands = [pack("SCRIPT", "LOAD", script.source) for script in exchange.scripts]
                commands += [
                    pack(*self._link.command(call, pipeline.instance)) for call in exchange.calls
                ]
            except Exception as error:  # noqa: BLE001 -- it is told to the caller
                failure = RuntimeError(f"a script call cannot be sent: {error}")
                failure.__cause__ = error
                exchange.fail(failure)
                continue
            chunks += commands
            exchange.sent_s = loop.time()
            self._in_flight.append(exchange)
        if chunks:
            pipeline.write(b"".join(chunks))
            if self._watch is None:
                self._watch = loop.call_later(self._link.timeout_s, self._look_for_answers)

    def _look_for_answers(self) -> None:
        """Give a connection up that answers nothing."""
        self._watch = None
        if not self._in_flight:
            return
        loop = asyncio.get_running_loop()
        since_s = max(self._in_flight[0].sent_s, self._answered_s)
        due_s = since_s + self._link.timeout_s
        if loop.time() < due_s:
            self._watch = loop.call_at(due_s, self._look_for_answers)
        else:
            text = f"Redis has not answered for {self._link.timeout_s:g} s"
            self._give_up(RedisUnavailable(text))

    # --- In ---

    def _receive(self, reply: Any) -> None:
        self._answered_s = asyncio.get_running_loop().time()
        if self._in_flight[0].answer(reply):
            self._in_flight.popleft()

    # --- The connection ---

    async def _keep(self) -> None:
        """Make the connection, and close it when it is lost."""
        self._lost.clear()
        pipeline = Pipeline(
            self._link,
            on_reply=self._receive,
            on_lost=self._connection_lost,
            on_writable=self._flush_soon,
        )
        try:
            await pipeline.connect()
            self._pipeline = pipeline
            self._flush()
            await self._lost.wait()
        except Exception as error:  # noqa: BLE001 -- it is told to each caller
            # They may try again; until then nobody needs a connection.
            self._fail([*self._in_flight, *self._waiting], error)
            self._waiting.clear()
        finally:
            self._forget()
            await pipeline.aclose()
            self._keeper = None
            if self._waiting and not self._is_closed:
                self._flush_soon()

    def _connection_lost(self, error: Exception | None) -> None:
        reason = str(error or "it closed the connection")
        self._give_up(RedisUnavailable(f"Redis does not answer: {reason}"))

    def _give_up(self, error: Exception) -> None:
        """Have another connection made for the calls to come; those under way fail."""
        self._fail(self._in_flight, error)
        self._forget()
        self._lost.set()

    def _forget(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        # What was noted as sent must not be paired with the next connection's answers.
        self._in_flight.clear()
        if pipeline is not None:
            pipeline.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _fail(self, exchanges: Sequence[_Exchange] | deque[_Exchange], error: Exception) -> None:
        for exchange in exchanges:
            # One exception object raised in many places would grow a traceback with each.
            if isinstance(error, RelayError):
                exchange.fail(type(error)(str(error)))
            else:
                failure = RuntimeError(f"script calls cannot be made: {error}")
                failure.__cause__ = error
                exchange.fail(failure)

    async def aclose(self) -> None:
        """Let what is under way be answered, at most in Redis' own time limit; then close."""
        self._is_closed = True
        futures = [exchange.future for exchange in (*self._in_flight, *self._waiting)]
        if futures:
            await asyncio.wait(futures)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])


def _is_unknown_script(reply: Any) -> bool:
    return isinstance(reply, Exception) and str(reply).startswith("NOSCRIPT")
