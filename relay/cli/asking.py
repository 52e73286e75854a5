"""Puts an agent's questions to whoever sits at the terminal, while its run goes on."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from relay.cli import console
from relay.cli.answers import Answer, Question, question_from
from relay.cli.story import Say
from relay.cli.view import View
from relay.client import Event, RelayClient, RequestFailed

_CHUNK_BYTES = 4_096
_OUTCOMES = {
    "answered": Say("·", "quiet", "Answered"),
    "denied": Say("·", "quiet", "Denied"),
    "expired": Say("!", "care", "The question has expired unanswered"),
    "cancelled": Say("·", "quiet", "The question was withdrawn"),
}


class TerminalLines:
    """The lines that somebody types, without a thread that could not be stopped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._typed = b""

    async def next_line(self) -> str | None:
        """Wait for a line; None at the end of the input (Ctrl-D)."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._typed:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._descriptor, _settle, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self._descriptor)
            # A terminal gives what was typed, up to the end of the line, and does not block now.
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
            if not chunk:
                return None
            self._typed += chunk
        line, _, self._typed = self._typed.partition(b"\n")
        return line.decode(errors="replace")


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def terminal_lines() -> TerminalLines | None:
    """Give the terminal's lines, if somebody sits there who can both read and type."""
    if sys.stdin.isatty() and (console.out.is_terminal or console.err.is_terminal):
        return TerminalLines(sys.stdin.fileno())
    return None


class Asker:
    """The questions of one run, and of the runs that it has asked for.

    Where nobody can type, it says which command answers.

    Args:
        client: Takes the answers.
        view: Shows the questions.
        lines: What is typed; None where nobody can.
        options: Of ``relay answer``: which user, at which gateway.
    """

    def __init__(
        self,
        client: RelayClient,
        view: View,
        lines: TerminalLines | None,
        options: Sequence[str],
    ) -> None:
        self._client = client
        self._view = view
        self._lines = lines
        self._options = options
        self._family: set[str] = set()
        self._seen: set[str] = set()
        self._open: dict[str, Question] = {}
        self._asked: Question | None = None
        self._asking: asyncio.Task[None] | None = None
        self._is_sending = False

    def follow(self, run_id: str) -> None:
        """Ask what this run, and those that it asks for, want to know."""
        self._family.add(run_id)

    def receive(self, event: Event) -> None:
        """Take the user's next event."""
        if event.type == "agent_queued":
            metadata = event.data.get("metadata") or {}
            if event.run_id is not None and metadata.get("parent_run_id") in self._family:
                self._family.add(event.run_id)
        if event.run_id not in self._family:
            return
        if event.type == "input_requested":
            self._request(question_from(str(event.run_id), event.data))
        elif event.type == "input_resolved":
            self._resolve(str(event.data["request_id"]), str(event.data["outcome"]))

    def _request(self, question: Question) -> None:
        # After lost history the same events come again.
        if question.request_id in self._seen:
            return
        self._seen.add(question.request_id)
        self._open[question.request_id] = question
        if self._lines is None:
            self._show(question)
            self._show_command(question)
        else:
            self._ask_next()

    def _resolve(self, request_id: str, outcome: str) -> None:
        if self._open.pop(request_id, None) is None:
            return
        is_asked = self._asked is not None and self._asked.request_id == request_id
        if is_asked and self._asking is not None and not self._is_sending:
            # Somebody else was quicker, or it has expired: what is being typed has no use.
            self._asking.cancel()
            self._view.prompt("\n")
        if outcome in _OUTCOMES:
            self._view.show(_OUTCOMES[outcome])

    def _ask_next(self) -> None:
        if self._asking is not None or self._lines is None or not self._open:
            return
        self._asked = next(iter(self._open.values()))
        self._asking = asyncio.create_task(self._ask(self._asked, self._lines), name="ask")
        self._asking.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._asking = self._asked = None
        if not task.cancelled() and task.exception() is not None:
            task.get_loop().call_exception_handler(
                {"message": "a question could not be asked", "exception": task.exception()}
            )
            return
        self._ask_next()

    async def _ask(self, question: Question, lines: TerminalLines) -> None:
        self._view.pause()
        try:
            self._show(question)
            while True:
                self._view.prompt(f"{question.hint}: ")
                line = await lines.next_line()
                if line is None:
                    self._show_command(question)
                    self._open.pop(question.request_id, None)
                    return
                if await self._answer(question, line):
                    return
        finally:
            self._view.resume()

    async def _answer(self, question: Question, line: str) -> bool:
        """Send what was typed; tell whether the question is done with."""
        try:
            answer = question.read_line(line)
        except ValueError as error:
            self._view.show(Say("!", "care", str(error)))
            return False
        self._is_sending = True
        try:
            await send_answer(self._client, question, answer)
        except RequestFailed as failed:
            self._view.show(Say("!", "care", str(failed)))
            return failed.code != "invalid_frame" or question.request_id not in self._open
        finally:
            self._is_sending = False
        return True

    def _show(self, question: Question) -> None:
        for line in question.lines():
            self._view.show(line)

    def _show_command(self, question: Question) -> None:
        self._view.show(Say("→", "name", f"Answer with: {question.command(self._options)}"))

    async def aclose(self) -> None:
        """Ask no more."""
        self._lines = None
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})


async def send_answer(client: RelayClient, question: Question, answer: Answer) -> None:
    """Send an answer.

    Raises:
        RequestFailed: It does not fit, the question is not open any more, or nobody answers.
    """
    if answer.is_denied:
        await client.deny(question.run_id, question.request_id)
    else:
        await client.respond(question.run_id, question.request_id, answer.value)
