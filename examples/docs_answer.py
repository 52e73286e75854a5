"""Composes an answer from passages, each with its source. It says nothing that they do not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from docs_index import Hit, Topic
    from docs_sections import Block

MAX_QUOTED_LINES = 14
MAX_LINE_CHARS = 900

# Links into the folder lead nowhere from a chat; links to the web are kept.
_LOCAL_LINK = re.compile(r"!?\[([^\]]*)\]\((?!https?://)[^)]*\)")


@dataclass(frozen=True, slots=True)
class Passage:
    """A found section with the blocks of it that are quoted."""

    hit: Hit
    blocks: tuple[Block, ...]

    @property
    def lines(self) -> str:
        """The numbers of the quoted lines, such as ``12-14, 20``; the heading's without a quote."""
        spans: list[tuple[int, int]] = []
        for block in self.blocks:
            if spans and block.first_line <= spans[-1][1] + 2:
                spans[-1] = (spans[-1][0], block.last_line)
            else:
                spans.append((block.first_line, block.last_line))
        spans = spans or [(self.hit.line, self.hit.line)]
        return ", ".join(
            str(first) if first == last else f"{first}-{last}" for first, last in spans
        )

    def text(self) -> str:
        """The quoted lines as they stand in the file; very long ones are shortened."""
        return "\n".join(line for block in self.blocks for line in _lines(block))


def keep_relevant(hits: Sequence[Hit], share: float = 0.35) -> list[Hit]:
    """Drop hits that score below ``share`` of the best one."""
    return [hit for hit in hits if hit.score >= hits[0].score * share]


def compose_answer(
    passages: Sequence[Passage], terms: Sequence[str], missing_terms: Sequence[str]
) -> str:
    """Write the answer as Markdown: passages, best first, then the list of their sources.

    Args:
        passages: At least one.
        terms: The terms that were found.
        missing_terms: The terms that the folder does not have anywhere.
    """
    files = {passage.hit.file for passage in passages}
    about = f" on {', '.join(f'`{term}`' for term in terms)}" if terms else ""
    counts = f"{_count(len(passages), 'passage')} in {_count(len(files), 'file')}"
    parts = [f"{counts}{about}, best match first."]
    if missing_terms:
        parts.append(f"Nothing in the folder mentions {_any_of(missing_terms)}.")
    for number, passage in enumerate(passages, 1):
        parts.append(f"**{_escape(passage.hit.heading)}** [{number}]")
        quote = _quote(passage.blocks)
        if quote:
            parts.append(quote)
    sources = [
        f"{number}. `{passage.hit.file}`, {_escape(passage.hit.path)}, "
        f"{'lines' if re.search('[-,]', passage.lines) else 'line'} {passage.lines}"
        for number, passage in enumerate(passages, 1)
    ]
    parts.append("**Sources**\n\n" + "\n".join(sources))
    return "\n\n".join(parts) + "\n"


def compose_nothing_found(terms: Sequence[str], topics: Sequence[Topic], file_count: int) -> str:
    """Say that nothing matches, and what the folder does talk about."""
    if terms:
        opening = f"Nothing in the folder mentions {_any_of(terms)}."
    else:
        opening = "There is no word in the question that I could search for."
    parts = [opening, f"The folder's {_count(file_count, 'file')} talk about:"]
    lines = []
    for topic in topics:
        headings = list(dict.fromkeys(topic.headings))
        shown = ", ".join(_escape(heading) for heading in headings[:6])
        more = f", and {len(headings) - 6} more" if len(headings) > 6 else ""
        lines.append(f"- `{topic.file}`: {shown}{more}")
    if file_count > len(topics):
        lines.append(f"- and {_count(file_count - len(topics), 'more file')}")
    parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _lines(block: Block) -> list[str]:
    return [
        line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}…"
        for line in block.text.split("\n")
    ]


def _quote(blocks: Sequence[Block]) -> str:
    quoted: list[str] = []
    last_line = 0
    lead = ""
    for block in blocks:
        lines = _lines(block)
        room = MAX_QUOTED_LINES - len(quoted)
        if room < 1:
            quoted.append("…")
            break
        follows_on = block.first_line == last_line + 1 or (block.lead and block.lead == lead)
        if quoted and not follows_on:
            # A gap of more than an empty line is shown.
            quoted.append("" if block.first_line == last_line + 2 else "\n…\n")
        if block.lead and block.lead != lead:
            quoted.extend(block.lead.split("\n"))
        cut = lines[:room]
        if len(cut) < len(lines):
            cut.extend([cut[0].strip()[:3], "…"] if block.is_code else ["…"])
        quoted.extend(cut if block.is_code else [_LOCAL_LINK.sub(r"\1", line) for line in cut])
        last_line, lead = block.last_line, block.lead
    return "\n".join(f"> {line}".rstrip() for line in "\n".join(quoted).split("\n"))


def _escape(text: str) -> str:
    # An underscore within a word is no markup.
    return re.sub(r"([\\`*\[\]<>]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _any_of(words: Sequence[str]) -> str:
    shown = [f"`{word}`" for word in words]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
