"""The pytest plugin in other people's projects, each run by a pytest of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest

from agent_worker import Run, Worker
from agent_worker.worker import RunningWorker
from relay.config import Settings
from relay.errors import ConfigurationError
from relay.testing import RelayStack, WebSocketTestUtility

ROOT = Path(__file__).parents[2]

AGENT = """
    import asyncio
    import pytest
    from agent_worker import Run, Worker

    worker = Worker("theirs")

    @worker.agent("echo")
    async def echo(run: Run) -> str:
        for word in run.request.content.split():
            await run.delta(word + " ")
            await asyncio.sleep(0.02)
        return run.text
"""

local = Worker("local")


@local.agent("count")
async def count(run: Run) -> str:
    """Think as often as the request says."""
    for number in range(int(run.request.content)):
        await run.thinking(f"{number}")
    return run.run_id


class SettingsOf(Worker):
    """A worker that shows how it was configured."""

    settings: Settings

    def running(self, settings: Settings) -> AbstractAsyncContextManager[RunningWorker]:
        self.settings = settings
        return super().running(settings)


def command(*arguments: str) -> list[str]:
    """Give the command of a pytest that has the plugin as after an installation."""
    is_installed = bool(entry_points(group="pytest11", name="relay"))
    plugins = ["no:cacheprovider", *([] if is_installed else ["relay.testing.plugin"])]
    # Others that happen to be installed here, and take seconds to import.
    plugins += ["no:schemathesis", "no:hypothesispytest"]
    options = [word for name in plugins for word in ("-p", name)]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def project(folder: Path, body: str, **ini: str) -> None:
    """Write a project with its agent, one test module, and an ini file without surprises."""
    settings = {
        "asyncio_default_fixture_loop_scope": "function",
        "filterwarnings": "error",
        **ini,
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    (folder / "pytest.ini").write_text("\n".join(["[pytest]", *lines]))
    (folder / "agents.py").write_text(textwrap.dedent(AGENT))
    (folder / "test_it.py").write_text(textwrap.dedent(AGENT) + textwrap.dedent(body))


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run a project's tests; give what pytest printed."""
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout + done.stderr


# --- In this process: the fixtures as our own tests use them ---


@pytest.mark.relay(workers=[local])
async def test_fixtures_start_a_relay_and_connect_users(
    relay_stack: RelayStack, relay_client: object, relay_token: object
) -> None:
    assert callable(relay_client)
    assert callable(relay_token)
    alice: WebSocketTestUtility = await relay_client("alice")
    bob: WebSocketTestUtility = await relay_client("bob")
    runs = {client: await client.ask("3") for client in (alice, bob)}
    for client, run_id in runs.items():
        assert (await client.wait_end(run_id))["data"]["result"] == run_id
        client.assert_complete(run_id)
        thoughts = client.events_of(run_id, "agent_thinking")
        assert [one["data"]["thought"] for one in thoughts] == ["0", "1", "2"]
    relay_stack.assert_isolated()
    expired = WebSocketTestUtility("x", "x", relay_stack.urls, relay_token("x", ttl_s=-60))
    with pytest.raises(Exception, match="token"):
        await expired.start()


@pytest.mark.relay(workers=[local])
async def test_redis_can_fall_silent_and_nothing_is_lost(relay_stack: RelayStack) -> None:
    alice = await relay_stack.client("alice")
    first = await alice.ask("2")
    await alice.wait_end(first)
    relay_stack.pause_redis()
    asking = asyncio.create_task(alice.ask("2"))
    done, _ = await asyncio.wait({asking}, timeout=0.3)
    assert not done
    relay_stack.resume_redis()
    second = await asking
    await alice.wait_end(second)
    assert not alice.outages
    alice.assert_complete(second)


@pytest.mark.relay(workers=[local])
async def test_worker_in_this_process_cannot_be_killed(relay_stack: RelayStack) -> None:
    with pytest.raises(ConfigurationError, match="module:attribute"):
        await relay_stack.kill_worker()


