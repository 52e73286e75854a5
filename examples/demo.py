"""The worker that ``relay up`` starts: ``relay worker demo:worker`` in this folder.

Variables, read here and nowhere else: ``DOCS_AGENT_FOLDER`` (Markdown to answer from),
``DATA_AGENT_FOLDER`` (tables that may be read), ``EXAMPLE_PIECE_MS`` (time from one
streamed word to the next; 0 streams at full speed).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import data_agent
import docs_agent
from streaming import Pace

from agent_worker import Worker
from relay.errors import ConfigurationError


def build_worker(environment: Mapping[str, str]) -> Worker:
    """Put the example agents together as ``environment`` says.

    Raises:
        ConfigurationError: A variable has a value that makes no sense; the text names both.
    """
    docs_folder = _folder(environment, "DOCS_AGENT_FOLDER", docs_agent.default_docs_folder())
    data_folder = _folder(environment, "DATA_AGENT_FOLDER", data_agent.default_data_folder())
    pace = Pace(piece_ms=_piece_ms(environment))
    worker = Worker(name="demo")
    worker.agent("docs", description=docs_agent.DESCRIPTION)(
        docs_agent.build_docs_agent(docs_folder, pace)
    )
    worker.agent("data", description=data_agent.DESCRIPTION)(
        data_agent.build_data_agent(data_folder, pace)
    )
    return worker


def _folder(environment: Mapping[str, str], name: str, default: Path) -> Path:
    folder = Path(environment.get(name) or default)
    if environment.get(name) and not folder.is_dir():
        raise ConfigurationError(
            f"{name} is {folder}, which is no folder; set it to one or unset it"
        )
    return folder


def _piece_ms(environment: Mapping[str, str]) -> float:
    given = environment.get("EXAMPLE_PIECE_MS") or str(Pace().piece_ms)
    try:
        piece_ms = float(given)
    except ValueError:
        piece_ms = -1.0
    if not 0 <= piece_ms <= 1_000:
        raise ConfigurationError(
            f"EXAMPLE_PIECE_MS is {given!r}; allowed are 0 to 1000 milliseconds"
        )
    return piece_ms


worker = build_worker(os.environ)
