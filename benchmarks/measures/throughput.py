"""What a delivered event costs a gateway, beside the usual way and the floor, saturated."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from benchmarks.figures import (
    DISTRIBUTION_COLUMNS,
    Check,
    Section,
    Table,
    format_spread,
    over_rounds,
)
from benchmarks.load import (
    Count,
    LoadClient,
    event_sizes,
    open_channels,
    plain_feeds,
    plain_target,
    relay_feeds,
    relay_target,
)
from benchmarks.processes import Process, RedisProcess
from benchmarks.stage import Plan, Stage

NAME = "throughput"
USERS = 500
BURST = 5
ON_THEIR_WAY = 8
"""Events for each user, on average. With fewer, gateways that share a processor with the load would
wait for it more than for themselves, and have little to gather for a socket."""

RELAY, SOURCE = "relay", "relay, from source"
USUAL, FLOOR, FLOOR_TICK = "usual way", "C floor", "C floor, one send a tick"

_METHOD = """\
{users} users with one connection each on one gateway process{pinned}. The load
generator publishes to Redis and receives the events, with at most {window:,} events on their way:
whatever arrives makes room for the next. All candidates run at once and take turns; one that has no
turn is idle. CPU is user and system time of the gateway process alone, divided by delivered events.
An event has {stored} bytes stored and {frame} as a frame, the same for all candidates.

*usual way*: a Starlette WebSocket with a redis-py PubSub per connection, without tokens,
positions, history, budgets or metrics (`benchmarks/reference_starlette.py`). *C floor*: one `send`
per event, nothing else (`benchmarks/native/floor.c`); *one send a tick*: one per socket and read
from Redis. The relay is measured with all of its promises on; *relay* is its compiled wheel where
there is a compiler, *relay, from source* what runs without one.

*one at a time*: each PUBLISH carries one event, for the next user in turn. *bursts of {burst}*:
{burst} PUBLISHes for one user back to back. *batches of {burst}*: one PUBLISH with {burst} events,
which is how the relay's own publisher sends what an agent says in one go. Medians of {rounds}
interleaved rounds of {seconds:g} s; in brackets the range."""


_PINNED = """ that shares a
processor with the load generator, while Redis has the other: so work waits for the gateway"""


@dataclass
class _Candidate:
    name: str
    process: Process
    load: LoadClient
    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, list[Count]] = field(default_factory=dict)


_ONE, _BURSTS = "one at a time", f"bursts of {BURST}"
_MODES = {_ONE: (1, False), _BURSTS: (BURST, False)}
_BATCHES = {f"batches of {BURST}": (BURST, True)}

_BOUNDS: dict[tuple[str, str], tuple[float, float | None]] = {
    (USUAL, _ONE): (0.25, None),
    (USUAL, _BURSTS): (0.25, None),
    (FLOOR, _ONE): (1.2, 0.9),
    (FLOOR, _BURSTS): (0.7, None),
    (FLOOR_TICK, _ONE): (2.7, None),
    (FLOOR_TICK, _BURSTS): (2.7, None),
}
"""At most so many times another's cost; and what would be better still."""


def measure(plan: Plan) -> Section:
    users, rounds = plan.size(USERS, 100), plan.size(9, 2)
    seconds = plan.size(1.0, 0.7)
    with Stage(plan) as stage:
        server = stage.redis()
        candidates = _start(stage, server, users)
        for number in range(rounds):
            plan.say(f"throughput, round {number + 1} of {rounds}")
            for candidate in candidates:
                modes = _MODES | (_BATCHES if candidate.name in (RELAY, SOURCE) else {})
                for mode, (burst, batched) in modes.items():
                    _run(candidate, mode, burst, batched, seconds, users)
    return _section(plan, candidates, users, rounds, seconds)


