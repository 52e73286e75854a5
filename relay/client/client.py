"""The client as applications use it: events to iterate over, requests and their answers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson

from relay.client.http import http_address
from relay.client.link import OPEN_TIMEOUT_S, Link, TokenSource
from relay.client.mailbox import Mailbox
from relay.client.state import (
    ClientState,
    Connected,
    ConnectionEnded,
    Event,
    EventsMissing,
    Fields,
    Reply,
    SequenceHole,
    Update,
)
from relay.errors import RelayError

REQUEST_TIMEOUT_S = 30.0


class RequestFailed(RelayError):
    """The gateway refused a request, or did not answer it in time.

    Attributes:
        code: Error code of the wire; ``no_answer`` where none came.
        retryable: Whether the same request may succeed later.
        recovery_suggestions: What can be done, most useful first.
        retry_after_ms: When to try again at the earliest; None where nobody said.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        recovery_suggestions: Sequence[str] = (),
        retry_after_ms: int | None = None,
    ) -> None:
        self.code = code
        self.retryable = retryable
        self.recovery_suggestions = tuple(recovery_suggestions)
        self.retry_after_ms = retry_after_ms
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class RunAccepted:
    """A message was accepted: its run exists and will end in one terminal event.

    Attributes:
        duplicate: The same message id had been accepted before; this is that run.
    """

    run_id: str
    duplicate: bool


@dataclass(slots=True)
class _PendingRequest:
    frame: bytes
    answer: asyncio.Future[Fields]


