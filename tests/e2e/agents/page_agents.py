"""Agents for the page's tests: the examples, one that writes for long, and one that is hostile."""

from __future__ import annotations

import asyncio

from agent_worker import Run, Worker

worker = Worker("page")

PIECE_S = 0.02
LONG_NAME = "an-agent-with-a-rather-long-name-indeed"

HOSTILE_ANSWER = """
<img src=x onerror="window.pwned = 'img'"> <script>window.pwned = 'script'</script>

[run me](javascript:window.pwned='link') and [run me too](data:text/html,<script>1</script>)
and <javascript:window.pwned='auto'> and ![x](https://tracker.example/pixel.png)

<iframe src="javascript:window.pwned='frame'"></iframe><svg onload="window.pwned='svg'"></svg>

```html"><img src=x onerror=window.pwned='fence'>
</code></pre><img src=x onerror="window.pwned='code'">
```
"""


def piece(number: int) -> str:
    """Give the piece of a given number."""
    return f"{number:04d} "


@worker.agent("teller", description="Counts aloud, as far as you say.")
async def tell(run: Run) -> None:
    """Stream as many numbered pieces as asked for, at a pace at which a page can be watched."""
    await run.thinking("Taking a breath")
    for number in range(int(run.request.content)):
        await run.delta(piece(number))
        await asyncio.sleep(PIECE_S)


@worker.agent(LONG_NAME, description="Works until it is stopped.")
async def work_on(run: Run) -> None:
    """Give the page something to stop, under a name that is hard to fit anywhere."""
    await run.delta("```python\nprint(1)\n``")
    async with run.tool("look_into_everything_there_is", {}, "Look into everything there is"):
        await run.progress(30)
        await asyncio.sleep(60)


@worker.agent("hostile", description="Tries to run code in the page of its user.")
async def attack(run: Run) -> str:
    """Say what an injected prompt might make a model say, in every place that is shown."""
    await run.thinking("<img src=x onerror=\"window.pwned = 'thought'\">")
    async with run.tool('<b onmouseover="x">', {"<i>": HOSTILE_ANSWER}, HOSTILE_ANSWER) as tool:
        tool.result = {"</script>": HOSTILE_ANSWER}
    await run.delta(HOSTILE_ANSWER)
    return run.text


@worker.agent("asker", description="Asks before it does anything.")
async def question(run: Run) -> str:
    """Ask one question of each kind, and one that is meant to be refused."""
    is_approved = await run.approve("Begin?", timeout_s=60)
    size = await run.ask("Which size?", "choice", choices=["small", "large"], timeout_s=60)
    name = await run.ask("Which name?", timeout_s=60)
    is_sent = await run.approve("Send it?", timeout_s=60)
    return f"begun {is_approved}, {size}, for {name}, sent {is_sent}"
