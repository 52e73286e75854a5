from __future__ import annotations

from docs_sections import plain_text, split_sections
from hypothesis import given
from hypothesis import strategies as st

MARKDOWN = """\
---
title: ignored
---
Opening words.

# Guide to `relay`

First paragraph
on two lines.

## Setup ##

Steps:

- one
- two
  continued

```sh
# not a heading
make run
```

Setext heading
--------------

| code | meaning |
|------|---------|
| 1001 | going away |
| 1012 | drain |

#hashtag is text
"""


def test_sections_start_at_headings_and_know_what_is_above_them() -> None:
    sections = split_sections("a/guide.md", MARKDOWN)
    assert [(s.heading, s.trail, s.level, s.line) for s in sections] == [
        ("guide.md", (), 0, 4),
        ("Guide to relay", (), 1, 6),
        ("Setup", ("Guide to relay",), 2, 11),
        ("Setext heading", ("Guide to relay",), 2, 24),
    ]


def test_blocks_are_paragraphs_items_code_and_rows_with_their_lines() -> None:
    _, guide, setup, table = split_sections("guide.md", MARKDOWN)
    assert [(b.first_line, b.last_line) for b in guide.blocks] == [(8, 9)]
    assert [(b.first_line, b.last_line, b.is_code) for b in setup.blocks] == [
        (13, 13, False),
        (15, 15, False),
        (16, 17, False),
        (19, 22, True),
    ]
    assert [(b.text, b.lead) for b in table.blocks] == [
        ("| 1001 | going away |", "| code | meaning |\n|------|---------|"),
        ("| 1012 | drain |", "| code | meaning |\n|------|---------|"),
        ("#hashtag is text", ""),
    ]


def test_a_heading_without_text_and_an_unclosed_code_block_are_kept() -> None:
    first, second = split_sections("x.md", "# One\n# Two\n```\n# code")
    assert first.blocks == ()
    assert second.body == "```\n# code"


def test_an_empty_file_has_no_sections() -> None:
    assert split_sections("x.md", "") == []
    assert split_sections("x.md", "\n\n") == []


def test_headings_lose_their_markup() -> None:
    assert plain_text("Use *the* [`client`](x.md) ![](y.png)") == "Use the client"


markdown_lines = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["# a", "## b #", "===", "---", "- x", "```", "~~~", "| a | b |", "|--|--|", "1. y", ""]
    ),
)


@given(st.lists(markdown_lines, max_size=30))
def test_every_line_with_text_is_in_at_most_one_block_and_unchanged(lines: list[str]) -> None:
    text = "\n".join(lines)
    written = text.splitlines()
    seen: set[int] = set()
    for section in split_sections("x.md", text):
        assert section.heading
        for block in section.blocks:
            numbers = range(block.first_line, block.last_line + 1)
            assert not seen & set(numbers)
            seen |= set(numbers)
            assert block.text == "\n".join(written[number - 1] for number in numbers)
