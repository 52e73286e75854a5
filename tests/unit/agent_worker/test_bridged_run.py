from __future__ import annotations

import asyncio

from agent_worker.bridged_run import BridgedRun
from tests.unit.agent_worker.recording_stream import RecordingErrands, RecordingStream


def test_block_that_outlives_its_event_loop_lets_go_of_its_run() -> None:
    let_go: list[str] = []

    async def open_run() -> BridgedRun:
        stream = RecordingStream()
        return BridgedRun(
            stream.claim,
            stream,  # type: ignore[arg-type]
            RecordingErrands(),
            lambda _: let_go.append("lease"),
            lambda _: let_go.append("run"),
        )

    async def block() -> None:
        async with run:
            await blocked

    with asyncio.Runner() as runner:
        run = runner.run(open_run())
        blocked = runner.get_loop().create_future()

        async def begin() -> None:
            coroutine.send(None)

        coroutine = block()
        runner.run(begin())
    coroutine.close()
    assert run.is_ended
    assert let_go == ["lease", "run"]