def _start(stage: Stage, server: RedisProcess, users: int) -> list[_Candidate]:
    candidates = [_start_relay(stage, server, users, RELAY)]
    if stage.is_compiled:
        # The users are the same, so their channels would be as well: both would get every event.
        candidates.append(_start_relay(stage, stage.redis(), users, SOURCE))
    references = {
        USUAL: stage.starlette(server),
        FLOOR: stage.floor(server, "each"),
        FLOOR_TICK: stage.floor(server, "tick"),
    }
    for label, (name, reference) in enumerate(references.items()):
        if reference is None:
            continue
        targets = [plain_target(user, reference.port, str(label)) for user in range(users)]
        load = stage.load(targets, is_beside=True)
        load.connect(is_relay=False)
        load.use_redis(server, plain_feeds(users, str(label)))
        candidates.append(_Candidate(name, reference.process, load))
    return candidates


def _start_relay(stage: Stage, server: RedisProcess, users: int, name: str) -> _Candidate:
    open_channels(server, users)
    gateway = stage.gateway(server, from_source=name == SOURCE)
    targets = [relay_target(user, gateway.port) for user in range(users)]
    load = stage.load(targets, is_beside=True)
    load.connect(is_relay=True)
    load.use_redis(server, relay_feeds(server, users))
    return _Candidate(name, gateway.process, load)


def _run(
    candidate: _Candidate, mode: str, burst: int, batched: bool, seconds: float, users: int
) -> None:
    before_s = candidate.process.cpu_s()
    window = users * ON_THEIR_WAY // burst
    count = candidate.load.flow(seconds, window=window, burst=burst, batched=batched)
    used_s = candidate.process.cpu_s() - before_s
    candidate.cpu_us.setdefault(mode, []).append(used_s / count.received * 1e6)
    candidate.counts.setdefault(mode, []).append(count)


def _section(
    plan: Plan, candidates: list[_Candidate], users: int, rounds: int, seconds: float
) -> Section:
    stored, frame = event_sizes()
    section = Section(
        NAME,
        "Cost of a delivered event, saturated",
        _METHOD.format(
            users=users,
            window=users * ON_THEIR_WAY,
            pinned=_PINNED if plan.placement.is_pinned else "",
            stored=stored,
            frame=frame,
            burst=BURST,
            rounds=rounds,
            seconds=seconds,
        ),
    )
    relay = candidates[0]
    ratios = Table(["gateway CPU of the relay, relative to", *_MODES, *_BATCHES])
    for other in candidates[1:]:
        cells = []
        for mode in (*_MODES, *_BATCHES):
            has_batches = other.name == SOURCE
            base = f"bursts of {BURST}" if mode in _BATCHES and not has_batches else mode
            # By round: what else the machine does then weighs on both sides.
            by_round = [
                mine / theirs
                for mine, theirs in zip(relay.cpu_us[mode], other.cpu_us[base], strict=True)
            ]
            ratio = median(by_round)
            section.rounds[f"throughput.{mode}/{other.name}"] = by_round
            cells.append(f"{ratio:.2f} x")
            if (other.name, mode) in _BOUNDS:
                bound, stretch = _BOUNDS[other.name, mode]
                name = f"CPU per event relative to the {other.name}, {mode}"
                section.checks.append(Check(name, ratio, bound, "x", stretch))
        ratios.rows.append([other.name, *cells])
    if ratios.rows:
        section.tables.append(ratios)
    section.tables += [_cost_table(candidates), _latency_table(candidates)]
    return section


def _cost_table(candidates: list[_Candidate]) -> Table:
    table = Table(["candidate", "mode", "CPU us/event", "events/s", "gateway CPU"])
    for candidate in candidates:
        for mode, costs in candidate.cpu_us.items():
            counts = candidate.counts[mode]
            rate = median(count.rate for count in counts)
            busy = median(
                cost * count.rate / 1e6 for cost, count in zip(costs, counts, strict=True)
            )
            table.rows.append(
                [candidate.name, mode, format_spread(costs), f"{rate:,.0f}", f"{busy:.0%}"]
            )
    return table


def _latency_table(candidates: list[_Candidate]) -> Table:
    table = Table(["at saturation, publish to client", "mode", *DISTRIBUTION_COLUMNS])
    for candidate in candidates:
        for mode, counts in candidate.counts.items():
            latency = over_rounds([count.latency for count in counts])
            table.rows.append([candidate.name, mode, *latency.cells()])
    return table