class RelayClient:
    """A user's connection that stays: it resumes at its position after every loss.

    An async context manager; entering returns when the first connection is established.
    Iterate over it for events, or over ``updates()`` for everything. Reading the socket pauses
    while about a thousand updates wait to be taken, and requests are not answered then either:
    a client that sends must also iterate.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        token: TokenSource,
        *,
        since: str = "active",
        client_id: str | None = None,
        connect_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """Prepare a client; nothing is opened yet.

        Args:
            url: The relay's address (http, https, ws or wss), or several gateways'; the next one
                is tried when one fails.
            token: The user's token, or a function that gets a fresh one: it is asked before
                every connection and when the gateway says that the token is about to expire.
                What it raises is a failed try, and it is asked again after the usual wait; a
                ``ConnectionEnded`` ends the client instead.
            since: Where to begin: ``active``, ``now``, ``0`` or a position.
            client_id: Name of this device; a reconnect takes over its place.
            connect_timeout_s: How long entering tries to establish the first connection.

        Raises:
            ConnectionEnded: ``url`` is not an address.
        """
        urls = [url] if isinstance(url, str) else list(url)
        self._bases = [http_address(each) for each in urls]
        self._connect_timeout_s = connect_timeout_s
        self._link = Link(
            self._bases, token, ClientState(since), client_id or uuid.uuid4().hex, self._take
        )
        self._requests: dict[str, _PendingRequest] = {}
        self._mailbox = Mailbox()
        self._latest: Connected | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="relay-client")
        try:
            await self._wait_until_established(self._task)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def _wait_until_established(self, running: asyncio.Task[None]) -> None:
        established = asyncio.create_task(self._link.established.wait())
        try:
            await asyncio.wait(
                {running, established},
                timeout=self._connect_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            established.cancel()
        if self._mailbox.error is not None:
            raise self._mailbox.error
        if self._latest is None:
            raise ConnectionEnded(
                f"No gateway could be reached at {' or '.join(self._bases)} within "
                f"{self._connect_timeout_s:.0f} s ({self._link.last_failure or 'no answer'})."
            ) from self._link.token_failure

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection for good. Requests that wait for an answer fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    @property
    def position(self) -> str | None:
        """Where the next event follows: give it as ``since`` to resume later."""
        return self._link.state.position

    @property
    def connection(self) -> Connected | None:
        """What the gateway said when the latest connection was established."""
        return self._latest

    @property
    def is_connected(self) -> bool:
        """Whether a connection is established right now."""
        return self._link.established.is_set()

    @property
    def last_failure(self) -> str:
        """Why the latest connection broke or could not be made, for people; empty if none did."""
        return self._link.last_failure

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Give the user's events, in order, each once.

        Raises:
            EventsMissing: A run's ``seq`` has a hole.
            ConnectionEnded: The gateway does not want this client back as it is, or the token's
                function ended it.
        """
        async for update in self.updates():
            if isinstance(update, Event):
                yield update
            elif isinstance(update, SequenceHole):
                raise EventsMissing(
                    f"run {update.run_id}: event {update.seen} came where {update.expected} "
                    "was expected"
                )

    async def updates(self) -> AsyncIterator[Update]:
        """Give everything that happens: events, resets, lost and new connections.

        Raises:
            ConnectionEnded: The gateway does not want this client back as it is, or the token's
                function ended it.
        """
        if self._task is None:
            raise RuntimeError("enter the client first: async with RelayClient(...)")
        while (update := await self._mailbox.take()) is not None:
            yield update

    async def send_message(
        self,
        content: str,
        *,
        thread_id: str,
        agent: str | None = None,
        metadata: Fields | None = None,
        message_id: str | None = None,
    ) -> RunAccepted:
        """Ask an agent. Safe over a lost connection: the same message makes one run.

        Raises:
            RequestFailed: The gateway refused it, or no answer came in time.
        """
        fields: dict[str, Any] = {"thread_id": thread_id, "content": content}
        if agent is not None:
            fields["agent"] = agent
        if metadata is not None:
            fields["metadata"] = metadata
        answer = await self._request("user_message", fields, message_id)
        return RunAccepted(answer["run_id"], bool(answer.get("duplicate")))

    async def cancel(self, run_id: str, reason: str | None = None) -> str:
        """Ask for a run's end; give its status.

        Raises:
            RequestFailed: There is no such run, it has ended, or no answer came in time.
        """
        fields = {"run_id": run_id} | ({"reason": reason} if reason else {})
        answer = await self._request("cancel", fields)
        return str(answer.get("status", ""))

    async def respond(self, run_id: str, request_id: str, value: object) -> None:
        """Answer an input request; the same answer again is taken as it was the first time.

        Raises:
            RequestFailed: It is not open any more, or no answer came in time.
        """
        fields = {"run_id": run_id, "request_id": request_id, "value": value}
        await self._request("input_response", fields)

    async def deny(self, run_id: str, request_id: str) -> None:
        """Decline an input request.

        Raises:
            RequestFailed: It is not open any more, or no answer came in time.
        """
        fields = {"run_id": run_id, "request_id": request_id, "denied": True}
        await self._request("input_response", fields)

    async def ping(self) -> str:
        """Make the way to the gateway and back; give the connection's position.

        Raises:
            RequestFailed: No answer came in time.
        """
        answer = await self._request("ping", {})
        return str(answer["position"])

    async def _request(self, kind: str, fields: Fields, request_id: str | None = None) -> Fields:
        request_id = request_id or uuid.uuid4().hex
        frame = orjson.dumps({"type": kind, "id": request_id, **fields})
        future: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._requests[request_id] = _PendingRequest(frame, future)
        try:
            # What is lost with its connection, or comes too early for it, _take sends again.
            await self._link.send(frame)
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                answer = await future
        except TimeoutError:
            raise RequestFailed(
                "no_answer",
                f"The gateway did not answer a {kind} within {REQUEST_TIMEOUT_S:.0f} s.",
                retryable=True,
            ) from None
        finally:
            self._requests.pop(request_id, None)
        if answer["type"] == "error":
            raise RequestFailed(
                answer["code"],
                answer.get("message", answer["code"]),
                retryable=bool(answer.get("retryable")),
                recovery_suggestions=answer.get("recovery_suggestions", ()),
                retry_after_ms=answer.get("retry_after_ms"),
            )
        return answer

    async def _run(self) -> None:
        error: Exception | None = None
        try:
            error = await self._link.run()
        except Exception as failure:  # noqa: BLE001 (it is handed on)
            # Whoever iterates gets it; nobody awaits this task while the connection lives.
            error = failure
        finally:
            self._fail_requests(error or ConnectionEnded("The client was closed."))
            await self._mailbox.close(error)

    def _fail_requests(self, error: Exception) -> None:
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(error)
                # Whoever waits for it gets it; where nobody does any more, it needs no warning.
                request.answer.exception()

    async def _take(self, item: Update | Reply) -> None:
        if isinstance(item, Reply):
            request = self._requests.get(item.id)
            if request is not None and not request.answer.done():
                request.answer.set_result(item.frame)
            return
        if isinstance(item, Connected):
            self._latest = item
            # Requests are repeatable by their id: what was not answered is sent again.
            for request in list(self._requests.values()):
                await self._link.send(request.frame)
        await self._mailbox.put(item)
