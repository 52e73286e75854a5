"""``relay up``: one command starts everything, one signal ends everything, nothing stays behind."""

from __future__ import annotations

import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay.client import Event, RelayClient
from tests.support.redis_server import free_port
from tests.support.stack_process import RelayUp, run_relay

pytestmark = pytest.mark.timeout(180)


async def ask(address: str, token: str, content: str) -> list[Event]:
    """Ask the docs agent; give the run's events."""
    async with RelayClient(address, token, since="now") as client:
        accepted = await client.send_message(content, thread_id="t1", agent="docs")
        events = []
        async for event in client:
            if event.run_id == accepted.run_id:
                events.append(event)
                if event.is_terminal:
                    return events
    raise AssertionError("the client ended before the run")


async def history(address: str, token: str, until: str) -> list[Event]:
    """Read all that is kept, up to the end of a run."""
    events = []
    async with RelayClient(address, token, since="0") as client:
        async for event in client:
            events.append(event)
            if event.run_id == until and event.is_terminal:
                return events
    raise AssertionError("the client ended before the run")


@contextmanager
def occupied_port(offset: int) -> Iterator[int]:
    """Occupy a port; give the one that is ``offset`` below it and free."""
    first = free_port(together=offset + 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + offset))
        taken.listen()
        yield first


async def test_starts_everything_serves_a_run_and_leaves_nothing(tmp_path: Path) -> None:
    with RelayUp(tmp_path, "--port", "0") as up:
        links = up.wait_until_ready().links()
        assert set(links) == {("alice", 1), ("alice", 2), ("bob", 1)}
        first, second = links["alice", 1], links["alice", 2]
        assert first[0] != second[0]
        events = await ask(*first, "How does resume work?")
        assert events[0].type == "agent_queued"
        assert events[-1].type == "agent_completed"
        seqs = [event.seq for event in events if event.seq is not None]
        assert seqs == list(range(1, len(seqs) + 1))
        run_id = events[0].run_id
        assert run_id is not None
        elsewhere = await history(*second, run_id)
        assert {event.run_id for event in elsewhere} == {run_id}
        assert up.stop(signal.SIGINT) == 0
        assert up.wait_until_parts_ended() == []


async def test_restart_keeps_history_and_secret(tmp_path: Path) -> None:
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        address, token = up.wait_until_ready().links()["alice", 1]
        events = await ask(address, token, "How does resume work?")
        assert up.stop(signal.SIGTERM) == 0
    secret = tmp_path / ".relay" / "jwt-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        address, _ = up.wait_until_ready().links()["alice", 1]
        run_id = events[0].run_id
        assert run_id is not None
        # The old link's token still signs its user in.
        again = await history(address, token, run_id)
        assert [event.data for event in again if event.seq] == [
            event.data for event in events if event.seq
        ]
        assert up.stop() == 0


def test_parts_end_when_it_is_killed(tmp_path: Path) -> None:
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        up.wait_until_ready()
        up.process.kill()
        assert up.wait_until_ended() == -signal.SIGKILL
        assert up.wait_until_parts_ended() == []


@pytest.mark.parametrize("words", ["relay worker", "relay gateway", "redis-server"])
def test_part_that_dies_ends_everything_with_its_name(tmp_path: Path, words: str) -> None:
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        up.wait_until_ready().part(words).kill()
        assert up.wait_until_ended() == 1
        name = {"relay worker": "worker", "relay gateway": "gateway", "redis-server": "Redis"}
        assert f"{name[words]}" in up.output.partition("Error:")[2]
        assert "has ended by itself" in up.output
        assert up.wait_until_parts_ended() == []


def test_second_signal_does_not_wait(tmp_path: Path) -> None:
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        worker = up.wait_until_ready().part("relay worker")
        worker.suspend()
        up.process.send_signal(signal.SIGINT)
        up.wait_until_printed("Stopping")
        began = time.monotonic()
        assert up.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 10
        assert up.wait_until_parts_ended() == []


def test_signal_while_it_starts_ends_it(tmp_path: Path) -> None:
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        while not (tmp_path / ".relay" / "redis" / "redis.conf").exists():
            assert up.process.poll() is None, up.output
        assert up.stop(signal.SIGTERM) == 0
        assert up.wait_until_parts_ended() == []


@pytest.mark.parametrize("offset", [0, 1])
def test_port_in_use_is_named(tmp_path: Path, offset: int) -> None:
    with occupied_port(offset) as port:
        done = run_relay("up", "--port", str(port), folder=tmp_path)
    assert done.returncode == 1
    assert f"Port {port + offset} for gateway {offset + 1} is in use." in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_port_of_the_environment_is_taken(tmp_path: Path) -> None:
    with occupied_port(0) as port:
        done = run_relay("up", folder=tmp_path, RELAY_PORT=str(port))
    assert f"Port {port} for gateway 1 is in use." in done.stderr


def test_second_one_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with RelayUp(tmp_path, "--port", "0", "--gateways", "1") as up:
        address, _ = up.wait_until_ready().links()["alice", 1]
        done = run_relay("up", "--port", "0", folder=tmp_path)
        assert done.returncode == 1
        assert "already running" in done.stderr
        assert address in done.stderr
        assert up.process.poll() is None
        assert up.stop() == 0


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:1/0", "does not answer"),
        ("http://127.0.0.1:6379", "RELAY_REDIS_URL='http://127.0.0.1:6379' is not allowed"),
    ],
)
def test_redis_that_cannot_be_used_is_named(tmp_path: Path, url: str, words: str) -> None:
    done = run_relay("up", "--port", "0", "--redis-url", url, folder=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_relay("up", "--port", "0", "--data-dir", "file/data", folder=tmp_path)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "--data-dir" in done.stderr


def test_own_redis_is_used_and_left_alone(tmp_path: Path, redis_url: str, key_prefix: str) -> None:
    with RelayUp(
        tmp_path, "--port", "0", "--redis-url", redis_url, RELAY_KEY_PREFIX=key_prefix
    ) as up:
        up.wait_until_ready()
        assert not (tmp_path / ".relay" / "redis").exists()
        assert up.stop() == 0
        assert up.wait_until_parts_ended() == []


def test_own_worker_that_fails_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import nothing_of_that_name\n")
    done = run_relay("up", "--port", "0", "--worker", "mine:worker", folder=tmp_path)
    assert done.returncode == 1
    assert "nothing_of_that_name" in done.stderr
    assert "Traceback" not in done.stderr
