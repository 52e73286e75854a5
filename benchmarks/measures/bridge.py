"""Runs of many users through the bridge: from publish to the client's socket."""

from __future__ import annotations

from benchmarks.bridging import EVENTS
from benchmarks.canary import Canary
from benchmarks.figures import DISTRIBUTION_COLUMNS, Check, Distribution, Section, Table
from benchmarks.load import relay_target
from benchmarks.stage import Plan, Stage

NAME = "bridge"
USERS = 10
INTERVAL_S = 0.25
EVENT_LIMIT_MS, FLOW_LIMIT_MS = 500, 5_000
LEAST_RATE = 100

_METHOD = """\
One `AgentWebSocketBridge` in a process of its own opens a run of each of {users} users every
{interval:g} s, through emitters that can speak for their user only, and publishes {events}
events in it: `agent_started`, `agent_thinking`, `tool_executing`, `tool_completed`,
`agent_completed`. That is {rate:g} events a second for {seconds:g} s (each run's `agent_queued`
comes on top), through Redis and two gateways to the load generator. An event's latency counts
from the call that publishes it, that of the first from when its run was due: it waits for the
run to be opened. A run's time is from when it was due until Redis has acknowledged its end.
Every event arrived once and in order at its own user, or there would be no figures here."""


def measure(plan: Plan) -> Section:
    rounds = plan.size(40, 8)
    expected, rate = USERS * EVENTS * rounds, USERS * EVENTS / INTERVAL_S
    plan.say(f"{USERS} users through the bridge, {rate:g} events a second")
    with Stage(plan, is_pinned=False) as stage, Canary() as canary:
        server = stage.redis()
        gateways = [stage.gateway(server) for _ in range(2)]
        publisher = stage.bridge(server, USERS, rounds, INTERVAL_S)
        publisher.answer()
        targets = [relay_target(user, gateways[user % 2].port) for user in range(USERS)]
        load = stage.load(targets)
        load.connect(is_relay=True)
        load.reset()
        publisher.tell("go")
        count = load.collect(expected, timeout_s=rounds * INTERVAL_S + 20)
        told = publisher.answer()
    runs = Distribution(
        int(told["samples"]), told["p50_ms"], told["p99_ms"], told["p999_ms"], told["max_ms"]
    )
    table = Table(["through the bridge", *DISTRIBUTION_COLUMNS, "events/s"])
    table.rows.append(["an event", *count.latency.cells(), f"{count.rate:,.0f}"])
    table.rows.append([f"a run of {EVENTS} events, acknowledged", *runs.cells(), ""])
    return Section(
        NAME,
        "Users through the bridge",
        _METHOD.format(
            users=USERS,
            interval=INTERVAL_S,
            events=EVENTS,
            rate=rate,
            seconds=rounds * INTERVAL_S,
        ),
        tables=[table],
        notes=[canary.note()],
        checks=[
            Check("longest from publish to client", count.latency.max_ms, EVENT_LIMIT_MS, "ms"),
            Check("longest run", runs.max_ms, FLOW_LIMIT_MS, "ms"),
            Check(
                f"time for each event ({LEAST_RATE} a second)",
                1e3 / count.rate,
                1e3 / LEAST_RATE,
                "ms",
            ),
        ],
        figures={"bridge.p99_ms": count.latency.p99_ms},
    )
