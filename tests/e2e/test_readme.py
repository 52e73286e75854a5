"""What READMEs promise: commands and code, carried out as a reader would, and tests that exist."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from relay.testing.processes import ManagedProcess
from tests.support.redis_server import free_port
from tests.support.stack_process import RELAY, clean_environment, run_relay
from tests.test_architecture import shell_commands

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
READY_DEADLINE_S = 30.0

# What a reader with a free port and a Redis elsewhere would write instead.
README_PORT = "8080"
README_REDIS = "redis://localhost:6379/0"

pytestmark = pytest.mark.timeout(180)


class Reader:
    """Somebody who follows the README, with another port, Redis and secret than the README's."""

    def __init__(self, redis_url: str, key_prefix: str, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.variables = {
            "RELAY_REDIS_URL": redis_url,
            "RELAY_KEY_PREFIX": key_prefix,
            "RELAY_JWT_SECRET": "the secret of the reader: long enough",
            "RELAY_ADMIN_PORT": "0",
        }
        self.processes: list[ManagedProcess] = []
        self._redis_url = redis_url

    def adapted(self, arguments: list[str]) -> list[str]:
        """Give a command of the README as it is typed here."""
        return [
            word.replace(README_REDIS, self._redis_url).replace(README_PORT, str(self.port))
            for word in arguments
        ]

    def start(self, arguments: list[str], folder: Path) -> ManagedProcess:
        """Start a command that stays."""
        process = ManagedProcess(
            [str(RELAY), *self.adapted(arguments)],
            environment=clean_environment(**self.variables),
            folder=folder,
            log_path=self.folder / f"{arguments[0]}.log",
        )
        self.processes.append(process)
        process.start()
        return process

    def run(self, arguments: list[str]) -> str:
        """Run a command to its end; give what it printed."""
        done = run_relay(*self.adapted(arguments), folder=self.folder, **self.variables)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def wait_until_logged(self, process: ManagedProcess, words: str) -> None:
        """Wait until a process says something."""
        async with asyncio.timeout(READY_DEADLINE_S):
            while words not in process.log:
                assert process.is_running, process.log
                await asyncio.sleep(0.05)


@pytest.fixture
async def reader(redis_url: str, key_prefix: str, tmp_path: Path) -> AsyncIterator[Reader]:
    reader = Reader(redis_url, key_prefix, tmp_path)
    yield reader
    for process in reader.processes:
        process.end_blocking()


def readme_commands() -> dict[str, list[str]]:
    """Give the README's relay commands, each by its first word."""
    commands = [words[1:] for words in shell_commands(README) if words[0] == "relay"]
    found = {arguments[0]: arguments for arguments in commands}
    assert list(found) == ["gateway", "worker", "token", "send"]
    assert len(found) == len(commands)
    assert README_PORT in " ".join(found["gateway"])
    return found


async def test_commands_lead_from_nothing_to_an_answer(reader: Reader) -> None:
    commands = readme_commands()
    gateway = reader.start(commands["gateway"], ROOT)
    worker = reader.start(commands["worker"], ROOT)
    await reader.wait_until_logged(gateway, "gateway started")
    await reader.wait_until_logged(worker, "worker_started")

    link = urlsplit(reader.run(commands["token"]).strip())
    [token] = parse_qs(link.fragment)["token"]
    async with httpx.AsyncClient(
        base_url=f"{link.scheme}://{link.netloc}", trust_env=False
    ) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert "text/html" in page.headers["Content-Type"]
        answer = await client.get("/v1/runs", headers={"Authorization": f"Bearer {token}"})
        assert answer.json() == {"runs": []}

        assert "3 words, 2 of them distinct" in reader.run(commands["send"])
        answer = await client.get("/v1/runs", headers={"Authorization": f"Bearer {token}"})
        assert [run["status"] for run in answer.json()["runs"]] == ["completed"]
    assert await worker.terminate() == 0
    assert await gateway.terminate() == 0


async def test_agent_works_as_it_is_printed(reader: Reader) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (reader.folder / "agents.py").write_text(code)
    gateway = reader.start(["gateway", "--port", README_PORT], ROOT)
    worker = reader.start(["worker", "agents:worker"], reader.folder)
    await reader.wait_until_logged(gateway, "gateway started")
    await reader.wait_until_logged(worker, "worker_started")
    answer = reader.run(readme_commands()["send"])
    assert "Your message has **3** words, 2 distinct." in answer


def test_tests_in_the_list_of_what_is_shown_exist() -> None:
    named = re.findall(
        r"`([\w/.]+\.(?:py|mjs))(?:::(\w+))?`", (ROOT / "tests/README.md").read_text()
    )
    assert len(named) > 20
    missing = []
    for name, test in named:
        path = ROOT / "tests" / name
        if not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            missing.append(f"{name}::{test}")
    assert not missing
