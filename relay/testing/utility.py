"""``WebSocketTestUtility``: one user's client, with what tests ask of it."""

from __future__ import annotations

import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from relay.errors import GrammarViolation
from relay.events import TERMINAL, EventType
from relay.grammar import RunGrammar
from relay.testing.recording import Frame, RecordingClient

DEADLINE_S = 10.0

Expected: TypeAlias = str | types.EllipsisType


class WebSocketTestUtility(RecordingClient):
    """One user's connection: asks agents, keeps all that comes, and says whether it was right.

    It is the relay's own client: when its connection is lost it comes back by itself, at its
    position, to the next gateway. Assertions that fail show what came instead.
    """

    # --- Asking ---

    async def ask(
        self,
        content: str,
        *,
        agent: str | None = None,
        thread_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Send a message to an agent; give the run's id.

        Args:
            content: The message.
            agent: Who shall answer; may be left out where the relay has one agent only.
            thread_id: The conversation; a new one by default.
            metadata: Goes along with the request.

        Raises:
            RequestFailed: The gateway refused it.
        """
        accepted = await self.client.send_message(
            content, thread_id=thread_id or uuid.uuid4().hex, agent=agent, metadata=metadata
        )
        return accepted.run_id

    async def cancel(self, run_id: str, reason: str | None = None) -> None:
        """Press Stop.

        Raises:
            RequestFailed: There is no such run of this user, or it has ended.
        """
        await self.client.cancel(run_id, reason)

    async def answer(self, run_id: str, value: object, timeout_s: float = DEADLINE_S) -> None:
        """Answer the latest question of a run; waits for it. An approval takes True or False.

        Raises:
            RequestFailed: It is not open any more, or this is no answer to it.
        """
        asked = await self._open_question(run_id, timeout_s)
        await self.client.respond(run_id, asked["data"]["request_id"], value)

    async def approve(self, run_id: str, timeout_s: float = DEADLINE_S) -> None:
        """Say yes to what a run asks; waits for the question."""
        await self.answer(run_id, True, timeout_s)

    async def deny(self, run_id: str, timeout_s: float = DEADLINE_S) -> None:
        """Say no to what a run asks; waits for the question."""
        asked = await self._open_question(run_id, timeout_s)
        await self.client.deny(run_id, asked["data"]["request_id"])

    async def _open_question(self, run_id: str, timeout_s: float) -> Frame:
        def find() -> Frame | None:
            resolved = self.events_of(run_id, EventType.INPUT_RESOLVED)
            closed = {event["data"]["request_id"] for event in resolved}
            asked = [
                event
                for event in self.events_of(run_id, EventType.INPUT_REQUESTED)
                if event["data"]["request_id"] not in closed
            ]
            return asked[-1] if asked else None

        return await self._first(find, f"no open question of {run_id}", timeout_s)

    # --- What came ---

    async def wait_for(
        self,
        event_type: str,
        timeout_s: float = DEADLINE_S,
        *,
        run_id: str | None = None,
        count: int = 1,
        where: Callable[[Frame], bool] | None = None,
    ) -> Frame:
        """Give an event of a type; waits until it has come.

        Events that came before the call count, so that a test cannot miss one.

        Args:
            event_type: Its type; ``terminal`` for any that ends a run.
            timeout_s: How long to wait.
            run_id: Whose; any run's by default.
            count: Which: the first one, the second, …
            where: What else must be true of it.

        Raises:
            AssertionError: It has not come; the text shows what came instead.
        """
        __tracebackhide__ = True

        def find() -> Frame | None:
            found = [
                event
                for event in self.events
                if _is_of_type(event, event_type)
                and run_id in (None, event.get("run_id"))
                and (where is None or where(event))
            ]
            return found[count - 1] if len(found) >= count else None

        of_run = f" of {run_id}" if run_id else ""
        return await self._first(find, f"no {event_type}{of_run}", timeout_s)

    async def wait_end(self, run_id: str, timeout_s: float = DEADLINE_S) -> Frame:
        """Give a run's terminal event; waits until it has come."""
        __tracebackhide__ = True
        return await self.wait_for("terminal", timeout_s, run_id=run_id)

    async def wait_connected(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait until a connection is established."""
        await self.until(lambda _: self.is_connected and self._lost is None, timeout_s)

    async def _first(self, find: Callable[[], Frame | None], what: str, timeout_s: float) -> Frame:
        __tracebackhide__ = True
        found: list[Frame] = []

        def look(_: RecordingClient) -> bool:
            frame = find()
            found.extend([] if frame is None else [frame])
            return bool(found)

        try:
            await self.until(look, timeout_s)
        except AssertionError:
            raise AssertionError(
                self._complaint(f"{self.name}: {what} within {timeout_s:g} s")
            ) from None
        return found[0]

    def events_of(self, run_id: str, event_type: str | None = None) -> list[Frame]:
        """Give the events of a run so far, in the order of arrival, text included.

        Those before a ``reset`` do not count: the gateway tells anew what still holds.

        Args:
            run_id: The run.
            event_type: Leaves out other types; ``terminal`` for any that ends a run.
        """
        return [
            event
            for event in self.current
            if event.get("run_id") == run_id
            and (event_type is None or _is_of_type(event, event_type))
        ]

    def text_of(self, run_id: str) -> str:
        """Give the text that a run's latest attempt has streamed so far.

        What earlier attempts streamed is superseded by ``agent_retrying``, before the next begins.

        Raises:
            AssertionError: The pieces do not fit together.
        """
        pieces = self.texts(run_id).pieces
        latest = max(map(_latest_attempt, self.events_of(run_id)), default=0)
        return "".join(text for (attempt, _), text in pieces.items() if attempt == latest)

    # --- Harm ---

    async def drop_connection(self) -> None:
        """Break the connection as a lost network does; returns when the client has noticed.

        It comes back by itself; ``wait_connected`` returns when it has.
        """
        await self.wait_connected()
        lost = len(self.closed_at_s)
        self.client.drop()
        await self.until(lambda one: len(one.closed_at_s) > lost, DEADLINE_S)

    # --- Assertions ---

    def assert_lifecycle(
        self, run_id: str, expected: Sequence[Expected] | None = None, *, is_ended: bool = True
    ) -> None:
        """Make sure that a run's lifecycle is legal, whole, and as expected.

        Args:
            run_id: The run.
            expected: Types of its lifecycle events, in order; ``...`` stands for any number of
                any events. Without it, any legal lifecycle will do.
            is_ended: Whether its terminal event must have come.

        Raises:
            AssertionError: It is not; the text shows what came instead.
        """
        __tracebackhide__ = True
        events = [event for event in self.events_of(run_id) if "seq" in event]
        types_seen = [event["type"] for event in events]
        seqs = [event["seq"] for event in events]
        if seqs != list(range(1, len(seqs) + 1)):
            self._fail(run_id, f"the numbers of {run_id} are not whole: seq {seqs}")
        self._hold_against_grammar(run_id)
        if is_ended and (not events or types_seen[-1] not in TERMINAL):
            self._fail(run_id, f"{run_id} has not ended")
        if expected is not None and not _matches(types_seen, list(expected)):
            wanted = ", ".join("..." if one is ... else str(one) for one in expected)
            self._fail(
                run_id,
                f"{run_id} went another way.\n  expected: {wanted}\n"
                f"  came:     {', '.join(types_seen)}",
            )

    def assert_complete(self, run_id: str, *, text: str | None = None) -> None:
        """Make sure that nothing of an ended run is missing, double or out of order.

        Its lifecycle is whole and legal, every tool call and question closed, offsets rise, and
        streamed text has no hole.

        Args:
            run_id: The run.
            text: What its last attempt must have streamed; only holes are looked for otherwise.

        Raises:
            AssertionError: Something is; the failure shows what came instead.
        """
        __tracebackhide__ = True
        self.assert_lifecycle(run_id)
        offsets = [event["offset"] for event in self.events_of(run_id)]
        if offsets != sorted(set(offsets)):
            self._fail(run_id, f"the offsets of {run_id} do not rise: {offsets}")
        try:
            streamed = self.text_of(run_id)
        except AssertionError as hole:
            self._fail(run_id, f"the text of {run_id} does not fit together: {hole}")
        if text is not None and streamed != text:
            self._fail(run_id, f"{run_id} streamed another text: {streamed!r} instead of {text!r}")

    def assert_isolated(self, *others: RecordingClient) -> None:
        """Make sure that this client received nothing of anybody else.

        Args:
            others: Other users' clients: no run and no text of an event may be common.

        Raises:
            AssertionError: Something foreign came; the text shows all that came.
        """
        __tracebackhide__ = True
        foreign = [
            event for event in self.events if event.get("user_id", self.user_id) != self.user_id
        ]
        if foreign:
            self._fail(None, f"{len(foreign)} events are of {foreign[0]['user_id']!r}")
        own = {event["run_id"] for event in self.events if event.get("run_id")}
        for other in others:
            if other.user_id == self.user_id:
                continue
            common = own & {event.get("run_id") for event in other.events}
            if common:
                self._fail(
                    None, f"{other.user_id} and {self.user_id} both received {sorted(common)}"
                )

    def _hold_against_grammar(self, run_id: str) -> None:
        __tracebackhide__ = True
        grammar = RunGrammar()
        for event in self.events_of(run_id):
            try:
                grammar.apply(EventType(event["type"]), event["data"])
            except GrammarViolation as violation:
                self._fail(run_id, f"{run_id} breaks the grammar: {violation}")

    def _fail(self, run_id: str | None, text: str) -> NoReturn:
        __tracebackhide__ = True
        raise AssertionError(f"{self.name}: {text}\n{self.timeline(run_id)}")


def _is_of_type(event: Frame, event_type: str) -> bool:
    if event_type == "terminal":
        return event["type"] in TERMINAL
    return bool(event["type"] == event_type)


def _latest_attempt(event: Frame) -> int:
    """Give the attempt that an event is of, or announces."""
    announced = event["data"]["attempt"] if event["type"] == EventType.AGENT_RETRYING else 0
    return max(int(event.get("attempt") or 0), int(announced))


def _matches(seen: Sequence[str], expected: Sequence[Expected]) -> bool:
    """Whether types fit a pattern in which ``...`` stands for any number of them."""
    if not expected:
        return not seen
    first, *rest = expected
    if first is ...:
        return any(_matches(seen[skipped:], rest) for skipped in range(len(seen) + 1))
    return bool(seen) and seen[0] == first and _matches(seen[1:], rest)
