"""The smallest useful agent: it counts words. Start it with ``relay worker quickstart:worker``."""

import re
from collections import Counter

from agent_worker import Run, Worker

worker = Worker(name="quickstart")


@worker.agent("words", description="Counts the words of your text.")
async def count_words(run: Run) -> None:
    """Stream the number of words and the most frequent ones."""
    await run.thinking("Splitting your text into words")
    async with run.tool("count_words", {"characters": len(run.request.content)}) as tool:
        counts = Counter(re.findall(r"\w+", run.request.content.lower()))
        tool.result = {"words": counts.total(), "distinct": len(counts)}
    await run.delta(f"Your text has {counts.total()} words, {len(counts)} of them distinct.\n\n")
    for word, count in counts.most_common(5):
        await run.delta(f"- **{word}**: {count}\n")
