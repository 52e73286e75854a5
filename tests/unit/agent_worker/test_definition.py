from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent_worker import Run, Worker
from agent_worker.definition import define_agent
from relay.errors import ConfigurationError


async def echo(run: Run) -> str:
    return run.request.content


def plain(run: Any) -> str:
    return "done"


class Bound:
    async def answer(self, run: Run) -> str:
        return "bound"

    async def __call__(self, run: Run) -> str:
        return "called"


@pytest.mark.parametrize(
    ("function", "is_sync"),
    [
        (echo, False),
        (plain, True),
        (Bound().answer, False),
        (Bound(), False),
        (functools.partial(lambda folder, run: folder, "docs"), True),
        (lambda run: "x", True),
    ],
)
def test_function_with_one_parameter_is_an_agent(function: Any, is_sync: bool) -> None:
    assert define_agent("a", function).is_sync is is_sync


async def pieces(run: Run) -> AsyncIterator[str]:
    yield "x"


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda: None, "exactly one parameter"),
        (lambda run, more: None, "(run, more)"),
        (lambda run, more=1: None, "(run, more=1)"),
        (lambda *runs: None, "exactly one parameter"),
        (lambda **runs: None, "exactly one parameter"),
        (pieces, "yields"),
        ("name", "not a function"),
        (None, "not a function"),
    ],
)
def test_other_functions_are_refused_with_the_reason(function: Any, part: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        define_agent("researcher", function)
    assert part in str(refused.value)
    assert "'researcher'" in str(refused.value)


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "a{b}", "é", "a" * 65, "a\n", None, 7])
def test_names_outside_the_pattern_are_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="a-z 0-9 _ -"):
        define_agent(name, echo)
    with pytest.raises(ConfigurationError, match="a-z 0-9 _ -"):
        Worker(name)


@pytest.mark.parametrize("name", ["a", "docs-agent_2", "0", "a" * 64])
def test_names_within_the_pattern_are_taken(name: str) -> None:
    assert define_agent(name, echo).name == name


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"max_attempts": 101}, "max_attempts=101"),
        ({"max_attempts": 2.0}, "max_attempts=2.0"),
        ({"max_attempts": True}, "max_attempts=True"),
        ({"stall_after_s": 0}, "stall_after_s=0"),
        ({"stall_after_s": float("nan")}, "stall_after_s=nan"),
        ({"stall_after_s": "60"}, "stall_after_s='60'"),
        ({"timeout_s": -1}, "timeout_s=-1"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"description": "x" * 501}, "description"),
        ({"description": None}, "description"),
        ({"policy": "queue"}, "Allowed: enqueue, reject, interrupt, parallel"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        define_agent("a", echo, **options)
    assert part in str(refused.value)


def test_decorator_returns_the_function_and_keeps_the_declaration() -> None:
    worker = Worker("research")
    assert worker.agent("echo", description="Echoes.", timeout_s=5)(echo) is echo
    declared = worker.agents["echo"]
    assert (declared.description, declared.timeout_s, declared.max_attempts) == ("Echoes.", 5.0, 1)


def test_a_name_can_be_declared_once() -> None:
    worker = Worker()
    worker.agent("echo")(echo)
    with pytest.raises(ConfigurationError, match="'echo' is declared twice"):
        worker.agent("echo")(plain)
