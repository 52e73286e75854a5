"""What a line typed in a terminal says to an agent's question."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from relay.cli.answers import (
    Answer,
    Question,
    choose_question,
    open_questions,
    question_from,
)
from relay.errors import ConfigurationError

APPROVAL = Question("r", "q", "approval", "Send it?")
TEXT = Question("r", "q", "text", "Which colour?")
CHOICE = Question("r", "q", "choice", "Which?", {"enum": ["red", 2, True, "3"]})
TITLED = Question(
    "r",
    "q",
    "choice",
    "Where?",
    {"oneOf": [{"const": "eu", "title": "Europe"}, {"const": "us", "title": "America"}]},
)
NUMBER = Question("r", "q", "text", "How many?", {"type": "integer"})
WORD = Question("r", "q", "text", "Who?", {"type": "string", "minLength": 2})


@pytest.mark.parametrize("typed", ["y", "Y", "yes", " true \r"])
def test_yes_approves(typed: str) -> None:
    assert APPROVAL.read_line(typed) == Answer(True)


@pytest.mark.parametrize("typed", ["n", "No", "false"])
def test_no_denies(typed: str) -> None:
    assert APPROVAL.read_line(typed) == Answer(is_denied=True)


@pytest.mark.parametrize(
    ("question", "typed", "value"),
    [
        (CHOICE, "1", "red"),
        (CHOICE, "2", 2),
        (CHOICE, "3", True),
        (CHOICE, "4", "3"),
        (CHOICE, "RED", "red"),
        (CHOICE, "true", True),
        (TITLED, "2", "us"),
        (TITLED, "europe", "eu"),
        (TITLED, '"eu"', "eu"),
        (TEXT, "dark red", "dark red"),
        (TEXT, '"dark red"', "dark red"),
        (TEXT, "5", "5"),
        (TEXT, "[1]", "[1]"),
        (WORD, "ann", "ann"),
        (NUMBER, "5", 5),
        (NUMBER, '{"a": 1}', {"a": 1}),
    ],
)
def test_typed_line_becomes_a_value(question: Question, typed: str, value: Any) -> None:
    given = question.read_line(typed)
    assert given == Answer(value)
    assert type(given.value) is type(value)


def test_number_given_as_a_value_is_the_value_not_the_place() -> None:
    assert CHOICE.read_value("2") == Answer(2)
    assert CHOICE.read_value('"3"') == Answer("3")
    with pytest.raises(ValueError, match="Choose one of: red, 2, true, 3"):
        CHOICE.read_value("1")


@pytest.mark.parametrize(
    ("question", "typed"),
    [
        (APPROVAL, ""),
        (APPROVAL, "maybe"),
        (APPROVAL, "1"),
        (TEXT, "  "),
        (CHOICE, "0"),
        (CHOICE, "5"),
        (CHOICE, ""),
        (CHOICE, "²"),
        (NUMBER, "five"),
    ],
)
def test_what_is_no_answer_is_told_what_would_be_one(question: Question, typed: str) -> None:
    with pytest.raises(ValueError, match=r"Type|Choose"):
        question.read_line(typed)


def test_question_shows_its_choices_by_number() -> None:
    assert [(line.mark, line.text) for line in TITLED.lines()] == [
        ("?", "Where?"),
        ("1", "Europe"),
        ("2", "America"),
    ]
    assert TITLED.hint == "a number from 1 to 2"


def test_choice_without_choices_is_asked_as_what_its_schema_says() -> None:
    question = Question("r", "q", "choice", "?", {"type": "integer"})
    assert question.choices == []
    assert question.read_line("7") == Answer(7)


@pytest.mark.parametrize("question", [APPROVAL, CHOICE, TITLED, TEXT, WORD])
def test_command_that_answers_is_understood(question: Question) -> None:
    words = shlex.split(question.command(["--user", "o'neil & co"]))
    assert words[:4] == ["relay", "answer", "--user", "o'neil & co"]
    question.read_value(words[words.index("--value") + 1])


def test_command_cannot_move_the_cursor() -> None:
    assert "\x1b" not in Question("r", "q\x1b[2J", "text", "?").command(["--user", "a\x1b"])


def runs(*open_inputs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"run_id": run, "open_inputs": [{"request_id": request, "prompt": "p", "kind": "text"}]}
        for run, request in open_inputs
    ]


def test_only_open_question_needs_no_naming() -> None:
    [question] = open_questions(runs(("r1", "q1")))
    assert choose_question([question], None, None) is question
    assert question == question_from("r1", {"request_id": "q1", "prompt": "p"})


def test_questions_are_told_apart_by_run_and_request() -> None:
    questions = open_questions(runs(("r1", "q"), ("r2", "q"), ("r2", "q2")))
    assert choose_question(questions, "r1", None) is questions[0]
    assert choose_question(questions, "r2", "q") is questions[1]
    with pytest.raises(ConfigurationError, match=r"--run r2 --request q: p; --run r2 --request q2"):
        choose_question(questions, "r2", None)
    with pytest.raises(ConfigurationError, match="no open question q3"):
        choose_question(questions, None, "q3")
    with pytest.raises(ConfigurationError, match="no open question"):
        choose_question([], None, None)


def test_example_is_json() -> None:
    for question in (APPROVAL, CHOICE, TITLED, TEXT):
        json.loads(question.example())
