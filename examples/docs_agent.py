"""An agent that answers questions about a folder of Markdown, with its sources.

It searches; it does not invent. If nothing matches, it says so and lists what the folder
talks about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from docs_answer import Passage, compose_answer, compose_nothing_found, keep_relevant
from docs_index import Found, SearchUnavailableError, question_terms
from docs_library import DocsLibrary, Refreshed
from streaming import Pace, stream

from agent_worker import AgentError, Run

DESCRIPTION = "Answers questions about a folder of Markdown, with quoted and cited passages."
MAX_PASSAGES = 3
MAX_BLOCKS_PER_PASSAGE = 2
MAX_TOPICS = 12


def default_docs_folder() -> Path:
    """Give the documents that come with the examples: beside them, or within a wheel below."""
    here = Path(__file__).resolve().parent
    shipped = here / "docs"
    return shipped if shipped.is_dir() else here.parent / "docs"


def build_docs_agent(folder: Path, pace: Pace | None = None) -> Callable[[Run], Awaitable[str]]:
    """Make an agent for ``folder``. Nothing is read before the first question.

    Args:
        folder: Markdown files, in subfolders too. Changed files are read again by
            themselves.
        pace: How quickly answers are streamed.
    """
    return _DocsAgent(DocsLibrary(folder), pace or Pace()).answer


class _DocsAgent:
    def __init__(self, library: DocsLibrary, pace: Pace) -> None:
        self._library = library
        self._pace = pace

    async def answer(self, run: Run) -> str:
        """Answer the question of one run."""
        terms = question_terms(run.request.content)
        await run.thinking(
            f"Looking for: {', '.join(terms)}" if terms else "The question has no word to look for",
            step=1,
            total_steps=3,
        )
        refreshed = await self._refresh(run)
        found = await self._search(run, terms)
        if not found.hits:
            await run.thinking("No passage matches; listing the topics", step=3, total_steps=3)
            topics = await asyncio.to_thread(self._library.topics, MAX_TOPICS)
            text = compose_nothing_found(terms, topics, refreshed.files)
        else:
            best = found.hits[0]
            await run.thinking(
                f"The best match is “{best.heading}” in {best.file}", step=2, total_steps=3
            )
            passages = await self._read_passages(run, found)
            await run.thinking("Composing the answer from the passages", step=3, total_steps=3)
            text = compose_answer(passages, found.terms, found.missing_terms)
        await stream(run, text, self._pace)
        return run.text

    async def _refresh(self, run: Run) -> Refreshed:
        purpose = "Read files that are new or changed"
        async with run.tool("read_folder", {"folder": self._library.folder.name}, purpose) as tool:
            try:
                refreshed = await asyncio.to_thread(self._library.refresh)
            except SearchUnavailableError as error:
                raise AgentError(
                    "agent_failed",
                    str(error),
                    is_recoverable=False,
                    recovery_suggestions=["Tell whoever runs this worker."],
                ) from error
            tool.result = {
                "files": refreshed.files,
                "sections": refreshed.sections,
                "changed_files": refreshed.changed_files,
            }
        if not refreshed.sections:
            raise AgentError(
                "agent_failed",
                "The folder of documents has no Markdown with text in it.",
                is_recoverable=False,
                recovery_suggestions=["Set DOCS_AGENT_FOLDER to a folder of .md files."],
            )
        return refreshed

    async def _search(self, run: Run, terms: list[str]) -> Found:
        parameters = {"terms": terms, "limit": MAX_PASSAGES}
        async with run.tool("search", parameters, "Rank the sections by full-text search") as tool:
            found = await asyncio.to_thread(self._library.search, terms, MAX_PASSAGES)
            found = replace(found, hits=tuple(keep_relevant(found.hits)))
            tool.result = {
                "hits": [
                    {"file": hit.file, "heading": hit.path, "score": round(hit.score, 4)}
                    for hit in found.hits
                ],
                "missing_terms": list(found.missing_terms),
            }
        return found

    async def _read_passages(self, run: Run, found: Found) -> list[Passage]:
        parameters = {"sections": [f"{hit.file}:{hit.line}" for hit in found.hits]}
        purpose = "Read the lines that answer best"
        async with run.tool("read_passages", parameters, purpose) as tool:
            passages = []
            for hit in found.hits:
                blocks = await asyncio.to_thread(
                    self._library.read, hit, found.terms, MAX_BLOCKS_PER_PASSAGE
                )
                passages.append(Passage(hit, tuple(blocks)))
            tool.result = [
                {"file": passage.hit.file, "lines": passage.lines, "text": passage.text()}
                for passage in passages
            ]
        return passages
