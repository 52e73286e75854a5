"""How soon a user sees something: from the request's frame to the first events of its run."""

from __future__ import annotations

import asyncio
import time

from benchmarks.canary import Canary
from benchmarks.figures import DISTRIBUTION_COLUMNS, Check, Section, Table, distribution_of
from benchmarks.load import token_for
from benchmarks.processes import ROOT
from benchmarks.stage import Plan, Stage
from benchmarks.websocket import JsonSocket

NAME = "first-event"
LIMIT_MS = 500
TIMEOUT_S = 60
USERS = 20
PAUSE_S = 0.06
"""Between two requests of a user: a gateway takes twenty frames a second from each."""

_METHOD = """\
The whole stack as processes: Redis, two gateways, a worker with the agent `words` of
`examples/quickstart.py`. {users} users, one after the other, send a `user_message` and wait for the
end of its run. `agent_queued` is the gateway's acceptance on its way back through Redis;
`agent_started` also went through the task stream and the worker. With {users} at once, all of them
send at the same moment."""

_TEXT = "the quick brown fox jumps over the lazy dog and the cat"


def measure(plan: Plan) -> Section:
    plan.say("first event after a request")
    samples = plan.size(400, 60)
    with Stage(plan, is_pinned=False) as stage, Canary() as canary:
        server = stage.redis()
        ports = [stage.gateway(server).port for _ in range(2)]
        stage.worker(server, "quickstart:worker", str(ROOT / "examples"))
        alone, together = asyncio.run(_ask_all(ports, samples))
    section = Section(NAME, "First event after the request", _METHOD.format(users=USERS), tables=[])
    table = Table(["request to", *DISTRIBUTION_COLUMNS])
    for title, times in (("one at a time", alone), (f"{USERS} at once", together)):
        for kind in ("agent_queued", "agent_started", "agent_completed"):
            distribution = distribution_of([times_of[kind] for times_of in times])
            table.rows.append([f"`{kind}`, {title}", *distribution.cells()])
            if kind != "agent_completed":
                section.figures[f"first-event.{title}.{kind}.p99_ms"] = distribution.p99_ms
                section.checks.append(
                    Check(f"p99 to `{kind}`, {title}", distribution.p99_ms, LIMIT_MS, "ms")
                )
    section.tables = [table]
    section.notes.append(canary.note())
    return section


Times = dict[str, float]


async def _ask_all(ports: list[int], samples: int) -> tuple[list[Times], list[Times]]:
    sockets = []
    for user in range(USERS):
        offer = f"relay.v1, bearer.{token_for(user)}"
        port = ports[user % len(ports)]
        socket = await JsonSocket.open(port, "/v1/ws?since=now", offer)
        await socket.receive_until("connection_established")
        sockets.append(socket)
    async with asyncio.timeout(TIMEOUT_S):
        for socket in sockets:
            await _ask(socket, "warm-up")
        alone: list[Times] = []
        for number in range(samples):
            alone.append(await _ask(sockets[number % USERS], f"alone-{number}"))
            await asyncio.sleep(PAUSE_S / USERS)
        together: list[Times] = []
        for number in range(max(1, samples // USERS)):
            asked = (_ask(socket, f"together-{number}") for socket in sockets)
            together += await asyncio.gather(*asked)
            await asyncio.sleep(PAUSE_S)
    for socket in sockets:
        await socket.close()
    return alone, together


async def _ask(socket: JsonSocket, frame_id: str) -> Times:
    """Send a message; give the milliseconds until each kind of event came first."""
    times: Times = {}
    began_s = time.perf_counter()
    socket.send(
        {
            "type": "user_message",
            "id": frame_id,
            "thread_id": "t",
            "agent": "words",
            "content": _TEXT,
        }
    )
    while "agent_completed" not in times:
        frame = await socket.receive()
        if frame["type"] in ("error", "agent_error"):
            raise RuntimeError(f"the run failed: {frame}")
        times.setdefault(frame["type"], (time.perf_counter() - began_s) * 1e3)
    return times
