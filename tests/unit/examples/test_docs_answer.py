from __future__ import annotations

from docs_answer import (
    MAX_LINE_CHARS,
    MAX_QUOTED_LINES,
    Passage,
    compose_answer,
    compose_nothing_found,
    keep_relevant,
)
from docs_index import Hit, Topic
from docs_sections import Block


def hit(score: float = 1.0, heading: str = "Brakes", line: int = 5) -> Hit:
    return Hit(1, "guide.md", heading, "Guide", line, score)


def test_an_answer_quotes_its_passages_and_names_their_sources() -> None:
    passage = Passage(hit(), (Block(7, 8, "Brakes squeak.\nClean them."),))
    answer = compose_answer([passage], ["brakes"], ["helmet"])
    assert answer == (
        "1 passage in 1 file on `brakes`, best match first.\n\n"
        "Nothing in the folder mentions `helmet`.\n\n"
        "**Brakes** [1]\n\n"
        "> Brakes squeak.\n> Clean them.\n\n"
        "**Sources**\n\n"
        "1. `guide.md`, Guide › Brakes, lines 7-8\n"  # noqa: RUF001
    )


def test_lines_that_stand_apart_are_shown_apart() -> None:
    blocks = (Block(6, 6, "- a"), Block(7, 7, "- b"), Block(9, 9, "two"), Block(20, 21, "x\ny"))
    passage = Passage(hit(), blocks)
    assert passage.lines == "6-9, 20-21"
    assert "> - a\n> - b\n>\n> two\n>\n> …\n>\n> x\n> y" in compose_answer([passage], [], [])


def test_table_rows_are_quoted_under_their_header_once() -> None:
    lead = "| a | b |\n|---|---|"
    passage = Passage(hit(), (Block(7, 7, "| 1 | 2 |", lead), Block(9, 9, "| 5 | 6 |", lead)))
    assert "> | a | b |\n> |---|---|\n> | 1 | 2 |\n> | 5 | 6 |" in compose_answer([passage], [], [])


def test_a_long_code_block_is_cut_and_still_closed() -> None:
    code = "```py\n" + "\n".join(f"line {number}" for number in range(40)) + "\n```"
    answer = compose_answer([Passage(hit(), (Block(7, 48, code),))], [], [])
    quoted = [line for line in answer.splitlines() if line.startswith(">")]
    assert quoted[-2:] == ["> ```", "> …"]
    assert len(quoted) <= MAX_QUOTED_LINES + 2


def test_a_very_long_line_is_shortened() -> None:
    passage = Passage(hit(), (Block(7, 7, "x" * 100_000),))
    assert len(compose_answer([passage], [], [])) < 2 * MAX_LINE_CHARS


def test_links_into_the_folder_become_text_and_headings_no_markup() -> None:
    block = Block(7, 7, "See [the guide](../guide.md) or [web](https://example.org).")
    answer = compose_answer([Passage(hit(heading="<b>*x*</b> a_b"), (block,))], [], [])
    assert "> See the guide or [web](https://example.org)." in answer
    assert r"\<b\>\*x\*\</b\> a_b" in answer


def test_a_heading_without_text_is_cited_by_its_line() -> None:
    passage = Passage(hit(line=5), ())
    assert compose_answer([passage], [], []).endswith("Brakes, line 5\n")


def test_weak_matches_are_dropped() -> None:
    kept = keep_relevant([hit(10.0), hit(5.0), hit(1.0)])
    assert [one.score for one in kept] == [10.0, 5.0]
    assert keep_relevant([]) == []


def test_without_a_match_the_real_topics_are_listed() -> None:
    topics = [Topic("a.md", ("One", "Two", "Two")), Topic("b.md", tuple("abcdefgh"))]
    assert compose_nothing_found(["helmet", "bell"], topics, 3) == (
        "Nothing in the folder mentions `helmet` or `bell`.\n\n"
        "The folder's 3 files talk about:\n\n"
        "- `a.md`: One, Two\n"
        "- `b.md`: a, b, c, d, e, f, and 2 more\n"
        "- and 1 more file\n"
    )
    assert compose_nothing_found([], topics, 2).startswith("There is no word in the question")
