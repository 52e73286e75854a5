"""The agents on a recorded run: which events they cause, what they answer, how they fail."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from data_agent import ResamplingPlan, build_data_agent, default_data_folder
from docs_agent import build_docs_agent, default_docs_folder
from make_bike_hire import make_csv
from streaming import Pace

from agent_worker import AgentError
from tests.unit.examples.recorded_run import RecordedRun

if TYPE_CHECKING:
    from pathlib import Path

AT_ONCE = Pace(piece_ms=0)
QUICK = ResamplingPlan(most=60, least=20, budget_s=5)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "guide.md").write_text(
        "# Guide\n\n## Brakes\n\nSqueaking brakes need cleaning.\n", encoding="utf-8"
    )
    return folder


async def test_docs_answers_with_a_quote_and_its_source(docs: Path) -> None:
    run = RecordedRun("Why do my brakes squeak?")
    answer = await build_docs_agent(docs, AT_ONCE)(run)
    assert answer == run.text
    assert "> Squeaking brakes need cleaning." in answer
    assert "`guide.md`, Guide › Brakes, line 5" in answer  # noqa: RUF001
    assert run.tool_names == ["read_folder", "search", "read_passages"]
    assert run.tools[1].parameters == {"terms": ["brakes", "squeak"], "limit": 3}
    assert len(run.deltas) > 10
    assert len(run.thoughts) == 3


async def test_docs_says_when_nothing_matches(docs: Path) -> None:
    run = RecordedRun("helmets")
    answer = await build_docs_agent(docs, AT_ONCE)(run)
    assert answer.startswith("Nothing in the folder mentions `helmets`.")
    assert "- `guide.md`: Guide, Brakes" in answer
    assert run.tool_names == ["read_folder", "search"]


async def test_docs_answers_from_files_as_they_are_now(docs: Path) -> None:
    ask = build_docs_agent(docs, AT_ONCE)
    await ask(RecordedRun("helmets"))
    (docs / "helmets.md").write_text("# Helmets\n\nWear one.\n", encoding="utf-8")
    assert "> Wear one." in await ask(RecordedRun("helmets"))


@pytest.mark.parametrize("question", ["", "???", '" OR * NEAR(', "\0\ud800", "的" * 500])
async def test_docs_takes_any_question(docs: Path, question: str) -> None:
    assert await build_docs_agent(docs, AT_ONCE)(RecordedRun(question))


async def test_docs_without_documents_fails_with_a_remedy(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        run = RecordedRun("brakes")
        with pytest.raises(AgentError) as caught:
            await build_docs_agent(folder, AT_ONCE)(run)
        assert caught.value.code == "agent_failed"


async def test_docs_knows_the_projects_own_documents() -> None:
    folder = default_docs_folder()
    assert folder.is_dir()
    answer = await build_docs_agent(folder, AT_ONCE)(RecordedRun("What are the close codes?"))
    assert "**Sources**" in answer


async def test_data_analyses_a_file_with_five_tools() -> None:
    run = RecordedRun("How does temperature_c relate to hires in bike_hire.csv?")
    answer = await build_data_agent(default_data_folder(), AT_ONCE, QUICK)(run)
    assert answer == run.text
    assert run.tool_names == [
        "read_csv",
        "summarize_columns",
        "find_outliers",
        "correlate",
        "bootstrap_intervals",
    ]
    assert all(tool.status == "ok" and tool.result for tool in run.tools)
    assert "**temperature_c** and **hires** have a strong positive correlation" in answer
    assert "60 resamples of each column" in answer
    percentages = run.tools[-1].percentages
    assert percentages == sorted(percentages)
    assert percentages[-1] == 100


async def test_data_analyses_a_table_in_the_message(tmp_path: Path) -> None:
    run = RecordedRun("```\na,b\n1,x\n2,y\n6,z\n```", {"resamples": 30})
    answer = await build_data_agent(tmp_path, AT_ONCE, QUICK)(run)
    assert "| a | 3 | 0 | 3 |" in answer
    assert "30 resamples" in answer
    # One numeric column has nothing to be compared with.
    assert "correlate" not in run.tool_names


async def test_data_stops_resampling_when_its_time_is_up() -> None:
    plan = ResamplingPlan(most=1_000_000, least=20, budget_s=0.05, chunk_s=0.01)
    run = RecordedRun("planets.csv")
    await build_data_agent(default_data_folder(), AT_ONCE, plan)(run)
    assert 20 <= run.tools[-1].result["resamples"] < 1_000_000


async def test_data_gives_the_same_answer_for_the_same_request() -> None:
    ask = build_data_agent(default_data_folder(), AT_ONCE)
    answers = {await ask(RecordedRun("planets.csv resamples=50")) for _ in range(2)}
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        ("hello", {}),
        ("../demo.csv", {}),
        ("nowhere.csv", {}),
        ("bike_hire.csv resamples=lots", {}),
        ("x", {"file": "../data/bike_hire.csv"}),
        ('```\na,b\n"1,2\n```', {}),
        ("```\n```", {}),
    ],
)
async def test_data_refuses_bad_requests_with_guidance(
    content: str, metadata: dict[str, object]
) -> None:
    run = RecordedRun(content, metadata)
    with pytest.raises(AgentError) as caught:
        await build_data_agent(default_data_folder(), AT_ONCE, QUICK)(run)
    assert caught.value.code == "invalid_request"
    assert caught.value.recovery_suggestions
    assert run.text == ""


async def test_data_stops_within_a_moment_when_it_is_cancelled() -> None:
    run = RecordedRun("bike_hire.csv resamples=1000000")
    task = asyncio.create_task(build_data_agent(default_data_folder(), AT_ONCE)(run))
    tool = await run.wait_for_tool("bootstrap_intervals")
    await tool.first_progress.wait()
    started_s = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started_s < 0.5
    assert tool.status == "cancelled"
    reported = len(tool.percentages)
    await asyncio.sleep(0.2)
    assert len(tool.percentages) == reported


def test_the_invented_table_is_what_its_maker_makes() -> None:
    assert (default_data_folder() / "bike_hire.csv").read_text(encoding="utf-8") == make_csv()
