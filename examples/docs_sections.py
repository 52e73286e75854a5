"""Cuts Markdown into sections at its headings, and sections into blocks that can be quoted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ATX_HEADING = re.compile(r" {0,3}(#{1,6})(?=[ \t]|$)")
_SETEXT_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,9}[.)])\s+\S")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list item, table row or code block.

    Attributes:
        first_line: Number of its first line in the file, from 1.
        last_line: Number of its last line, included.
        text: Its lines, unchanged.
        lead: A table row's header lines; empty for everything else.
    """

    first_line: int
    last_line: int
    text: str
    lead: str = ""

    @property
    def is_code(self) -> bool:
        """Whether it is a fenced code block."""
        return _FENCE.match(self.text) is not None


@dataclass(frozen=True, slots=True)
class Section:
    """What stands between one heading and the next.

    Attributes:
        file: Path below the folder, with ``/``.
        heading: Its heading as plain text; the file's name for text above the first heading.
        trail: The headings above it, outermost first, without its own.
        line: Number of the heading's line, from 1.
        level: Depth of the heading, 1 to 6; 0 for text above the first heading.
        blocks: Its text.
    """

    file: str
    heading: str
    trail: tuple[str, ...]
    line: int
    level: int
    blocks: tuple[Block, ...]

    @property
    def body(self) -> str:
        """All text below the heading."""
        return "\n".join(block.text for block in self.blocks)


@dataclass(frozen=True, slots=True)
class _Heading:
    level: int
    text: str
    line: int
    body_from: int


def split_sections(file: str, text: str) -> list[Section]:
    """Cut a Markdown file at its headings; any text at all gives a valid result.

    Headings inside code blocks and front matter are text, not headings. A heading
    without text below it is a section too: it can be found, and its trail is kept.
    """
    lines = text.splitlines()
    start = _front_matter_end(lines)
    headings = list(_headings(lines, start))
    sections = []
    before = headings[0].line - 1 if headings else len(lines)
    opening = tuple(_blocks(lines, start, before))
    if opening:
        sections.append(Section(file, file.rpartition("/")[2], (), start + 1, 0, opening))
    open_headings: list[_Heading] = []
    for index, heading in enumerate(headings):
        end = headings[index + 1].line - 1 if index + 1 < len(headings) else len(lines)
        while open_headings and open_headings[-1].level >= heading.level:
            open_headings.pop()
        trail = tuple(above.text for above in open_headings)
        blocks = tuple(_blocks(lines, heading.body_from, end))
        sections.append(Section(file, heading.text, trail, heading.line, heading.level, blocks))
        open_headings.append(heading)
    return sections


def plain_text(markdown: str) -> str:
    """Give a heading without its inline markup."""
    return re.sub(r"[`*]", "", _LINK.sub(r"\1", markdown)).strip()


def _front_matter_end(lines: Sequence[str]) -> int:
    if lines and lines[0].rstrip() == "---":
        for index, line in enumerate(lines[1:], 1):
            if line.rstrip() in ("---", "..."):
                return index + 1
    return 0


def _headings(lines: Sequence[str], start: int) -> Iterator[_Heading]:
    index = start
    while index < len(lines):
        line = lines[index]
        if _FENCE.match(line):
            index = _fence_end(lines, index, len(lines))
            continue
        if match := _ATX_HEADING.match(line):
            name = plain_text(_without_closing_marks(line[match.end() :]))
            yield _Heading(len(match.group(1)), name or "(untitled)", index + 1, index + 1)
        elif _is_setext_heading(lines, index):
            level = 1 if lines[index + 1].lstrip().startswith("=") else 2
            yield _Heading(level, plain_text(line) or "(untitled)", index + 1, index + 2)
            index += 1
        index += 1


def _without_closing_marks(text: str) -> str:
    text = text.strip()
    rest = text.rstrip("#")
    return rest if not rest or rest[-1] in " \t" else text


def _is_setext_heading(lines: Sequence[str], index: int) -> bool:
    line = lines[index]
    starts_paragraph = index == 0 or not lines[index - 1].strip()
    return (
        starts_paragraph
        and index + 1 < len(lines)
        and bool(line.strip())
        and "|" not in line
        and not _LIST_ITEM.match(line)
        and not line.startswith((">", "    ", "\t"))
        and not _SETEXT_UNDERLINE.match(line)
        and _SETEXT_UNDERLINE.match(lines[index + 1]) is not None
    )


def _fence_end(lines: Sequence[str], index: int, end: int) -> int:
    """Give the index after the code block that opens at ``index``; unclosed: ``end``."""
    opening = _FENCE.match(lines[index])
    if opening is None:
        return index + 1
    mark = opening.group(1)
    for position in range(index + 1, end):
        stripped = lines[position].strip()
        if stripped.startswith(mark) and not stripped.strip(mark[0]):
            return position + 1
    return end


def _blocks(lines: Sequence[str], start: int, end: int) -> Iterator[Block]:
    index = start
    while index < end:
        if not lines[index].strip():
            index += 1
        elif _FENCE.match(lines[index]):
            after = _fence_end(lines, index, end)
            yield _block(lines, index, after)
            index = after
        elif _is_table(lines, index, end):
            lead = "\n".join(lines[index : index + 2])
            index += 2
            while index < end and "|" in lines[index]:
                yield Block(index + 1, index + 1, lines[index], lead)
                index += 1
        else:
            after = index + 1
            while after < end and not _starts_block(lines, after, end):
                after += 1
            yield _block(lines, index, after)
            index = after


def _block(lines: Sequence[str], start: int, after: int) -> Block:
    return Block(start + 1, after, "\n".join(lines[start:after]))


def _is_table(lines: Sequence[str], index: int, end: int) -> bool:
    return (
        index + 1 < end
        and "|" in lines[index]
        and "|" in lines[index + 1]
        and all(
            "-" in cell and not cell.strip(" \t:-")
            for cell in lines[index + 1].strip().strip("|").split("|")
        )
    )


def _starts_block(lines: Sequence[str], index: int, end: int) -> bool:
    line = lines[index]
    return (
        not line.strip()
        or _FENCE.match(line) is not None
        or _LIST_ITEM.match(line) is not None
        or _is_table(lines, index, end)
    )
