"""Where a saturated gateway spends its time: a flame graph, and the functions that cost most."""

from __future__ import annotations

import os
import signal
import sys

from benchmarks.figures import Section, Table
from benchmarks.flame import draw, own_shares, read_stacks
from benchmarks.load import open_channels, relay_feeds, relay_target
from benchmarks.measures.throughput import ON_THEIR_WAY, USERS
from benchmarks.stage import Plan, Stage

NAME = "profile"
SHOWN = 25

_METHOD = """\
The saturated gateway of the throughput measurement, sampled every few milliseconds of its processor
time (`benchmarks/profiled.py`). A share is the time in the function itself; C functions that it
calls, and the kernel, count as its own. Sampling costs a little: compare shares, not times."""

_MODES = {"one-at-a-time": (1, False), "batches": (5, True)}


def measure(plan: Plan) -> Section:
    folder = plan.profile_folder
    assert folder is not None, "profiles need a folder"
    section = Section(NAME, "Profile of a saturated gateway", _METHOD)
    for mode, (burst, batched) in _MODES.items():
        plan.say(f"profile, {mode}")
        stacks_path = folder / f"gateway-{mode}.stacks"
        with Stage(plan) as stage:
            server = stage.redis()
            open_channels(server, USERS)
            command = [sys.executable, "-m", "benchmarks.profiled", str(stacks_path)]
            gateway = stage.gateway(server, command)
            targets = [relay_target(user, gateway.port) for user in range(USERS)]
            load = stage.load(targets, is_beside=True)
            load.connect(is_relay=True)
            load.use_redis(server, relay_feeds(server, USERS))
            os.kill(gateway.process.pid, signal.SIGUSR1)
            window = USERS * ON_THEIR_WAY // burst
            load.flow(plan.size(15.0, 3.0), window=window, burst=burst, batched=batched)
            os.kill(gateway.process.pid, signal.SIGUSR1)
            load.stop()
            gateway.stop()
        stacks = read_stacks(stacks_path)
        graph = stacks_path.with_suffix(".svg")
        graph.write_text(draw(stacks, f"gateway, {mode}"))
        for by_file, title in ((True, "file"), (False, "function")):
            shares = own_shares(stacks, by_file=by_file)[:SHOWN]
            table = Table([f"{mode}: {title}", "own share"])
            table.rows = [[name, f"{share:.1%}"] for name, share in shares]
            section.tables.append(table)
        section.notes.append(f"Flame graph: `{graph.name}`")
    return section
