"""A folder of Markdown that is searched as it is now: changed files are indexed again."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from docs_index import DocsIndex, Found, Hit, SearchUnavailableError, Topic
from docs_sections import Block, split_sections

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_FILES = 5_000
MAX_FILE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What a look at the folder gave."""

    files: int
    sections: int
    changed_files: int


class DocsLibrary:
    """A folder of Markdown, and an index that follows its files.

    Every method reads files or the database, so it belongs in a thread; all of them
    may be called from several threads at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._index: DocsIndex | None = None
        self._stamps: dict[str, tuple[int, int]] = {}

    def refresh(self) -> Refreshed:
        """Read the files that changed since the last call; the first call reads all.

        Raises:
            SearchUnavailableError: The folder is missing, or SQLite has no FTS5.
        """
        with self._lock:
            stamps = self._scan()
            index = self._index = self._index or DocsIndex()
            gone = self._stamps.keys() - stamps.keys()
            changed = [file for file in stamps if stamps[file] != self._stamps.get(file)]
            for file in gone:
                index.remove(file)
                del self._stamps[file]
            for file in changed:
                try:
                    content = (self.folder / file).read_bytes()
                except FileNotFoundError:
                    # Deleted since the scan; the next refresh forgets it.
                    continue
                text = content.decode("utf-8", errors="replace").removeprefix("\ufeff")
                index.replace(file, split_sections(file, text))
                self._stamps[file] = stamps[file]
            return Refreshed(len(self._stamps), index.section_count(), len(changed) + len(gone))

    def search(self, terms: Sequence[str], limit: int) -> Found:
        """Give the best sections for ``terms`` as of the last refresh."""
        with self._lock:
            return self._ready().search(terms, limit)

    def read(self, hit: Hit, terms: Sequence[str], block_count: int) -> list[Block]:
        """Give the blocks of a found section that answer best, in the file's order."""
        with self._lock:
            index = self._ready()
            best = index.matching_lines(hit.section_id, terms, block_count)
            return choose_blocks(index.blocks(hit.section_id), best)

    def topics(self, limit: int) -> list[Topic]:
        """Give what the folder talks about: files and headings."""
        with self._lock:
            return self._ready().topics(limit)

    def _ready(self) -> DocsIndex:
        if self._index is None:
            raise SearchUnavailableError("The folder has not been read yet; refresh it first.")
        return self._index

    def _scan(self) -> dict[str, tuple[int, int]]:
        if not self.folder.is_dir():
            raise SearchUnavailableError(
                "The folder of documents does not exist; set DOCS_AGENT_FOLDER to one that does."
            )
        root = self.folder.resolve()
        stamps: dict[str, tuple[int, int]] = {}
        for path in sorted(self.folder.rglob("*.md")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            # A link that leaves the folder would publish files that nobody put there.
            if hidden or not path.is_file() or not path.resolve().is_relative_to(root):
                continue
            status = path.stat()
            if status.st_size <= MAX_FILE_BYTES:
                stamps[relative.as_posix()] = (status.st_mtime_ns, status.st_size)
            if len(stamps) == MAX_FILES:
                break
        return stamps


def choose_blocks(blocks: Sequence[Block], best_lines: Sequence[int]) -> list[Block]:
    """Choose what to quote from a section, given the first lines of its best blocks.

    Without a best block, its heading was what matched: then it is the section's opening.
    A sentence that ends in a colon takes along what it announces.
    """
    if not blocks:
        return []
    wanted = set(best_lines) or {blocks[0].first_line}
    chosen: list[Block] = []
    room = 0
    for block in blocks:
        if block.first_line in wanted or room > 0:
            room = max(room - 1, 0)
            chosen.append(block)
            if block.text.rstrip().endswith(":"):
                room = 6
    return chosen
