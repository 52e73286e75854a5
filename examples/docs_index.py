"""Full-text search over sections of Markdown, with SQLite's FTS5."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from docs_sections import Block, Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_TERMS = 24
MAX_TERM_CHARS = 64

_COMPOUND = re.compile(r"\w+(?:[-._:/]\w+)*")
_PART = re.compile(r"[^\W_]+")
# Words that a question needs and a search does not.
_STOP_WORDS_TEXT = """
a about also am an and any are as at be been but by can could did do does explain find for
from get give go goes going had happen happens has have how i if in into is it its just
list may me mean means my no not of on only or please say shall should show so some tell than that
the their them then there these they this those to too us use used uses using was we were what whats
when where which who whose why will with work works would you your
"""
_STOP_WORDS = frozenset(_STOP_WORDS_TEXT.split())

_SCHEMA = """
CREATE TABLE section (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL, heading TEXT NOT NULL, trail TEXT NOT NULL,
    line INTEGER NOT NULL, level INTEGER NOT NULL);
CREATE INDEX section_file ON section (file);
CREATE TABLE block (
    id INTEGER PRIMARY KEY, section INTEGER NOT NULL, first_line INTEGER NOT NULL,
    last_line INTEGER NOT NULL, text TEXT NOT NULL, lead TEXT NOT NULL);
CREATE INDEX block_section ON block (section);
CREATE VIRTUAL TABLE section_text USING fts5(
    heading, trail, body, tokenize = 'porter unicode61 remove_diacritics 2');
CREATE VIRTUAL TABLE block_text USING fts5(
    text, tokenize = 'porter unicode61 remove_diacritics 2');
"""
_TRAIL_SEPARATOR = " › "  # noqa: RUF001  (the sign that separates headings in a trail)
# A word in a heading says what a section is about; one in its text is only mentioned.
_RANK = "bm25(section_text, 5.0, 2.0, 1.0)"


class SearchUnavailableError(Exception):
    """The folder cannot be searched on this machine; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A section that matches a question.

    Attributes:
        section_id: Its number in the index.
        file: Path below the folder.
        heading: Its heading.
        trail: The headings above it, joined.
        line: Number of the heading's line.
        score: Higher is better; comparable within one search only.
    """

    section_id: int
    file: str
    heading: str
    trail: str
    line: int
    score: float

    @property
    def path(self) -> str:
        """The heading with those above it."""
        return f"{self.trail}{_TRAIL_SEPARATOR}{self.heading}" if self.trail else self.heading


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gave.

    Attributes:
        hits: The best sections, best first.
        terms: The terms that were found; a compound that no section has gives way to
            its parts.
        missing_terms: The given terms that no section has.
    """

    hits: tuple[Hit, ...] = ()
    terms: tuple[str, ...] = ()
    missing_terms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Topic:
    """A file and its headings, in order."""

    file: str
    headings: tuple[str, ...]


def question_terms(question: str) -> list[str]:
    """Give the words of a question that are worth searching for, in order, each once.

    Compounds such as ``relay-client.js`` or ``agent_started`` stay whole.
    """
    terms: dict[str, None] = {}
    for match in _COMPOUND.finditer(question):
        word = match.group().strip("_").lower()[:MAX_TERM_CHARS]
        if word not in _STOP_WORDS and _PART.search(word):
            terms[word] = None
        if len(terms) == MAX_TERMS:
            break
    return list(terms)


def match_expression(terms: Sequence[str]) -> str:
    """Build an FTS5 query that matches any of ``terms``; any text at all is safe.

    Every term is a quoted string, so that no character of it can be an operator. A
    compound is searched as a phrase. Neighbours are searched as a phrase as well, so
    that the words of "close codes" count more where they stand together. No terms
    give an empty string, which must not be run.
    """
    phrases = [phrase for term in terms if (phrase := _phrase(term))]
    neighbours = [f"{first} {second}" for first, second in pairwise(phrases)]
    return " OR ".join(f'"{words}"' for words in dict.fromkeys(phrases + neighbours))


def _phrase(term: str) -> str:
    return " ".join(_PART.findall(term))


