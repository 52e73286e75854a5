"""``relay workers``, ``dead-letters``, ``runs``, ``cancel``, ``answer`` beside a ``relay up``."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.cli.local import DataFolder
from relay.codec import Task, encode_task
from relay.keys import Keys
from relay.scripts import RedisLink
from relay.tasks import TASK_FIELD, bury
from tests.support.stack_process import RELAY, RelayUp, clean_environment, run_relay

WORKER = """
import asyncio
from agent_worker import Run, Worker

worker = Worker(name="mine")

@worker.agent("echo")
async def echo(run: Run) -> str:
    return f"echo of {run.request.content}"

@worker.agent("approve")
async def approve(run: Run) -> str:
    return "sent" if await run.approve("Send the mail?", timeout_s=60) else "not sent"

@worker.agent("choose")
async def choose(run: Run) -> str:
    colour = await run.ask("Which colour?", "choice", choices=["red", "blue"], timeout_s=60)
    name = await run.ask("What name?", timeout_s=60)
    return f"{name} is {colour}"

@worker.agent("wait")
async def wait(run: Run) -> str:
    await asyncio.Event().wait()
"""

DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayUp]:
    folder = tmp_path_factory.mktemp("operators")
    (folder / "mine.py").write_text(WORKER)
    with RelayUp(folder, "--port", "0", "--gateways", "1", "--worker", "mine:worker") as stack:
        yield stack.wait_until_ready()
        stack.stop(signal.SIGTERM)


@contextmanager
def sending(up: RelayUp, user: str, agent: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [RELAY, "send", "go", "--user", user, "--agent", agent],
        cwd=up.folder,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str], words: str) -> str:
    """Wait for a line of stderr with these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"it ended without saying {words!r}")


def runs_of(up: RelayUp, user: str) -> list[dict[str, Any]]:
    done = run_relay("runs", "--user", user, "--json", folder=up.folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def until(look: Callable[[], Any]) -> Any:
    end_s = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.1)
    return found


def on_redis(up: RelayUp, do: Callable[[RedisLink, Keys], Awaitable[Any]]) -> None:
    stack = DataFolder(up.folder / ".relay").running()
    assert stack is not None

    async def work() -> None:
        link = RedisLink(stack.redis_url)
        try:
            await do(link, Keys(stack.key_prefix))
        finally:
            await link.aclose()

    asyncio.run(work())


# --- Questions ---


def test_without_a_terminal_send_says_which_command_answers(up: RelayUp) -> None:
    with sending(up, "ann", "approve") as asking:
        said(asking, "Send the mail?")
        line = said(asking, "Answer with: ")
        words = shlex.split(line.split("Answer with: ")[1])
        assert words[:4] == ["relay", "answer", "--user", "ann"]
        answered = run_relay(*words[1:], folder=up.folder)
        assert (answered.returncode, answered.stdout) == (0, "Send the mail? true\n")
        stdout, stderr = asking.communicate(timeout=DEADLINE_S)
        assert (asking.returncode, stdout) == (0, "sent\n")
        assert "Answered" in stderr


def test_only_open_question_is_answered_without_naming_it(up: RelayUp) -> None:
    with sending(up, "bea", "approve") as asking:
        said(asking, "Answer with: ")
        denied = run_relay("answer", "--user", "bea", "--deny", folder=up.folder)
        assert (denied.returncode, denied.stdout) == (0, "Send the mail? denied\n")
        assert asking.communicate(timeout=DEADLINE_S)[0] == "not sent\n"
    late = run_relay("answer", "--user", "bea", "--value", "true", folder=up.folder)
    assert late.returncode == 1
    assert "no open question" in late.stderr


def test_answers_by_value_and_refuses_what_does_not_fit(up: RelayUp) -> None:
    with sending(up, "cem", "choose") as asking:
        said(asking, "Answer with: ")
        wrong = run_relay("answer", "--user", "cem", "--value", "green", folder=up.folder)
        assert wrong.returncode == 1
        assert "Choose one of: red, blue." in wrong.stderr
        assert run_relay("answer", "--user", "cem", "--value", '"blue"', folder=up.folder).stdout
        said(asking, "What name?")
        said(asking, "Answer with: ")
        assert run_relay("answer", "--user", "cem", "--value", "sky", folder=up.folder).stdout
        assert asking.communicate(timeout=DEADLINE_S)[0] == "sky is blue\n"


@pytest.mark.parametrize(
    "options", [[], ["--value", "true", "--deny"], ["--value", "1", "--run", "run_x"]]
)
def test_answer_that_cannot_be_is_one_sentence(up: RelayUp, options: list[str]) -> None:
    done = run_relay("answer", "--user", "dan", *options, folder=up.folder)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


