"""What an agent asks, and what a line typed in a terminal says to it: pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.cli.story import Say, printable
from relay.errors import ConfigurationError

_YES = ("y", "yes", "true")
_NO = ("n", "no", "false")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the values that a question allows."""

    value: Any
    label: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said to a question: a value, or that it is denied."""

    value: Any = None
    is_denied: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """An input request that is open.

    Attributes:
        kind: ``approval``, ``choice`` or ``text``.
        schema: What the value must fit, if there is more to say than the kind.
    """

    run_id: str
    request_id: str
    kind: str
    prompt: str
    schema: Mapping[str, Any] | None = None

    @property
    def choices(self) -> list[Choice]:
        """The values to choose from, none where anything may be said."""
        schema = self.schema or {}
        options = schema.get("enum") or schema.get("oneOf") or schema.get("anyOf") or []
        return [_choice(option) for option in options] if self.kind == "choice" else []

    @property
    def hint(self) -> str:
        """How to answer it by typing a line."""
        if self.kind == "approval":
            return "y or n"
        if self.choices:
            return f"a number from 1 to {len(self.choices)}"
        return "a line of text" if self._takes_text else "a line of JSON"

    @property
    def _takes_text(self) -> bool:
        return self.schema is None or self.schema.get("type") == "string"

    def lines(self) -> list[Say]:
        """Put the question to people."""
        lines = [Say("?", "care", self.prompt)]
        lines += [
            Say(str(number), "name", choice.label) for number, choice in enumerate(self.choices, 1)
        ]
        return lines

    def read_line(self, line: str) -> Answer:
        """Understand what was typed.

        Raises:
            ValueError: It is no answer; the text says what would be one.
        """
        typed = line.strip()
        if self.choices and typed.isdecimal() and 1 <= int(typed) <= len(self.choices):
            return Answer(self.choices[int(typed) - 1].value)
        return self.read_value(typed)

    def read_value(self, text: str) -> Answer:
        """Understand a value: JSON, or plain text where that is what is asked for.

        Raises:
            ValueError: It is no answer; the text says what would be one.
        """
        if self.kind == "approval":
            return self._read_approval(text)
        is_json, value = _parse(text)
        if self.choices:
            return self._read_choice(text, is_json=is_json, value=value)
        if not text.strip():
            raise ValueError(f"Type {self.hint}.")
        if self._takes_text:
            # What looks like a number may be meant as a text: only text is asked for.
            return Answer(value if is_json and isinstance(value, str) else text)
        if not is_json:
            raise ValueError(f"That is not JSON. Type {self.hint}.")
        return Answer(value)

    def _read_approval(self, text: str) -> Answer:
        word = text.strip().lower()
        if word in _YES:
            return Answer(True)
        if word in _NO:
            return Answer(is_denied=True)
        raise ValueError("Type y or n.")

    def _read_choice(self, text: str, *, is_json: bool, value: Any) -> Answer:
        for choice in self.choices:
            # True == 1, but they are different answers.
            if is_json and choice.value == value and type(choice.value) is type(value):
                return Answer(choice.value)
        for choice in self.choices:
            if choice.label.casefold() == text.strip().casefold():
                return Answer(choice.value)
        labels = ", ".join(choice.label for choice in self.choices)
        raise ValueError(f"Choose one of: {labels}.")

    def example(self) -> str:
        """Give a value for the command that answers it."""
        if self.kind == "approval":
            return "true"
        if self.choices:
            return json.dumps(self.choices[0].value, ensure_ascii=False)
        return '"…"' if self._takes_text else "JSON"

    def command(self, options: Sequence[str]) -> str:
        """Give the command that answers it.

        Args:
            options: Which user, at which gateway.
        """
        asked = ["--run", self.run_id, "--request", self.request_id, "--value", self.example()]
        return printable(shlex.join(["relay", "answer", *options, *asked]))


def question_from(run_id: str, fields: Mapping[str, Any]) -> Question:
    """Read the data of an ``input_requested``, or an item of ``open_inputs``."""
    return Question(
        run_id=run_id,
        request_id=str(fields["request_id"]),
        kind=str(fields.get("kind", "text")),
        prompt=str(fields.get("prompt", "")),
        schema=fields.get("schema"),
    )


def open_questions(runs: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Give the questions that a user's runs wait for."""
    return [
        question_from(str(run["run_id"]), fields)
        for run in runs
        for fields in run.get("open_inputs", ())
    ]


def choose_question(
    questions: Sequence[Question], run_id: str | None, request_id: str | None
) -> Question:
    """Give the one question that is meant.

    Raises:
        ConfigurationError: None is, or several may be; the text names them.
    """
    meant = [
        question
        for question in questions
        if run_id in (None, question.run_id) and request_id in (None, question.request_id)
    ]
    if len(meant) == 1:
        return meant[0]
    if not meant:
        where = f"Run {run_id}" if run_id else "This user"
        what = f"no open question {request_id}" if request_id else "no open question"
        raise ConfigurationError(f"{where} has {what}. It may have been answered, or have expired.")
    listed = "; ".join(
        f"--run {question.run_id} --request {question.request_id}: {printable(question.prompt)}"
        for question in meant
    )
    raise ConfigurationError(f"Several questions are open. Name one of: {listed}")


def _choice(option: Any) -> Choice:
    if isinstance(option, Mapping) and "const" in option:
        value = option["const"]
        return Choice(value, str(option.get("title", _label(value))))
    return Choice(option, _label(option))


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parse(text: str) -> tuple[bool, Any]:
    try:
        return True, json.loads(text)
    except ValueError:
        return False, None
