from __future__ import annotations

import pytest
from docs_index import (
    MAX_TERMS,
    DocsIndex,
    match_expression,
    question_terms,
)
from docs_sections import split_sections
from hypothesis import given
from hypothesis import strategies as st

GUIDE = """\
# Guide

Everything about bicycles.

## Brakes

Squeaking brakes need cleaning. See relay-client.js and agent_started.

## Close codes

A code of 4401 means that the token has expired.

# Closing time

The code of the door changes; the shop closes late.
"""


@pytest.fixture
def index() -> DocsIndex:
    made = DocsIndex()
    made.replace("guide.md", split_sections("guide.md", GUIDE))
    return made


def headings(index: DocsIndex, question: str) -> list[str]:
    return [hit.heading for hit in index.search(question_terms(question), 5).hits]


# One index for all examples: making one is slower than searching it.
_INDEX = DocsIndex()
_INDEX.replace("guide.md", split_sections("guide.md", GUIDE))

hostile = st.one_of(
    st.text(),
    st.text(alphabet="\"'*()^:-+.{}[]\\/_ \0\tANDORTabcé\ud800中"),
    st.lists(
        st.sampled_from(["AND", "OR", "NOT", "NEAR(", '"', "*", "^a", "a:b", "heading:", "é", "_"])
    ).map(" ".join),
)


@given(hostile)
def test_no_question_breaks_the_search(question: str) -> None:
    terms = question_terms(question)
    assert len(terms) <= MAX_TERMS
    found = _INDEX.search(terms, 3)
    assert set(found.missing_terms) <= set(terms)
    for hit in found.hits:
        _INDEX.matching_lines(hit.section_id, found.terms, 2)


@given(st.lists(hostile, max_size=5))
def test_no_terms_break_the_query(terms: list[str]) -> None:
    _INDEX.search(terms, 3)
    assert match_expression(terms).count('"') % 2 == 0


def test_questions_lose_their_small_words_and_keep_compounds() -> None:
    assert question_terms("How does the relay-client.js use `agent_started`?") == [
        "relay-client.js",
        "agent_started",
    ]
    assert question_terms("what is this?") == []
    assert question_terms("Brakes, BRAKES!") == ["brakes"]


def test_words_match_in_all_their_forms(index: DocsIndex) -> None:
    assert headings(index, "squeaks when I brake") == ["Brakes"]
    assert headings(index, "AGENT_STARTED") == ["Brakes"]


def test_words_that_stand_together_count_more(index: DocsIndex) -> None:
    assert headings(index, "Which close codes are there?")[0] == "Close codes"


def test_terms_that_nothing_has_are_named(index: DocsIndex) -> None:
    found = index.search(["brakes", "helmet"], 3)
    assert [hit.heading for hit in found.hits] == ["Brakes"]
    assert found.missing_terms == ("helmet",)
    assert index.search(["helmet"], 3).hits == ()


def test_a_compound_that_nothing_has_gives_way_to_its_parts(index: DocsIndex) -> None:
    found = index.search(["brakes/helmet"], 3)
    assert found.terms == ("brakes",)
    assert found.missing_terms == ("brakes/helmet",)
    assert found.hits


def test_a_replaced_file_is_found_by_its_new_words_only(index: DocsIndex) -> None:
    index.replace("guide.md", split_sections("guide.md", "# Saddle\n\nSoft."))
    assert headings(index, "brakes") == []
    assert headings(index, "soft") == ["Saddle"]
    index.remove("guide.md")
    assert index.section_count() == 0
    assert headings(index, "soft") == []


def test_topics_are_files_with_their_headings(index: DocsIndex) -> None:
    index.replace("other.md", split_sections("other.md", "text only"))
    assert [(topic.file, topic.headings) for topic in index.topics(5)] == [
        ("guide.md", ("Guide", "Brakes", "Close codes", "Closing time")),
        ("other.md", ("other.md",)),
    ]
    assert len(index.topics(1)) == 1
