"""Debian's Firefox for Playwright, which otherwise needs a build of its own.

Playwright speaks WebDriver BiDi with Firefox, and with each new tab it sends a command that Firefox
does not have yet (``emulation.setMediaFeaturesOverride``). So what it starts as the browser is this
module: it starts Firefox, stands between the two, and answers that one command itself. The colour
scheme, all that Playwright would say by it, is set by a preference when the browser starts.

Run as ``python -m tests.support.firefox FIREFOX ARGUMENT...``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from typing import TYPE_CHECKING

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

UNKNOWN_TO_FIREFOX = "emulation.setMediaFeaturesOverride"

_LISTENING = re.compile(rb"(.*WebDriver BiDi listening on )(ws://[^\s]+)")


async def stand_between(playwright: ServerConnection, firefox_url: str) -> None:
    """Carry everything both ways, but for the one command."""
    assert playwright.request is not None
    async with connect(
        firefox_url + playwright.request.path, max_size=None, proxy=None, compression=None
    ) as firefox:
        carrying = [
            asyncio.create_task(_carry_commands(playwright, firefox)),
            asyncio.create_task(_carry_answers(firefox, playwright)),
        ]
        _, pending = await asyncio.wait(carrying, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)


async def _carry_commands(playwright: ServerConnection, firefox: ClientConnection) -> None:
    async for message in playwright:
        command = json.loads(message)
        if command["method"] == UNKNOWN_TO_FIREFOX:
            answer = {"type": "success", "id": command["id"], "result": {}}
            await playwright.send(json.dumps(answer))
        else:
            await firefox.send(message)


async def _carry_answers(firefox: ClientConnection, playwright: ServerConnection) -> None:
    async for message in firefox:
        await playwright.send(message)


async def main(command: list[str]) -> int:
    """Run Firefox to its end; give its exit code."""
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    async with contextlib.AsyncExitStack() as stack:
        while line := await process.stderr.readline():
            if match := _LISTENING.match(line):
                url = match[2].decode()

                async def handle(connection: ServerConnection, url: str = url) -> None:
                    with contextlib.suppress(ConnectionClosed):
                        await stand_between(connection, url)

                server = await stack.enter_async_context(
                    serve(handle, "127.0.0.1", 0, max_size=None, compression=None)
                )
                port = next(iter(server.sockets)).getsockname()[1]
                line = match[1] + f"ws://127.0.0.1:{port}\n".encode()
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
        return await process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