@pytest.mark.relay(gateways=0, settings={"CANCEL_GRACE_MS": 700})
async def test_worker_in_this_process_is_configured_by_its_stack_alone(
    relay_stack: RelayStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_LEASE_MS", "60000")
    monkeypatch.setenv("RELAY_WORKER_METRICS_PORT", "0")
    worker = SettingsOf("theirs")
    worker.agent("count")(count)
    await relay_stack.add_worker(worker, WORKER_CONCURRENCY=3)
    settings = worker.settings
    assert (settings.lease_ms, settings.worker_metrics_port) == (15_000, None)
    assert (settings.cancel_grace_ms, settings.worker_concurrency) == (700, 3)
    assert os.environ["RELAY_LEASE_MS"] == "60000"


@pytest.mark.relay(gateways=2)
async def test_harm_comes_to_gateways_and_workers_and_clients_return(
    relay_stack: RelayStack, tmp_path: Path
) -> None:
    (tmp_path / "their_agents.py").write_text(textwrap.dedent(AGENT))
    for _ in range(2):
        await relay_stack.start_worker("their_agents:worker", tmp_path, LEASE_MS=1_500)
    alice = await relay_stack.client("alice")
    run_id = await alice.ask("one " * 20)
    await alice.wait_for("text_delta")
    await relay_stack.kill_gateway(0)
    await alice.wait_end(run_id)
    await relay_stack.restart_gateway(0)
    await relay_stack.stop_gateway(1)
    await relay_stack.kill_worker(0)
    again = await alice.ask("two")
    await alice.wait_end(again)
    for each in (run_id, again):
        alice.assert_complete(each)
    assert len(alice.outages) >= 2


# --- In a process of its own: the plugin as others have it ---


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_works_with_either_mode_of_pytest_asyncio(tmp_path: Path, mode: str) -> None:
    project(
        tmp_path,
        """
        @pytest.mark.asyncio
        @pytest.mark.relay(workers=[worker])
        async def test_async(relay_stack, relay_client):
            alice = await relay_client("alice")
            run_id = await alice.ask("hello")
            await alice.wait_end(run_id)
            alice.assert_complete(run_id, text="hello ")
        """,
        asyncio_mode=mode,
    )
    output = run_pytest(tmp_path)
    assert "1 passed" in output, output
    assert "warning" not in output


def test_without_pytest_asyncio_it_says_what_to_do(tmp_path: Path) -> None:
    project(
        tmp_path,
        """
        def test_needs_a_loop(relay_stack):
            pass

        @pytest.mark.relay(workers=[worker])
        def test_needs_none(relay_stack_sync):
            alice = relay_stack_sync.client("alice")
            run_id = alice.ask("hello")
            assert alice.wait_end(run_id)["data"]["result"] == "hello "
            alice.drop_connection()
            alice.wait_connected()
            alice.assert_complete(run_id)
            relay_stack_sync.assert_isolated()
            assert [gateway.is_running for gateway in relay_stack_sync.gateways] == [True]
        """,
    )
    text = (tmp_path / "pytest.ini").read_text().replace("asyncio_default", "#")
    (tmp_path / "pytest.ini").write_text(text)
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "1 passed, 1 error" in output, output
    assert "relay_stack needs pytest-asyncio: pip install 'agent-relay[testing]'" in output
    assert "relay_stack_sync" in output


@pytest.fixture(scope="module")
def their_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest prints about a project in which some things go wrong."""
    folder = tmp_path_factory.mktemp("theirs")
    project(
        folder,
        """
        from relay.testing import streams

        def count(stack):
            return len(stack.gateways), len(stack.workers)

        def test_options_from_the_file(relay_stack_sync):
            assert count(relay_stack_sync) == (1, 1)
            alice = relay_stack_sync.client("alice")
            run_id = alice.ask("hello")
            assert alice.wait_end(run_id)["data"]["result"] == "hello "

        @pytest.mark.relay(gateways=2)
        class TestMarked:
            @pytest.mark.relay(workers=[])
            def test_nearest_mark(self, relay_stack_sync):
                assert count(relay_stack_sync) == (2, 0)

        @pytest.mark.relay(workers=[worker])
        def test_waits_in_vain(relay_stack_sync):
            alice = relay_stack_sync.client("alice")
            run_id = alice.ask("hello")
            alice.wait_for("agent_error", 0.5, run_id=run_id)

        FRAMES = [
            {"type": "connection_established", "user_id": "a", "position": "e:0",
             "recovered": True},
            {"type": "agent_queued", "offset": 1, "seq": 1, "run_id": "r", "user_id": "a",
             "data": {}},
            {"type": "tool_completed", "offset": 2, "seq": 2, "run_id": "r", "user_id": "a",
             "data": {}},
        ]

        def test_illegal_stream(relay_streams):
            streams.record("phone", "a", lambda: FRAMES)

        @pytest.mark.relay_any_stream(reason="the frames are made up")
        def test_exempt(relay_streams):
            streams.record("phone", "a", lambda: FRAMES)

        @pytest.mark.relay_any_stream
        def test_exempt_without_a_reason(relay_streams):
            pass

        @pytest.mark.relay(workers=[])
        def test_illegal_stream_of_a_stack(relay_stack_sync):
            streams.record("phone", "a", lambda: FRAMES)

        @pytest.mark.relay(workers=[])
        @pytest.mark.relay_any_stream
        def test_stack_exempt_without_a_reason(relay_stack_sync):
            pass

        @pytest.mark.asyncio
        @pytest.mark.relay(workers=[])
        async def test_fails_with_two_stacks(relay_stack_factory):
            for _ in range(2):
                await relay_stack_factory()
            raise AssertionError
        """,
        relay_workers="agents:worker",
        relay_settings="MAX_ACTIVE_RUNS_PER_USER=3",
    )
    return run_pytest(folder, "-rA")


def test_options_come_from_the_ini_file_and_marks_win(their_output: str) -> None:
    assert "PASSED test_it.py::test_options_from_the_file" in their_output, their_output
    assert "PASSED test_it.py::TestMarked::test_nearest_mark" in their_output, their_output


def test_failure_shows_the_timeline_and_the_logs(their_output: str) -> None:
    assert "FAILED test_it.py::test_waits_in_vain" in their_output, their_output
    assert "no agent_error of run_" in their_output
    assert "agent_completed  offset=" in their_output
    assert "gateway-0.log" in their_output
    assert "connection opened" in their_output


def test_failure_shows_the_logs_of_every_stack(their_output: str) -> None:
    shown = their_output.partition("__ test_fails_with_two_stacks __")[2].partition("\n____")[0]
    assert "relay: gateway-0.log" in shown, their_output
    assert "relay stack 2: gateway-0.log" in shown
    assert shown.count("gateway started") == 2


def test_illegal_stream_fails_a_test_without_an_event_loop_alone(their_output: str) -> None:
    assert "INTERNALERROR" not in their_output, their_output
    assert "Event loop is closed" not in their_output
    assert "ERROR test_it.py::test_illegal_stream_of_a_stack" in their_output
    assert "ERROR test_it.py::test_stack_exempt_without_a_reason" in their_output
    shown = their_output.partition("of test_illegal_stream_of_a_stack __")[2].partition("\n____")[0]
    assert "the attempt has not started" in shown
    assert "relay: gateway-0.log" in shown


def test_stream_against_the_grammar_fails_the_test_that_recorded_it(their_output: str) -> None:
    assert "ERROR test_it.py::test_illegal_stream" in their_output, their_output
    assert "the attempt has not started" in their_output
    assert "ERROR test_it.py::test_exempt_without_a_reason" in their_output
    assert "must say why" in their_output
    assert "ERROR test_it.py::test_exempt " not in their_output


def test_project_that_does_not_use_it_pays_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(
            """
            import sys

            def test_it():
                ours = {"gateway", "agent_worker", "redis", "pydantic", "websockets", "starlette"}
                assert not ours & set(sys.modules)
                assert "relay.testing.plugin" in sys.modules
            """
        )
    )
    output = run_pytest(tmp_path, "-W", "error::ResourceWarning")
    assert "1 passed" in output, output


def test_nothing_outlives_a_pytest_that_is_killed(tmp_path: Path) -> None:
    project(
        tmp_path,
        """
        import pathlib, time

        @pytest.mark.relay(workers=["agents:worker"])
        def test_it(relay_stack_sync):
            pathlib.Path("started").touch()
            time.sleep(600)
        """,
    )
    process = subprocess.Popen(
        command("-q"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RELAY_TEST_REDIS": "process"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [" ".join(child.cmdline()) for child in alive]
