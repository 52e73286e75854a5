"""Events of some users, sustained through the whole path: from publish to the client's socket."""

from __future__ import annotations

from benchmarks.canary import Canary
from benchmarks.figures import DISTRIBUTION_COLUMNS, Check, Section, Table
from benchmarks.load import relay_target
from benchmarks.stage import Plan, Stage

NAME = "sustained"
USERS = 5
RATE = 120
P99_LIMIT_MS = 50

_METHOD = """\
A worker process publishes for {users} users, {rate} lifecycle events a second each, through the
relay's publisher, the publish script, Redis, two gateways and WebSockets to the load generator, for
{seconds:g} s. Latency counts from when an event was due in the worker to its arrival at the client.
Every event arrived once and in order, or there would be no figures here."""


def measure(plan: Plan) -> Section:
    seconds = plan.size(10, 2)
    plan.say(f"{USERS} users, {RATE} events a second each, for {seconds} s")
    with Stage(plan, is_pinned=False) as stage, Canary() as canary:
        server = stage.redis()
        gateways = [stage.gateway(server) for _ in range(2)]
        publisher = stage.publisher(server, "paced", USERS, RATE, seconds)
        publisher.answer()
        targets = [relay_target(user, gateways[user % 2].port) for user in range(USERS)]
        load = stage.load(targets)
        load.connect(is_relay=True)
        load.reset()
        before_s = sum(gateway.process.cpu_s() for gateway in gateways)
        publisher.tell("go")
        count = load.collect(USERS * RATE * seconds, timeout_s=seconds + 20)
        gateway_s = sum(gateway.process.cpu_s() for gateway in gateways) - before_s
        published = publisher.answer()
    table = Table(["users x events/s", *DISTRIBUTION_COLUMNS, "events/s"])
    rate = f"{count.rate:,.0f}"
    table.rows.append([f"{USERS} x {RATE}", *count.latency.cells(), rate])
    costs = Table(["at this rate, CPU us/event", "worker", "Redis", "both gateways"])
    events = published["events"]
    costs.rows.append(
        [
            "",
            f"{published['cpu_us'] / events:.0f}",
            f"{published['redis_us'] / events:.0f}",
            f"{gateway_s / events * 1e6:.0f}",
        ]
    )
    return Section(
        NAME,
        "Sustained events through the whole path",
        _METHOD.format(users=USERS, rate=RATE, seconds=seconds),
        tables=[table, costs],
        notes=[canary.note()],
        checks=[Check("p99 from publish to client", count.latency.p99_ms, P99_LIMIT_MS, "ms")],
        figures={"sustained.p99_ms": count.latency.p99_ms},
    )
