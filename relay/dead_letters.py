"""Dead letters: tasks that could not be carried out, kept for operators to requeue or drop."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from relay.codec import Task, decode_task
from relay.errors import DecodingFailed, RequestRefused
from relay.events import format_timestamp
from relay.keys import Keys
from relay.lifecycle import ENDED
from relay.run_model import SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import RedisLink, ScriptFailed, mapped_errors
from relay.tasks import TASK_FIELD, dispatch

MAX_PAGE = 200
_ID = re.compile(r"\d{1,20}-\d{1,20}")
_LARGEST_PART = 2**64 - 1


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A task that was given up.

    Attributes:
        letter_id: Names it among the dead letters; they are in the order in which they came.
        reason: Why it was given up.
        agent: Whose task it was.
        entry_id: Its id in the agent's stream, where it was found there.
        at_ms: When it was given up.
        payload: The task as it is.
        task: What the payload says; None where it cannot be understood.
    """

    letter_id: str
    reason: str
    agent: str
    entry_id: str
    at_ms: int
    payload: bytes
    task: Task | None

    def as_json(self) -> dict[str, Any]:
        """Give the item of a list of dead letters."""
        return {
            "id": self.letter_id,
            "reason": self.reason,
            "agent": self.agent,
            "entry_id": self.entry_id or None,
            "at": format_timestamp(self.at_ms),
            "user_id": self.task.user_id if self.task else None,
            "run_id": self.task.run_id if self.task else None,
            "payload": None if self.task else base64.b64encode(self.payload).decode(),
        }


@dataclass(frozen=True, slots=True)
class DeadLetterPage:
    """Dead letters, the newest first.

    Attributes:
        before: Where the next page begins; None at the end.
    """

    letters: tuple[DeadLetter, ...]
    before: str | None


@dataclass(frozen=True, slots=True)
class Requeued:
    """What became of a dead letter that was requeued.

    Attributes:
        how: ``task``: the task is in its stream again. ``run``: its run had ended, so its request
            was accepted as a new run.
        run_id: The run that the task is for, or the new run; None for a task that nobody
            understands.
        duplicate: The new run exists already: the letter had been requeued before.
    """

    how: Literal["task", "run"]
    agent: str
    run_id: str | None = None
    duplicate: bool = False

    def as_json(self) -> dict[str, Any]:
        """Give the answer to a request to requeue."""
        return {
            "how": self.how,
            "agent": self.agent,
            "run_id": self.run_id,
            "duplicate": self.duplicate,
        }


