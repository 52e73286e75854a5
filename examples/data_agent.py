"""An agent that computes statistics of a table: CSV text in the message, or a file's name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_report import Findings, Resampling, compose_report, mentioned_columns
from data_request import DataRequest, list_files, parse_request, read_file
from data_statistics import (
    Bootstrap,
    Correlation,
    NumberSummary,
    Outliers,
    TextSummary,
    correlations,
    find_outliers,
    next_chunk,
    round_to_digits,
    summarize_numbers,
    summarize_text,
)
from data_table import Column, Table, UnreadableTableError, read_table
from streaming import Pace, stream

from agent_worker import AgentError, Run

DESCRIPTION = (
    "Computes statistics of CSV data: paste a table, or name a file such as bike_hire.csv."
)
SEED = 1
CONFIDENCE = 0.95
MAX_ANALYSED_COLUMNS = 20


@dataclass(frozen=True, slots=True)
class ResamplingPlan:
    """How long the bootstrap may take when the user does not say how many resamples.

    Attributes:
        most: Resamples at which it stops in any case.
        least: Resamples that it does in any case; fewer give no usable interval.
        budget_s: Between the two it stops after this time.
        chunk_s: Time between two chances to report progress and to be cancelled.
    """

    most: int = 20_000
    least: int = 200
    budget_s: float = 2.2
    chunk_s: float = 0.06


def default_data_folder() -> Path:
    """Give the folder of the tables that come with the examples."""
    return Path(__file__).resolve().parent / "data"


def build_data_agent(
    folder: Path, pace: Pace | None = None, plan: ResamplingPlan | None = None
) -> Callable[[Run], Awaitable[str]]:
    """Make an agent that may read the tables below ``folder`` and no other file."""
    return _DataAgent(folder, pace or Pace(), plan or ResamplingPlan()).analyse


@contextmanager
def _guidance_for_users() -> Iterator[None]:
    """Turn what is wrong with a table into the error that its sender sees."""
    try:
        yield
    except UnreadableTableError as error:
        raise AgentError(
            "invalid_request",
            error.problem,
            is_recoverable=True,
            recovery_suggestions=error.suggestions,
        ) from error


class _DataAgent:
    def __init__(self, folder: Path, pace: Pace, plan: ResamplingPlan) -> None:
        self._folder = folder
        self._pace = pace
        self._plan = plan

    async def analyse(self, run: Run) -> str:
        """Analyse the table of one run."""
        await run.thinking("Looking for a table in the message", step=1, total_steps=4)
        with _guidance_for_users():
            files = await asyncio.to_thread(list_files, self._folder)
            request = await asyncio.to_thread(
                parse_request, run.request.content, run.request.metadata, files
            )
            table = await self._read(run, request)
        analysed = table.numeric[:MAX_ANALYSED_COLUMNS]
        await run.thinking(
            f"{table.row_count:,} rows; numeric columns: "
            f"{', '.join(column.name for column in table.numeric) or 'none'}",
            step=2,
            total_steps=4,
        )
        numbers, texts = await self._summarize(run, table)
        outliers: list[Outliers] = []
        related: list[Correlation] = []
        resampling = None
        if analysed:
            outliers = await self._find_outliers(run, table.numeric)
            if len(analysed) > 1:
                related = await self._correlate(run, analysed)
            await run.thinking(
                "How sure are the means? Drawing new samples from the rows", step=3, total_steps=4
            )
            resampling = await self._resample(run, analysed, request.resamples)
        await run.thinking("Writing the report", step=4, total_steps=4)
        findings = Findings(
            title=request.file or "Your table",
            table=table,
            numbers=tuple(numbers),
            texts=tuple(texts),
            outliers=tuple(outliers),
            correlations=tuple(related),
            resampling=resampling,
            left_out=tuple(column.name for column in table.numeric[MAX_ANALYSED_COLUMNS:]),
            mentioned=tuple(
                mentioned_columns(request.question, [column.name for column in table.numeric])
            ),
        )
        await stream(run, compose_report(findings), self._pace)
        return run.text

    async def _read(self, run: Run, request: DataRequest) -> Table:
        source = request.file if request.csv_text is None else "message"
        async with run.tool(
            "read_csv", {"source": source}, "Find the delimiter, the header and the types"
        ) as tool:
            with _guidance_for_users():
                text = request.csv_text
                if text is None:
                    text = await asyncio.to_thread(read_file, self._folder, request.file or "")
                table = await asyncio.to_thread(read_table, text)
            tool.result = {
                "rows": table.row_count,
                "delimiter": table.delimiter,
                "has_header": table.has_header,
                "columns": {column.name: column.kind for column in table.columns},
            }
        return table

    async def _summarize(
        self, run: Run, table: Table
    ) -> tuple[list[NumberSummary], list[TextSummary]]:
        numbers: list[NumberSummary] = []
        texts: list[TextSummary] = []
        names = [column.name for column in table.columns]
        async with run.tool(
            "summarize_columns", {"columns": names}, "Count, average and rank each column"
        ) as tool:
            for done, column in enumerate(table.columns, 1):
                if column.kind == "number":
                    numbers.append(await asyncio.to_thread(summarize_numbers, column))
                else:
                    texts.append(await asyncio.to_thread(summarize_text, column))
                await tool.progress(100 * done / len(table.columns), column.name)
            tool.result = {
                "means": {summary.name: round_to_digits(summary.mean) for summary in numbers},
                "missing": sum(one.missing for one in numbers) + sum(one.missing for one in texts),
            }
        return numbers, texts

    async def _find_outliers(self, run: Run, columns: list[Column]) -> list[Outliers]:
        async with run.tool(
            "find_outliers", {"fence": "1.5 interquartile ranges"}, "Find unusual values"
        ) as tool:
            found = []
            for column in columns:
                outliers = await asyncio.to_thread(find_outliers, column)
                if outliers is not None:
                    found.append(outliers)
            tool.result = {outliers.name: len(outliers.values) for outliers in found}
        return found

    async def _correlate(self, run: Run, columns: list[Column]) -> list[Correlation]:
        pair_count = len(columns) * (len(columns) - 1) // 2
        async with run.tool(
            "correlate", {"pairs": pair_count, "method": "pearson"}, "Compare each pair of columns"
        ) as tool:
            found: list[Correlation] = []
            pending = correlations(columns)
            while (one := await asyncio.to_thread(next, pending, None)) is not None:
                found.append(one)
                await tool.progress(min(100.0, 100 * len(found) / pair_count))
            found.sort(key=lambda correlation: -abs(correlation.r))
            tool.result = {
                "strongest": [
                    {"columns": [one.first, one.second], "r": round(one.r, 4)} for one in found[:3]
                ]
            }
        return found

    async def _resample(self, run: Run, columns: list[Column], wanted: int | None) -> Resampling:
        plan = self._plan
        values = {column.name: column.values for column in columns}
        bootstrap = Bootstrap(values, plan.most if wanted is None else wanted, SEED)
        async with run.tool(
            "bootstrap_intervals",
            {
                "columns": list(values),
                "resamples": bootstrap.resamples,
                "confidence": CONFIDENCE,
                "seed": SEED,
            },
            "Find intervals for the means by resampling",
            estimated_duration_ms=None if wanted else round(plan.budget_s * 1_000),
        ) as tool:
            started_s = time.monotonic()
            rounds = 1
            while not bootstrap.is_finished:
                chunk_started_s = time.monotonic()
                await asyncio.to_thread(bootstrap.advance, rounds)
                now_s = time.monotonic()
                rounds = next_chunk(rounds, now_s - chunk_started_s, plan.chunk_s)
                done_share = bootstrap.done / bootstrap.resamples
                if wanted is None:
                    spent_share = (now_s - started_s) / plan.budget_s
                    least_share = bootstrap.done / plan.least
                    done_share = min(1.0, max(done_share, min(spent_share, least_share)))
                await tool.progress(100 * done_share, f"{bootstrap.done:,} resamples")
                if done_share >= 1:
                    break
            intervals = await asyncio.to_thread(bootstrap.intervals, CONFIDENCE)
            tool.result = {
                "resamples": bootstrap.done,
                "intervals": {
                    one.name: [round_to_digits(one.low), round_to_digits(one.high)]
                    for one in intervals
                },
            }
        return Resampling(tuple(intervals), CONFIDENCE, bootstrap.done, SEED)
