"""Finding the worker that ``relay worker MODULE:ATTR`` names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from agent_worker import Worker
from relay.errors import ConfigurationError


def load_worker(reference: str, app_dir: Path) -> Worker:
    """Import the module and give the worker in it.

    Args:
        reference: ``MODULE:ATTR``, e.g. ``agents:worker`` or ``shop.agents:worker``.
        app_dir: Folder that modules are looked for in first.

    Raises:
        ConfigurationError: There is no such module, attribute or worker, or the module fails.
            The text says which, where, and what to do.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigurationError(
            f"{reference!r} does not name a worker: write MODULE:ATTR, e.g. agents:worker for "
            "`worker = Worker()` in agents.py."
        )
    if module_name.endswith(".py") or "/" in module_name:
        raise ConfigurationError(
            f"{module_name!r} is a file; name the module instead: "
            f"{Path(module_name).stem}:{attribute}, with --app-dir for its folder."
        )
    if not app_dir.is_dir():
        raise ConfigurationError(f"The folder {app_dir} of --app-dir does not exist.")
    module = _import(module_name, app_dir.absolute())
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(_no_attribute(module, module_name, attribute))
        found = getattr(found, part)
    if not isinstance(found, Worker):
        raise ConfigurationError(
            f"{reference} is not a Worker but {_article(type(found).__name__)}. "
            "Name the object that was made with `worker = Worker()`."
        )
    return found


def _import(module_name: str, app_dir: Path) -> ModuleType:
    if str(app_dir) not in sys.path:
        sys.path.insert(0, str(app_dir))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ConfigurationError(
                f"There is no module {module_name!r} in {app_dir} or among the installed packages. "
                "Run the command in the folder of your module, or name that with --app-dir."
            ) from error
        raise ConfigurationError(
            f"The module {module_name!r} imports {missing!r}, which is not installed{_at(error)}."
        ) from error
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ConfigurationError(
            f"The module {module_name!r} has a syntax error in {error.filename}, "
            f"line {error.lineno}: {error.msg}{f' in `{line}`' if line else ''}."
        ) from error
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"The module {module_name!r} failed while it was imported: "
            f"{type(error).__name__}: {error}{_at(error)}."
        ) from error


def _at(error: BaseException) -> str:
    """Say where the author's code failed: the innermost frame that is not of the import system."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != importlib.__file__
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _no_attribute(module: ModuleType, module_name: str, attribute: str) -> str:
    workers = [name for name, value in vars(module).items() if isinstance(value, Worker)]
    if workers:
        hint = f"It has {' and '.join(f'{module_name}:{name}' for name in workers)}."
    else:
        hint = "It has no Worker at all: make one with `worker = Worker()`."
    return f"The module {module_name!r} has no {attribute!r}. {hint}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
