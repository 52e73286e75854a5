"""Putting questions to a terminal: one after the other, and not those of strangers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

from relay.cli.asking import Asker, TerminalLines
from relay.cli.operators import age
from relay.cli.story import Say, Write
from relay.client import Event, RelayClient, RequestFailed


class Page:
    """A view that keeps what it was told to show; only what the asker uses of one."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.prompts = 0
        self.is_paused = False
        self.prompted = asyncio.Event()

    def show(self, line: Say | Write) -> None:
        self.said.append(line.text)

    def pause(self) -> None:
        self.is_paused = True

    def prompt(self, text: str) -> None:
        if text.strip():
            self.prompts += 1
            self.prompted.set()

    def resume(self) -> None:
        self.is_paused = False


class Gateway:
    """Takes answers, or refuses them, as the client hands them over."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[tuple[str, str, Any]] = asyncio.Queue()
        self.refusals: list[RequestFailed] = []

    async def respond(self, run_id: str, request_id: str, value: object) -> None:
        if self.refusals:
            raise self.refusals.pop()
        await self.answers.put((run_id, request_id, value))

    async def deny(self, run_id: str, request_id: str) -> None:
        await self.answers.put((run_id, request_id, "denied"))


class Desk:
    """Somebody at a terminal: a pipe to type into."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        self.lines = TerminalLines(self.read_end)

    def type(self, text: str) -> None:
        os.write(self._write_end, text.encode())

    def hang_up(self) -> None:
        os.close(self._write_end)
        self._write_end = -1

    def close(self) -> None:
        os.close(self.read_end)
        if self._write_end >= 0:
            self.hang_up()


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def asker(page: Page, gateway: Gateway, lines: TerminalLines | None) -> Asker:
    made = Asker(cast("RelayClient", gateway), cast("Any", page), lines, ["--user", "ann"])
    made.follow("r")
    return made


def requested(request_id: str, kind: str = "text", run_id: str = "r", **data: Any) -> Event:
    fields = {"request_id": request_id, "prompt": f"{request_id}?", "kind": kind, **data}
    return Event("input_requested", 1, fields, {}, run_id=run_id)


def resolved(request_id: str, outcome: str = "answered") -> Event:
    data = {"request_id": request_id, "outcome": outcome, "by": "user"}
    return Event("input_resolved", 2, data, {}, run_id="r")


async def next_answer(gateway: Gateway) -> tuple[str, str, Any]:
    async with asyncio.timeout(5):
        return await gateway.answers.get()


async def test_without_a_terminal_it_says_how_to_answer() -> None:
    page, gateway = Page(), Gateway()
    asking = asker(page, gateway, None)
    asking.receive(requested("q1", "approval"))
    assert page.said == [
        "q1?",
        "Answer with: relay answer --user ann --run r --request q1 --value true",
    ]
    asking.receive(requested("q1", "approval"))
    assert len(page.said) == 2
    await asking.aclose()


async def test_typed_lines_answer_one_question_after_the_other(desk: Desk) -> None:
    page, gateway = Page(), Gateway()
    asking = asker(page, gateway, desk.lines)
    asking.receive(requested("q1", "approval"))
    asking.receive(requested("q2", "choice", schema={"enum": ["red", "blue"]}))
    desk.type("perhaps\ny\n2\n")
    assert await next_answer(gateway) == ("r", "q1", True)
    asking.receive(resolved("q1"))
    assert await next_answer(gateway) == ("r", "q2", "blue")
    asking.receive(resolved("q2"))
    assert "Type y or n." in page.said
    assert page.said.count("Answered") == 2
    await asking.aclose()
    assert not page.is_paused


async def test_question_answered_elsewhere_is_asked_no_more(desk: Desk) -> None:
    page, gateway = Page(), Gateway()
    asking = asker(page, gateway, desk.lines)
    asking.receive(requested("q1"))
    await page.prompted.wait()
    assert page.is_paused
    asking.receive(resolved("q1", "expired"))
    page.prompted.clear()
    asking.receive(requested("q2"))
    await page.prompted.wait()
    desk.type("now\n")
    assert await next_answer(gateway) == ("r", "q2", "now")
    assert gateway.answers.empty()
    assert "The question has expired unanswered" in page.said
    await asking.aclose()


async def test_answer_that_does_not_fit_is_asked_again(desk: Desk) -> None:
    page, gateway = Page(), Gateway()
    gateway.refusals.append(RequestFailed("invalid_frame", "too short", retryable=False))
    asking = asker(page, gateway, desk.lines)
    asking.receive(requested("q1"))
    desk.type("a\nlonger\n")
    assert await next_answer(gateway) == ("r", "q1", "longer")
    assert "too short" in page.said
    await asking.aclose()


async def test_closed_question_is_not_asked_again(desk: Desk) -> None:
    page, gateway = Page(), Gateway()
    gateway.refusals.append(RequestFailed("unknown_request", "closed", retryable=False))
    asking = asker(page, gateway, desk.lines)
    asking.receive(requested("q1"))
    desk.type("a\n")
    async with asyncio.timeout(5):
        while "closed" not in page.said or page.is_paused:
            await asyncio.sleep(0)
    assert page.prompts == 1
    await asking.aclose()


async def test_end_of_input_leaves_the_question_to_others(desk: Desk) -> None:
    page, gateway = Page(), Gateway()
    asking = asker(page, gateway, desk.lines)
    asking.receive(requested("q1"))
    desk.hang_up()
    async with asyncio.timeout(5):
        while not any("relay answer" in text for text in page.said):
            await asyncio.sleep(0)
    await asking.aclose()
    assert not page.is_paused


async def test_questions_of_other_runs_are_left_alone_but_not_those_of_runs_below() -> None:
    page, gateway = Page(), Gateway()
    asking = asker(page, gateway, None)
    asking.receive(requested("q1", run_id="stranger"))
    assert page.said == []
    queued = {"message_id": "m", "content": "c", "metadata": {"parent_run_id": "r"}}
    asking.receive(Event("agent_queued", 1, queued, {}, run_id="below"))
    asking.receive(requested("q2", run_id="below"))
    assert page.said[0] == "q2?"
    await asking.aclose()


async def test_line_typed_in_pieces_is_one_line(desk: Desk) -> None:
    waiting = asyncio.create_task(desk.lines.next_line())
    desk.type("dark ")
    await asyncio.sleep(0)
    desk.type("réd\nnext\n")
    assert await waiting == "dark réd"
    assert await desk.lines.next_line() == "next"


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [
        (-5, "0 s"),
        (59_999, "59 s"),
        (60_000, "1 min"),
        (7_200_000, "2 h"),
        (172_800_000, "2 d"),
    ],
)
def test_ages_are_short(duration_ms: int, text: str) -> None:
    assert age(duration_ms) == text
