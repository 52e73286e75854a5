"""What an author declares about an agent, checked when it is declared."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from relay.errors import ConfigurationError
from relay.run_model import ThreadPolicy

NAME_PATTERN = re.compile(r"[a-z0-9_-]{1,64}")
"""An agent's name is part of a key name and is typed by people."""

MAX_DESCRIPTION_CHARS = 500
DEFAULT_STALL_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class AgentDefinition:
    """An agent as its author declared it.

    Attributes:
        name: Unique within a worker; workers with the same agent share its tasks.
        function: Takes a ``Run`` (a coroutine function) or a ``SyncRun`` (a plain one).
        is_sync: Whether ``function`` is a plain function, which then runs in a thread.
        description: One sentence for the people who choose between agents.
        max_attempts: How often a run may be tried.
        stall_after_s: Silence after which a run counts as stalled.
        timeout_s: Longest time of one attempt; None sets no bound.
        policy: What happens to a request in a thread that has an active run.
    """

    name: str
    function: Callable[[Any], Any]
    is_sync: bool
    description: str
    max_attempts: int
    stall_after_s: float
    timeout_s: float | None
    policy: ThreadPolicy = "enqueue"


def define_agent(
    name: str,
    function: Callable[[Any], Any],
    *,
    description: str = "",
    max_attempts: int = 1,
    stall_after_s: float = DEFAULT_STALL_AFTER_S,
    timeout_s: float | None = None,
    policy: ThreadPolicy = "enqueue",
) -> AgentDefinition:
    """Check a declaration.

    Raises:
        ConfigurationError: A part is not allowed; the text names the agent and the part.
    """
    require_name("An agent's name", name)
    subject = f"Agent {name!r}"
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARS:
        raise ConfigurationError(
            f"{subject}: description must be text of at most {MAX_DESCRIPTION_CHARS} characters."
        )
    if not _is_whole(max_attempts) or not 1 <= max_attempts <= 100:
        raise ConfigurationError(
            f"{subject}: max_attempts={max_attempts!r} is not allowed. Allowed: a whole number "
            "from 1 to 100."
        )
    _require_duration(subject, "stall_after_s", stall_after_s)
    if timeout_s is not None:
        _require_duration(subject, "timeout_s", timeout_s)
    if policy not in get_args(ThreadPolicy):
        allowed = ", ".join(get_args(ThreadPolicy))
        raise ConfigurationError(
            f"{subject}: policy={policy!r} is not allowed. Allowed: {allowed}."
        )
    return AgentDefinition(
        name=name,
        function=function,
        is_sync=_is_sync(subject, function),
        description=description,
        max_attempts=max_attempts,
        stall_after_s=float(stall_after_s),
        timeout_s=None if timeout_s is None else float(timeout_s),
        policy=policy,
    )


def require_name(what: str, name: object) -> None:
    """Check the name of an agent or a worker.

    Raises:
        ConfigurationError: It is not 1 to 64 of the characters a-z 0-9 _ -.
    """
    if not isinstance(name, str) or NAME_PATTERN.fullmatch(name) is None:
        raise ConfigurationError(
            f"{what} cannot be {name!r}. Allowed: 1 to 64 of the characters a-z 0-9 _ -."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_duration(subject: str, part: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):  # type: ignore[arg-type, operator]
        raise ConfigurationError(
            f"{subject}: {part}={value!r} is not allowed. Allowed: seconds, more than 0."
        )


def _is_sync(subject: str, function: object) -> bool:
    if not callable(function):
        raise ConfigurationError(f"{subject}: {function!r} is not a function.")
    # An instance with an async __call__ is as good as a coroutine function.
    bodies = (function, getattr(function, "__call__", None))  # noqa: B004
    if any(
        inspect.isasyncgenfunction(body) or inspect.isgeneratorfunction(body) for body in bodies
    ):
        raise ConfigurationError(
            f"{subject}: the function yields. Publish pieces with run.delta(text) and return "
            "the result."
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{subject}: the function has no readable signature.") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) != 1 or parameters[0].kind not in positional:
        listed = ", ".join(str(parameter) for parameter in parameters)
        raise ConfigurationError(
            f"{subject}: the function must have exactly one parameter, the run; it has "
            f"({listed}). Bind everything else beforehand, with functools.partial or a method."
        )
    return not any(inspect.iscoroutinefunction(body) for body in bodies)