class Terminal:
    """``relay send`` on a terminal, with somebody who types."""

    def __init__(self, up: RelayUp, user: str, agent: str) -> None:
        self._outer, inner = pty.openpty()
        self.process = subprocess.Popen(
            [RELAY, "send", "go", "--user", user, "--agent", agent],
            cwd=up.folder,
            env=clean_environment() | {"TERM": "xterm-256color", "COLUMNS": "80"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        self._shown = b""
        self._looked_to = 0

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._shown.decode(errors="replace"))

    def until(self, words: str) -> None:
        """Read on until these words are shown, after those of the last call."""
        while words not in self.text[self._looked_to :]:
            try:
                chunk = os.read(self._outer, 65_536)
            except OSError:
                chunk = b""
            assert chunk, self.text
            self._shown += chunk
        self._looked_to = self.text.index(words, self._looked_to) + len(words)

    def type(self, text: str) -> None:
        os.write(self._outer, text.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._outer)
        self.process.kill()
        self.process.wait()


def test_somebody_at_the_terminal_is_asked_and_answers(up: RelayUp) -> None:
    with Terminal(up, "eve", "choose") as terminal:
        terminal.until("Which colour?")
        terminal.until("a number from 1 to 2: ")
        terminal.type("9\n")
        terminal.until("Choose one of: red, blue.")
        terminal.until("a number from 1 to 2: ")
        terminal.type("1\n")
        terminal.until("What name?")
        terminal.until("a line of text: ")
        terminal.type("rosé\n")
        terminal.until("rosé is red")
        terminal.until("Done in")
        assert terminal.process.wait(DEADLINE_S) == 0


def test_question_that_another_device_answers_leaves_the_terminal(up: RelayUp) -> None:
    with Terminal(up, "fay", "approve") as terminal:
        terminal.until("y or n: ")
        run_relay("answer", "--user", "fay", "--value", "true", folder=up.folder)
        terminal.until("Answered")
        terminal.until("sent")
        assert terminal.process.wait(DEADLINE_S) == 0


def test_ctrl_c_while_a_question_is_open_stops_the_run(up: RelayUp) -> None:
    with Terminal(up, "gil", "approve") as terminal:
        terminal.until("y or n: ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("Stopped after")
        assert terminal.process.wait(DEADLINE_S) == 130


# --- Runs ---


def test_runs_are_listed_and_cancelled(up: RelayUp) -> None:
    nobody = run_relay("runs", "--user", "hal", folder=up.folder)
    assert (nobody.returncode, nobody.stdout) == (0, "")
    with sending(up, "hal", "wait") as waiting:
        [run] = until(lambda: [run for run in runs_of(up, "hal") if run["status"] == "running"])
        table = run_relay("runs", "--user", "hal", folder=up.folder).stdout
        assert re.search(rf"{run['run_id']}\s+running\s+wait\s", table), table
        cancelled = run_relay(
            "cancel", "--user", "hal", "--run", run["run_id"], "--reason", "costs", folder=up.folder
        )
        assert (cancelled.returncode, cancelled.stdout) == (0, "cancel_requested\n")
        waiting.communicate(timeout=DEADLINE_S)
        assert waiting.returncode == 130
    # What the caller wanted is so: no error.
    again = run_relay("cancel", "--user", "hal", "--run", run["run_id"], folder=up.folder)
    assert (again.returncode, again.stdout) == (0, "cancelled\n")
    assert (
        run_relay("send", "x", "--user", "kim", "--agent", "echo", folder=up.folder).returncode == 0
    )
    [done] = runs_of(up, "kim")
    late = run_relay("cancel", "--user", "kim", "--run", done["run_id"], folder=up.folder)
    assert late.returncode == 1
    assert "already ended" in late.stderr
    other = run_relay("cancel", "--user", "ida", "--run", run["run_id"], folder=up.folder)
    assert "no run with this id" in other.stderr


def test_runs_show_what_they_wait_for_and_how_to_answer(up: RelayUp) -> None:
    with sending(up, "jo", "approve") as asking:
        said(asking, "Answer with: ")
        shown = run_relay("runs", "--user", "jo", folder=up.folder).stdout
        assert "an answer" in shown
        assert "? Send the mail?" in shown
        command = next(line for line in shown.splitlines() if "relay answer" in line)
        assert run_relay(*shlex.split(command)[1:], folder=up.folder).returncode == 0
        asking.communicate(timeout=DEADLINE_S)


# --- Operators ---


def test_workers_show_what_they_run_and_what_waits(up: RelayUp) -> None:
    with sending(up, "kim", "wait") as waiting:

        def busy() -> dict[str, Any] | None:
            done = run_relay("workers", "--json", folder=up.folder)
            assert done.returncode == 0, done.stderr
            overview: dict[str, Any] = json.loads(done.stdout)
            return overview if overview["workers"][0]["runs"] else None

        overview = until(busy)
        [worker] = overview["workers"]
        assert (worker["name"], worker["active"]) == ("mine", 1)
        assert worker["agents"] == ["approve", "choose", "echo", "wait"]
        [run] = worker["runs"]
        assert (run["user_id"], run["agent"]) == ("kim", "wait")
        queues = {queue["agent"]: queue for queue in overview["queues"]}
        assert queues["wait"]["in_hand"]["count"] == 1
        table = run_relay("workers", folder=up.folder).stdout
        assert worker["worker_id"] in table
        assert f"{run['run_id']} wait of kim" in table
        waiting.send_signal(signal.SIGINT)
        waiting.communicate(timeout=DEADLINE_S)


def test_watching_goes_on_until_ctrl_c(up: RelayUp) -> None:
    with subprocess.Popen(
        [RELAY, "workers", "--watch", "--json"],
        cwd=up.folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        seen = [json.loads(watching.stdout.readline()) for _ in range(2)]
        assert all(len(overview["workers"]) == 1 for overview in seen)
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=DEADLINE_S)
        assert (watching.returncode, stderr) == (0, "")


def letters(up: RelayUp) -> list[dict[str, Any]]:
    done = run_relay("dead-letters", "list", "--json", folder=up.folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_dead_letters_are_listed_requeued_and_dropped(up: RelayUp) -> None:
    asked = run_relay("send", "again", "--user", "lea", "--agent", "echo", folder=up.folder)
    assert asked.stdout == "echo of again\n"
    [run] = runs_of(up, "lea")

    async def spoil(link: RedisLink, keys: Keys) -> None:
        task = encode_task(Task("lea", run["run_id"], "echo"))
        await bury(link, keys, "echo", task, "its worker was \x1b[2J lost")
        await link.client.xadd(keys.tasks("echo"), {TASK_FIELD: b"nonsense"})

    on_redis(up, spoil)
    nonsense, lost = until(lambda: len(found := letters(up)) == 2 and found)
    assert (lost["run_id"], nonsense["run_id"]) == (run["run_id"], None)
    table = run_relay("dead-letters", "list", folder=up.folder).stdout
    assert lost["id"] in table
    assert "\x1b" not in table
    assert "2 dead letters" in run_relay("workers", folder=up.folder).stdout

    requeued = run_relay("dead-letters", "requeue", lost["id"], folder=up.folder)
    assert requeued.returncode == 0, requeued.stderr
    new_run = requeued.stdout.split()[-1]
    assert requeued.stdout == f"{lost['id']}: new run {new_run}\n"
    found = until(
        lambda: [
            each
            for each in runs_of(up, "lea")
            if each["run_id"] == new_run and each["status"] == "completed"
        ]
    )
    assert found

    wrong = run_relay("dead-letters", "drop", lost["id"], nonsense["id"], "x", folder=up.folder)
    assert wrong.returncode == 1
    assert wrong.stdout == f"{nonsense['id']}: dropped\n"
    assert f"There is no dead letter {lost['id']}." in wrong.stderr
    assert "'x' is not the id of a dead letter." in wrong.stderr
    assert letters(up) == []


def test_all_dead_letters_at_once(up: RelayUp) -> None:
    async def spoil(link: RedisLink, keys: Keys) -> None:
        for number in range(3):
            gone = encode_task(Task("mia", f"run_gone{number}", "echo"))
            await bury(link, keys, "echo", gone, "broken")

    on_redis(up, spoil)
    page = run_relay("dead-letters", "list", "--limit", "2", folder=up.folder)
    assert page.stdout.count("run_gone") == 2
    more = shlex.split(page.stderr.split("More: relay ")[1])
    assert run_relay(*more, folder=up.folder).stdout.count("run_gone") == 1
    refused = run_relay("dead-letters", "requeue", "--all", folder=up.folder)
    assert refused.returncode == 1
    assert refused.stderr.count("cannot be repeated: it is not kept any more.") == 3
    dropped = run_relay("dead-letters", "drop", "--all", folder=up.folder)
    assert (dropped.returncode, dropped.stdout) == (0, "3 dropped\n")
    assert (
        "There are no dead letters." in run_relay("dead-letters", "list", folder=up.folder).stderr
    )
    neither = run_relay("dead-letters", "drop", folder=up.folder)
    assert neither.returncode == 1
    assert "--all" in neither.stderr


def test_operators_without_redis_are_told_so(tmp_path: Path) -> None:
    for command in (["workers"], ["dead-letters", "list"]):
        done = run_relay(*command, "--redis-url", "redis://127.0.0.1:1", folder=tmp_path)
        assert done.returncode == 1
        assert "does not answer" in done.stderr
        assert "Traceback" not in done.stderr
