from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from demo import build_worker
from quickstart import count_words

from relay.errors import ConfigurationError
from tests.unit.examples.recorded_run import RecordedRun

if TYPE_CHECKING:
    from pathlib import Path


def test_both_agents_are_registered_with_a_description() -> None:
    agents = build_worker({}).agents
    assert sorted(agents) == ["data", "docs"]
    assert all(agent.description for agent in agents.values())


def test_folders_and_pace_can_be_chosen(tmp_path: Path) -> None:
    environment = {"DOCS_AGENT_FOLDER": str(tmp_path), "DATA_AGENT_FOLDER": str(tmp_path)}
    assert build_worker({**environment, "EXAMPLE_PIECE_MS": "0"})
    assert build_worker({"DOCS_AGENT_FOLDER": "", "EXAMPLE_PIECE_MS": ""})


@pytest.mark.parametrize("name", ["DOCS_AGENT_FOLDER", "DATA_AGENT_FOLDER"])
def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is .*nowhere"):
        build_worker({name: str(tmp_path / "nowhere")})


@pytest.mark.parametrize("value", ["fast", "-1", "nan", "1001"])
def test_a_pace_that_makes_no_sense_is_named(value: str) -> None:
    with pytest.raises(ConfigurationError, match="EXAMPLE_PIECE_MS"):
        build_worker({"EXAMPLE_PIECE_MS": value})


async def test_the_quickstart_counts_words() -> None:
    run = RecordedRun("To be, or not to be")
    await count_words(run)
    assert run.text == (
        "Your text has 6 words, 4 of them distinct.\n\n"
        "- **to**: 2\n- **be**: 2\n- **or**: 1\n- **not**: 1\n"
    )
    assert run.tools[0].result == {"words": 6, "distinct": 4}
    empty = RecordedRun("!")
    await count_words(empty)
    assert empty.text.startswith("Your text has 0 words")
