"""``relay send``, ``tail``, ``token`` and ``doctor`` beside a running ``relay up``."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack_process import RELAY, RelayUp, clean_environment, run_relay

WORKER = """
import asyncio
from agent_worker import AgentError, Run, Worker

worker = Worker(name="mine")

@worker.agent("echo", description="Says it again.")
async def echo(run: Run) -> str:
    await run.thinking("Listening")
    async with run.tool("repeat", {"times": 1}) as tool:
        await tool.progress(50, "half")
        tool.result = run.request.content
    for word in run.request.content.split(" "):
        await run.delta(word + " ")
    return run.text

@worker.agent("refuse")
async def refuse(run: Run) -> str:
    raise AgentError("invalid_request", "I will not.", recovery_suggestions=["Ask nicely."])

@worker.agent("wait")
async def wait(run: Run) -> str:
    await run.thinking("Waiting")
    await asyncio.Event().wait()
"""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayUp]:
    folder = tmp_path_factory.mktemp("up")
    (folder / "mine.py").write_text(WORKER)
    with RelayUp(folder, "--port", "0", "--worker", "mine:worker") as stack:
        yield stack.wait_until_ready()
        stack.stop(signal.SIGTERM)


def test_answer_goes_to_stdout_and_the_rest_to_stderr(up: RelayUp) -> None:
    done = run_relay("send", "one two", "--user", "ann", "--agent", "echo", folder=up.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one two \n"
    assert "Listening" in done.stderr
    assert "repeat" in done.stderr
    assert "Done in" in done.stderr


def test_question_may_come_from_stdin(up: RelayUp) -> None:
    done = subprocess.run(
        [RELAY, "send", "-", "--user", "ann", "--agent", "echo"],
        cwd=up.folder,
        env=clean_environment(),
        input="from a pipe",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "from a pipe \n"


def test_failed_agent_is_exit_code_2_with_guidance(up: RelayUp) -> None:
    done = run_relay("send", "x", "--user", "ann", "--agent", "refuse", folder=up.folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "I will not. (invalid_request)" in done.stderr
    assert "Ask nicely." in done.stderr


def test_unknown_agent_is_one_sentence_and_what_to_do(up: RelayUp) -> None:
    done = run_relay("send", "x", "--user", "ann", "--agent", "nobody", folder=up.folder)
    assert done.returncode == 1
    error, *advice = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert advice
    assert all(line.startswith("→ ") for line in advice)
    assert "Traceback" not in done.stderr


def test_ctrl_c_cancels_the_run(up: RelayUp) -> None:
    sending = subprocess.Popen(
        [RELAY, "send", "x", "--user", "carl", "--agent", "wait"],
        cwd=up.folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sending.stderr is not None
    while "Waiting" not in sending.stderr.readline():
        assert sending.poll() is None
    sending.send_signal(signal.SIGINT)
    _, rest = sending.communicate(timeout=30)
    assert sending.returncode == 130
    assert "Stopped after" in rest
    seen = tail(up, "carl", "--since", "0", until="agent_cancelled")
    assert "cancel_requested" in seen


def tail(up: RelayUp, user: str, *arguments: str, until: str) -> str:
    """Run ``relay tail`` until a line contains ``until``, then end it with Ctrl-C."""
    with subprocess.Popen(
        [RELAY, "tail", "--user", user, *arguments],
        cwd=up.folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tailing:
        assert tailing.stdout is not None
        lines = []
        for line in tailing.stdout:
            lines.append(line)
            if until in line:
                break
        tailing.send_signal(signal.SIGINT)
        tailing.communicate(timeout=30)
        assert tailing.returncode == 0
    return "".join(lines)


def test_tail_prints_one_line_for_each_event(up: RelayUp) -> None:
    run_relay("send", "hello you", "--user", "tina", "--agent", "echo", folder=up.folder)
    lines = tail(up, "tina", "--since", "0", until="agent_completed").splitlines()
    kinds = [line.split()[3] for line in lines]
    assert kinds[0] == "agent_queued"
    assert kinds[-1] == "agent_completed"
    assert "hello you" in lines[0]
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3}  run_", line) for line in lines)


def test_tail_as_json_gives_the_events_as_they_came(up: RelayUp) -> None:
    run_relay("send", "hello", "--user", "jill", "--agent", "echo", folder=up.folder)
    text = tail(up, "jill", "--since", "0", "--json", until='"agent_completed"')
    events = [json.loads(line) for line in text.splitlines()]
    assert {event["user_id"] for event in events} == {"jill"}
    seqs = [event["seq"] for event in events if "seq" in event]
    assert seqs == list(range(1, len(seqs) + 1))


def test_token_opens_a_connection_elsewhere(up: RelayUp, tmp_path: Path) -> None:
    made = run_relay("token", "--user", "tom", "--ttl-s", "60", folder=up.folder)
    assert made.stdout.count("\n") == 1
    address, _ = up.links()["alice", 2]
    asked = ("send", "hi", "--agent", "echo", "--url", address, "--token", made.stdout.strip())
    done = run_relay(*asked, folder=tmp_path)
    assert done.stdout == "hi \n", done.stderr
    link = run_relay("token", "--user", "tom", "--url", address, folder=up.folder)
    assert link.stdout.startswith(f"{address}/#token=")


def test_doctor_finds_the_stack_well(up: RelayUp) -> None:
    done = run_relay("doctor", "--json", folder=up.folder)
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert {finding["verdict"] for finding in findings} == {"ok"}, findings
    assert {"Redis", "Persistence", "Eviction", "Round trip"} <= {f["subject"] for f in findings}
    assert done.returncode == 0


def test_on_a_terminal_it_spins_and_the_answer_stays(up: RelayUp) -> None:
    outer, inner = pty.openpty()
    sending = subprocess.Popen(
        [RELAY, "send", "one two", "--user", "ann", "--agent", "echo"],
        cwd=up.folder,
        env=clean_environment() | {"TERM": "xterm-256color", "COLUMNS": "80"},
        stdin=inner,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    shown = b""
    try:
        while chunk := read_terminal(outer):
            shown += chunk
    finally:
        os.close(outer)
    assert sending.wait(30) == 0
    text = shown.decode()
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", text), text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "one two" in plain
    assert "Done in" in plain


def read_terminal(descriptor: int) -> bytes:
    """Read what was shown; nothing once the other side is closed, which Linux reports as EIO."""
    try:
        return os.read(descriptor, 65_536)
    except OSError:
        return b""


def test_warning_about_a_misspelt_variable(up: RelayUp) -> None:
    began = time.monotonic()
    done = run_relay("gateway", folder=up.folder, RELAY_REDIS_UR="redis://h")
    assert done.returncode == 1
    assert "RELAY_JWT_SECRET" in done.stderr
    done = run_relay(
        "gateway",
        folder=up.folder,
        RELAY_REDIS_UR="redis://h",
        RELAY_JWT_SECRET="s" * 32,
        RELAY_REDIS_URL="redis://127.0.0.1:1",
        RELAY_PORT="0",
        RELAY_ADMIN_PORT="0",
    )
    assert done.returncode == 1
    assert "Did you mean RELAY_REDIS_URL?" in done.stderr
    assert "does not answer" in done.stderr
    assert time.monotonic() - began < 30
