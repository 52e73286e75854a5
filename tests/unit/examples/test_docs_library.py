from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from docs_index import SearchUnavailableError
from docs_library import DocsLibrary, choose_blocks
from docs_sections import Block

if TYPE_CHECKING:
    from pathlib import Path


def blocks(*texts: str) -> list[Block]:
    return [Block(number, number, text) for number, text in enumerate(texts, 1)]


def test_the_best_blocks_are_chosen_in_the_files_order() -> None:
    chosen = choose_blocks(blocks("a", "b", "c"), best_lines=[3, 1])
    assert [block.text for block in chosen] == ["a", "c"]


def test_a_section_that_matched_by_its_heading_opens_with_its_first_block() -> None:
    assert [block.text for block in choose_blocks(blocks("a", "b"), [])] == ["a"]
    assert choose_blocks([], []) == []


def test_a_sentence_that_announces_something_takes_it_along() -> None:
    chosen = choose_blocks(blocks("Steps:", "- a", "- b"), best_lines=[1])
    assert [block.text for block in chosen] == ["Steps:", "- a", "- b"]


def test_only_changed_files_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# Apple\n\nred", encoding="utf-8")
    (tmp_path / "deep" / "b.md").write_text("# Banana\n\nyellow", encoding="utf-8")
    library = DocsLibrary(tmp_path)
    assert library.refresh().changed_files == 2
    assert library.refresh().changed_files == 0
    (tmp_path / "a.md").write_text("# Apple\n\ngreen now", encoding="utf-8")
    os.utime(tmp_path / "a.md", (1, 1))
    assert library.refresh().changed_files == 1
    assert library.search(["green"], 3).hits[0].file == "a.md"
    assert library.search(["red"], 3).hits == ()
    (tmp_path / "deep" / "b.md").unlink()
    refreshed = library.refresh()
    assert (refreshed.files, refreshed.changed_files) == (1, 1)
    assert library.search(["yellow"], 3).hits == ()


def test_hidden_files_and_links_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "x.md").write_text("# Hidden", encoding="utf-8")
    (tmp_path / "secret.md").write_text("# Secret", encoding="utf-8")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    (folder / "broken.md").symlink_to(tmp_path / "nowhere.md")
    (folder / "bytes.md").write_bytes(b"# Caf\xe9\n\n\xff\xfe\x00")
    refreshed = DocsLibrary(folder).refresh()
    assert (refreshed.files, refreshed.sections) == (1, 1)


def test_a_missing_folder_is_named_by_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(SearchUnavailableError, match="DOCS_AGENT_FOLDER"):
        DocsLibrary(tmp_path / "nowhere").refresh()


def test_a_library_serves_several_threads(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Brakes\n\nSqueaking brakes.", encoding="utf-8")
    library = DocsLibrary(tmp_path)
    found: list[int] = []

    def ask() -> None:
        library.refresh()
        found.append(len(library.search(["brakes"], 3).hits))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8