class DocsIndex:
    """Sections in an SQLite database in memory. Not for several threads at once."""

    def __init__(self) -> None:
        # The library below hands it from thread to thread, one at a time.
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._database.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self._database.close()
            raise SearchUnavailableError(
                "The SQLite library of this Python was built without FTS5; "
                "use a Python whose SQLite has it."
            ) from error

    def close(self) -> None:
        """Free the memory."""
        self._database.close()

    def replace(self, file: str, sections: Iterable[Section]) -> None:
        """Put a file's sections in place of those that it had."""
        with self._database:
            self._delete(file)
            for section in sections:
                self._insert(section)

    def remove(self, file: str) -> None:
        """Forget a file."""
        with self._database:
            self._delete(file)

    def section_count(self) -> int:
        """Give the number of sections."""
        count: int = self._database.execute("SELECT count(*) FROM section").fetchone()[0]
        return count

    def search(self, terms: Sequence[str], limit: int) -> Found:
        """Give the ``limit`` best sections for ``terms``, best first.

        The order is bm25, with a preference for sections that have more of the terms.
        """
        missing = tuple(term for term in terms if not self._sections_with(term))
        candidates = [
            part
            for term in terms
            for part in ([term] if term not in missing else _PART.findall(term))
            if part not in _STOP_WORDS
        ]
        holders = {term: self._sections_with(term) for term in candidates}
        found = tuple(term for term in holders if holders[term])
        if not found:
            return Found(missing_terms=missing)
        rows = self._database.execute(
            f"SELECT s.id, s.file, s.heading, s.trail, s.line, {_RANK} "  # noqa: S608  (constant)
            "FROM section_text JOIN section s ON s.id = section_text.rowid "
            f"WHERE section_text MATCH ? ORDER BY {_RANK}, s.id LIMIT 60",
            (match_expression(found),),
        ).fetchall()
        hits = []
        for section_id, file, heading, trail, line, rank in rows:
            covered = sum(section_id in holders[term] for term in found) / len(found)
            score = -rank * (0.4 + 0.6 * covered)
            hits.append(Hit(section_id, file, heading, trail, line, score))
        hits.sort(key=lambda hit: (-hit.score, hit.file, hit.line))
        return Found(tuple(hits[:limit]), found, missing)

    def blocks(self, section_id: int) -> list[Block]:
        """Give the blocks of a section, in order."""
        rows = self._database.execute(
            "SELECT first_line, last_line, text, lead FROM block WHERE section = ? ORDER BY id",
            (section_id,),
        )
        return [Block(*row) for row in rows]

    def matching_lines(self, section_id: int, terms: Sequence[str], limit: int) -> list[int]:
        """Give the first lines of a section's best blocks for ``terms``, best first.

        Blocks that are less than half as good as the best one are left out.
        """
        expression = match_expression(terms)
        if not expression:
            return []
        rows = self._database.execute(
            "SELECT block.first_line, bm25(block_text) "
            "FROM block_text JOIN block ON block.id = block_text.rowid "
            "WHERE block_text MATCH ? AND block.section = ? "
            "ORDER BY bm25(block_text), block.id LIMIT ?",
            (expression, section_id, limit),
        ).fetchall()
        # bm25 is negative, and lower is better.
        return [line for line, rank in rows if rank <= rows[0][1] / 2]

    def topics(self, limit: int) -> list[Topic]:
        """Give the first ``limit`` files by name, each with its headings."""
        topics: dict[str, list[str]] = {}
        for file, heading in self._database.execute(
            "SELECT file, heading FROM section WHERE level <= 2 ORDER BY file, id"
        ):
            if file not in topics and len(topics) == limit:
                break
            topics.setdefault(file, []).append(heading)
        return [Topic(file, tuple(headings)) for file, headings in topics.items()]

    def _sections_with(self, term: str) -> set[int]:
        rows = self._database.execute(
            "SELECT rowid FROM section_text WHERE section_text MATCH ?", (f'"{_phrase(term)}"',)
        )
        return {row[0] for row in rows}

    def _insert(self, section: Section) -> None:
        trail = _TRAIL_SEPARATOR.join(section.trail)
        section_id = self._database.execute(
            "INSERT INTO section (file, heading, trail, line, level) VALUES (?, ?, ?, ?, ?)",
            (section.file, section.heading, trail, section.line, section.level),
        ).lastrowid
        self._database.execute(
            "INSERT INTO section_text (rowid, heading, trail, body) VALUES (?, ?, ?, ?)",
            (section_id, section.heading, trail, section.body),
        )
        for block in section.blocks:
            block_id = self._database.execute(
                "INSERT INTO block (section, first_line, last_line, text, lead) "
                "VALUES (?, ?, ?, ?, ?)",
                (section_id, block.first_line, block.last_line, block.text, block.lead),
            ).lastrowid
            self._database.execute(
                "INSERT INTO block_text (rowid, text) VALUES (?, ?)", (block_id, block.text)
            )

    def _delete(self, file: str) -> None:
        for statement in (
            """DELETE FROM block_text WHERE rowid IN (SELECT block.id FROM block
               JOIN section ON section.id = block.section WHERE section.file = ?)""",
            "DELETE FROM block WHERE section IN (SELECT id FROM section WHERE file = ?)",
            "DELETE FROM section_text WHERE rowid IN (SELECT id FROM section WHERE file = ?)",
            "DELETE FROM section WHERE file = ?",
        ):
            self._database.execute(statement, (file,))
