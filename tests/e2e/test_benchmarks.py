"""The benchmark runs, its generators agree, and it does not overlook a delivery that is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from benchmarks.flame import draw, own_shares
from benchmarks.load import (
    LoadClient,
    first_position,
    open_channels,
    plain_feeds,
    plain_target,
    relay_feeds,
    relay_target,
)
from benchmarks.native import compile_program
from benchmarks.processes import ROOT, BenchmarkFailed, Placement
from benchmarks.stage import Plan, Stage
from relay.codec import LiveBatch, Publication, decode_live
from relay.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USERS = 8
KINDS = ["python"] + (["c"] if compile_program("load_client") else [])

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(True, tmp_path, Placement(), lambda _: None)


@pytest.fixture
def stage(plan: Plan) -> Iterator[Stage]:
    with Stage(plan) as stage:
        yield stage


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_quick_run_writes_results(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    measures = ["--only=first-event", "--only=sustained", "--only=publish", "--only=worker-memory"]
    done = run_module("benchmarks", "--quick", *measures, f"--output={results}")
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    for expected in ("First event after the request", "5 x 120", "ten in one go", "| Commit |"):
        assert expected in text
    assert "met: p99 to `agent_queued`, one at a time" in text
    assert re.search(r"(?:met|NOT MET): worker CPU per piece of text: ", text)


def test_bounds_of_the_bridge_and_of_a_reconnect_are_measured() -> None:
    done = run_module("benchmarks", "--quick", "--only=bridge", "--only=reconnect")
    assert done.returncode == 0, done.stderr
    for expected in (
        "longest from publish to client: ",
        "longest run: ",
        "time for each event (100 a second): ",
        "longest until back: ",
        "longest until complete: ",
    ):
        # Whether a bound is met is for `make bench` to say.
        assert f"met: {expected}" in done.stdout.replace("NOT MET", "met")


def test_the_heavy_measurements_run_to_their_end() -> None:
    done = run_module("benchmarks", "--quick", "--only=storm", "--only=stalls", "--only=memory")
    assert done.returncode == 0, done.stderr
    for expected in (
        "relay, 50 events missed",
        "longest delay of another user's events meanwhile",
        "prober's longest wait",
        "| bare handshakes",
        "idle connection, 300 of them",
    ):
        assert expected in done.stdout


def test_variants_of_a_gateway_are_compared_with_it() -> None:
    done = run_module("benchmarks.variants", "--rounds=1", "--seconds=0.1", "asyncio loop")
    assert done.returncode == 0, done.stderr
    _, _, base, variant = (
        [cell.strip() for cell in line.split("|")] for line in done.stdout.strip().splitlines()
    )
    assert (base[1], variant[1]) == ("as it is", "asyncio loop")
    assert base[4] == base[5] == "1.00"
    assert float(variant[2]) > 0


def test_scale_writes_tables_and_a_chart_and_keeps_what_people_wrote(tmp_path: Path) -> None:
    results, chart = tmp_path / "SCALE.md", tmp_path / "scale.svg"
    results.write_text("# old\n\n## Where the curves bend\n\nBecause of this.\n")
    done = run_module("benchmarks.scale", "--quick", f"--output={results}", f"--chart={chart}")
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    assert "# old" not in text
    assert text.endswith("\n## Where the curves bend\n\nBecause of this.\n")
    titles = ["Connections", "Users", "Events per second", "Tabs per user", "Gateway processes"]
    drawn = "".join(ElementTree.parse(chart).getroot().itertext())
    for title in titles:
        assert f"## {title}" in text
        assert title in drawn


def test_soak_reports_memory_and_latency() -> None:
    done = run_module("benchmarks.soak", "--minutes", "0.1")
    assert "delivered, each once and in order" in done.stdout, done.stderr
    assert "| gateway" in done.stdout
    assert "| last third" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_without_a_turn_leaves_its_processor_to_others(stage: Stage, kind: str) -> None:
    server = stage.redis()
    load = LoadClient(stage.folder, [plain_target(0, stage.starlette(server).port, "0")], kind)
    try:
        load.connect(is_relay=False)
        load.use_redis(server, plain_feeds(1, "0"))
        load.pace(0.1, rate=100)
        load.begin_trickle(100)
        load.end()
        before_s = load.process.cpu_s()
        time.sleep(0.5)  # what it does meanwhile is the question
        assert load.process.cpu_s() - before_s < 0.2
    finally:
        load.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_generator_counts_every_event_of_the_relay_once(stage: Stage, kind: str) -> None:
    server = stage.redis()
    open_channels(server, USERS)
    gateway = stage.gateway(server)
    targets = [relay_target(user, gateway.port) for user in range(USERS)]
    load = LoadClient(stage.folder, targets, kind)
    try:
        assert load.kind == kind
        load.connect(is_relay=True)
        load.use_redis(server, relay_feeds(server, USERS))
        for burst, batched in ((1, False), (5, False), (5, True)):
            count = load.pace(0.4, rate=500, burst=burst, batched=batched)
            assert count.published == count.received == count.latency.samples == 200
        flowed = load.flow(0.3, window=USERS)
        assert flowed.received == flowed.published > USERS
    finally:
        load.stop()
    assert gateway.process.cpu_s() > 0
    assert gateway.process.rss_kib() > 1_000


@pytest.mark.parametrize("kind", KINDS)
def test_clients_who_were_away_get_what_was_written(stage: Stage, kind: str) -> None:
    server = stage.redis()
    open_channels(server, USERS)
    gateway = stage.gateway(server)
    writer = LoadClient(stage.folder, [], kind)
    targets = [relay_target(user, gateway.port, first_position(user)) for user in range(USERS)]
    load = LoadClient(stage.folder, targets, kind)
    try:
        writer.use_redis(server, relay_feeds(server, USERS))
        writer.write(server, 30)
        load.reset()
        load.connect(is_relay=True, concurrency=USERS)
        assert load.collect(USERS * 30, timeout_s=20).received == USERS * 30
    finally:
        writer.stop()
        load.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_load_goes_on_until_it_is_ended(stage: Stage, kind: str) -> None:
    server = stage.redis()
    open_channels(server, 1)
    gateway = stage.gateway(server)
    load = LoadClient(stage.folder, [relay_target(0, gateway.port)], kind)
    try:
        load.connect(is_relay=True)
        load.use_redis(server, relay_feeds(server, 1))
        for begin in (load.begin_trickle, load.begin_probe):
            begin(10.0)
            assert gateway.metrics()["relay_loop_lag_max_seconds"] >= 0
            count = load.end()
            assert count.published == count.received == count.latency.samples >= 1
    finally:
        load.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_published_messages_are_those_of_the_publish_script(stage: Stage, kind: str) -> None:
    server = stage.redis()
    open_channels(server, 1)
    gateway = stage.gateway(server)
    pubsub = server.client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(Keys().user("u00000").live)
    assert pubsub.get_message(timeout=5) is None
    load = LoadClient(stage.folder, [relay_target(0, gateway.port)], kind)
    try:
        load.connect(is_relay=True)
        load.use_redis(server, relay_feeds(server, 1))
        load.pace(0.1, rate=50, burst=5, batched=True)
        message = pubsub.get_message(timeout=5)
    finally:
        load.stop()
        pubsub.close()
    assert message is not None
    batch: LiveBatch = decode_live(message["data"])
    first: Publication = batch.publications[0]
    assert (batch.epoch, len(batch.publications), first.offset) == ("0" * 12, 5, 1_000_001)
    assert b'"type":"custom"' in first.frame
    assert b"bench:0:0:" in first.frame


@pytest.mark.parametrize("reference", ["starlette", "each", "tick"])
def test_references_deliver_everything(stage: Stage, reference: str) -> None:
    server = stage.redis()
    started = (
        stage.starlette(server) if reference == "starlette" else stage.floor(server, reference)
    )
    if started is None:
        assert KINDS == ["python"]
        return
    load = stage.load([plain_target(user, started.port, "x") for user in range(USERS)])
    load.connect(is_relay=False)
    load.use_redis(server, plain_feeds(USERS, "x"))
    count = load.flow(0.3, window=USERS, burst=5)
    assert count.received == count.published > USERS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("marks", "fault"),
    [
        (["bench:0:0:1;", "bench:0:2:1;"], "'missing': 1"),
        (["bench:0:0:1;", "bench:0:0:1;"], "'repeated': 1"),
        (["bench:0:0:1;", "bench:1:0:1;"], "'foreign': 1"),
        (["bench:0:0:1;"], "'received': 1"),
    ],
)
def test_generator_notices_wrong_deliveries(
    stage: Stage, kind: str, marks: list[str], fault: str
) -> None:
    server = stage.redis()
    reference = stage.starlette(server)
    load = LoadClient(stage.folder, [plain_target(0, reference.port, "x")], kind)
    try:
        load.connect(is_relay=False)
        load.reset()
        for mark in marks:
            assert server.client.publish("x-u00000", f"event {mark}") == 1
        with pytest.raises(BenchmarkFailed, match=fault):
            load.collect(2, timeout_s=1)
    finally:
        load.stop()


def test_a_refused_connection_is_an_error(stage: Stage) -> None:
    server = stage.redis()
    gateway = stage.gateway(server)
    target = plain_target(0, gateway.port, "no-token")
    for kind in KINDS:
        load = LoadClient(stage.folder, [target], kind)
        try:
            with pytest.raises(BenchmarkFailed, match="refused"):
                load.connect(is_relay=False)
        finally:
            load.stop()


def test_profile_leaves_a_flame_graph(tmp_path: Path) -> None:
    began = time.monotonic()
    quick = ["benchmarks", "--quick", "--only=sustained", f"--profile={tmp_path}"]
    done = run_module(*quick)
    assert done.returncode == 0, done.stderr
    assert "gateway/feed.py" in done.stdout
    for mode in ("one-at-a-time", "batches"):
        graph = (tmp_path / f"gateway-{mode}.svg").read_text()
        assert graph.startswith("<svg")
        assert "FeedHub._receive" in graph
    assert time.monotonic() - began < 120


def test_flame_graph_widths_are_shares() -> None:
    stacks = Counter({("main (a/b.py:1)", "work (a/c.py:2)"): 3, ("main (a/b.py:1)",): 1})
    assert own_shares(stacks) == [("work (a/c.py:2)", 0.75), ("main (a/b.py:1)", 0.25)]
    assert own_shares(stacks, by_file=True) == [("a/c.py", 0.75), ("a/b.py", 0.25)]
    graph = draw(stacks, "t <1>")
    assert "work (a/c.py:2): 75.0%" in graph
    assert "t &lt;1&gt;: 4 samples" in graph