class DeadLetters:
    """The tasks that were given up, in one Redis.

    Every method raises ``RedisUnavailable`` where Redis does not answer.

    Args:
        link: Redis.
        keys: Key names.
        registry: Takes the requests of lost runs again.
    """

    def __init__(self, link: RedisLink, keys: Keys, registry: RunRegistry) -> None:
        self._link = link
        self._keys = keys
        self._registry = registry

    async def count(self) -> int:
        """Give how many there are."""
        with mapped_errors(self._link.url):
            return int(await self._link.client.xlen(self._keys.dead_letters))

    async def page(self, *, before: str | None = None, limit: int = 50) -> DeadLetterPage:
        """Give a page, the newest first.

        Args:
            before: ``DeadLetterPage.before`` of the page before this one.
            limit: Most letters of a page; at most two hundred.

        Raises:
            RequestRefused: ``invalid_frame``: ``before`` is not the id of a dead letter.
        """
        limit = min(limit, MAX_PAGE)
        newest = "+" if before is None else f"({require_id(before)}"
        with mapped_errors(self._link.url):
            # One more than asked for tells whether another page follows.
            entries: Any = await self._link.client.xrevrange(
                self._keys.dead_letters, max=newest, count=limit + 1
            )
        letters = tuple(letter_from(entry_id, fields) for entry_id, fields in entries[:limit])
        return DeadLetterPage(letters, letters[-1].letter_id if len(entries) > limit else None)

    async def get(self, letter_id: str) -> DeadLetter:
        """Give one.

        Raises:
            RequestRefused: ``not_found``, ``invalid_frame``.
        """
        letter_id = require_id(letter_id)
        with mapped_errors(self._link.url):
            entries: Any = await self._link.client.xrange(
                self._keys.dead_letters, min=letter_id, max=letter_id
            )
        if not entries:
            raise _no_letter(letter_id)
        return letter_from(*entries[0])

    async def requeue(self, letter_id: str) -> Requeued:
        """Have the task carried out after all, and drop the letter.

        A run that still waits for its task gets it. A run that has ended keeps its end; its
        request becomes a new run, under a message id made from the letter's id, so that doing it
        twice gives one run. A task that cannot be understood goes back to its stream as it is: a
        newer worker may understand it.

        Raises:
            RequestRefused: ``not_found``; ``unknown_run``: the run's request cannot be read
                any more; ``thread_busy``, ``rate_limited``, ``unknown_agent`` as for any request.
                The letter stays.
            RedisUnavailable: Whether it was requeued is unknown; do it again.
        """
        letter = await self.get(letter_id)
        if letter.task is None:
            requeued = await self._put_back(letter)
        else:
            requeued = await self._requeue_task(letter, letter.task)
        # Last: should this process die before it, requeueing again does no harm.
        await self.drop(letter.letter_id, must_exist=False)
        return requeued

    async def _put_back(self, letter: DeadLetter) -> Requeued:
        await self._require_agent(letter.agent)
        with mapped_errors(self._link.url):
            await self._link.client.xadd(
                self._keys.tasks(letter.agent), {TASK_FIELD: letter.payload}
            )
        return Requeued("task", letter.agent)

    async def _requeue_task(self, letter: DeadLetter, task: Task) -> Requeued:
        run_key = self._keys.user(task.user_id).run(task.run_id)
        try:
            with mapped_errors(self._link.url):
                stored: Any = await self._link.client.hmget(
                    run_key, ["status", "thread", "agent", "request"]
                )
        except ScriptFailed as error:
            raise _no_request(task, f"what Redis holds of it cannot be used: {error}") from error
        if None in stored:
            raise _no_request(task, "it is not kept any more")
        status, thread, agent, request = stored
        if status.decode() not in ENDED:
            # The run's own word for its agent: who gave the task up may not have known it.
            task = task._replace(agent=agent.decode())
            await self._require_agent(task.agent)
            await dispatch(self._link, self._keys, task)
            return Requeued("task", task.agent, task.run_id)
        try:
            repeated = repeat_request(letter.letter_id, task.user_id, thread, agent, request)
        except DecodingFailed as error:
            raise _no_request(task, str(error)) from error
        submitted = await self._registry.submit(repeated)
        return Requeued("run", repeated.agent, submitted.run_id, submitted.duplicate)

    async def _require_agent(self, agent: str) -> None:
        with mapped_errors(self._link.url):
            is_known = await self._link.client.hexists(self._keys.agents, agent)
        if not is_known:
            # Nobody would ever read the stream of such an agent.
            raise RequestRefused(
                "unknown_agent", f"No worker has registered an agent named {agent[:64]!r}."
            )

    async def drop(self, letter_id: str, *, must_exist: bool = True) -> None:
        """Forget a dead letter.

        Raises:
            RequestRefused: ``not_found``, unless that is all right; ``invalid_frame``.
        """
        letter_id = require_id(letter_id)
        with mapped_errors(self._link.url):
            dropped = await self._link.client.xdel(self._keys.dead_letters, letter_id)
        if must_exist and not dropped:
            raise _no_letter(letter_id)

    async def drop_all(self) -> int:
        """Forget those that are there now, not those that come meanwhile; give how many."""
        with mapped_errors(self._link.url):
            newest: Any = await self._link.client.xrevrange(self._keys.dead_letters, count=1)
            if not newest:
                return 0
            time_ms, _, number = newest[0][0].decode().partition("-")
            dropped = await self._link.client.xtrim(
                self._keys.dead_letters, minid=f"{time_ms}-{int(number) + 1}", approximate=False
            )
            return int(dropped)


def letter_from(entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    """Read an entry; what it lacks, because somebody else wrote it, is empty."""
    payload = fields.get(b"task", b"")
    at_ms = fields.get(b"at_ms", b"")
    try:
        task = decode_task(payload)
    except DecodingFailed:
        task = None
    return DeadLetter(
        letter_id=entry_id.decode(),
        reason=_readable(fields.get(b"reason")),
        agent=_readable(fields.get(b"agent")),
        entry_id=_readable(fields.get(b"entry_id")),
        at_ms=int(at_ms if at_ms.isdigit() else entry_id.partition(b"-")[0]),
        payload=payload,
        task=task,
    )


def repeat_request(
    letter_id: str, user_id: str, thread: bytes, agent: bytes, request: bytes
) -> SubmitRequest:
    """Make a request anew from what the run of a dead letter was asked.

    Raises:
        DecodingFailed: What the run was asked cannot be read.
    """
    try:
        asked = orjson.loads(request)
        return SubmitRequest(
            user_id=user_id,
            thread_id=thread.decode(),
            agent=agent.decode(),
            content=asked["content"],
            message_id=f"dead-letter:{letter_id}",
            metadata=asked["metadata"],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DecodingFailed(f"what it was asked cannot be read: {error!r}") from error


def require_id(letter_id: str) -> str:
    """Give the id if it has the form of one.

    Raises:
        RequestRefused: ``invalid_frame``.
    """
    if _ID.fullmatch(letter_id) and all(
        int(part) <= _LARGEST_PART for part in letter_id.split("-")
    ):
        return letter_id
    raise RequestRefused(
        "invalid_frame",
        f"{letter_id[:64]!r} is not the id of a dead letter.",
        suggestions=("List them: GET /v1/admin/dead-letters, or relay dead-letters list.",),
    )


def _no_request(task: Task, why: str) -> RequestRefused:
    return RequestRefused(
        "unknown_run",
        f"The request of run {task.run_id} cannot be repeated: {why}.",
        suggestions=("Drop the dead letter.",),
    )


def _no_letter(letter_id: str) -> RequestRefused:
    return RequestRefused(
        "not_found",
        f"There is no dead letter {letter_id}.",
        suggestions=("It may have been requeued or dropped already; list them again.",),
    )


def _readable(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
