"""The checks of tests/conftest.py fail each test that leaves something behind, and no other."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_pytest(tmp_path: Path, body: str) -> str:
    """Run one test module under this project's conftest; give what pytest printed."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_it.py").write_text(textwrap.dedent(body))
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RELAY_TEST_REDIS": "process"}
    environment.pop("CI", None)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        pytest.param(
            """
            import asyncio
            kept = []
            async def test_it():
                kept.append(asyncio.create_task(asyncio.Event().wait(), name="forgotten"))
            """,
            "left asyncio tasks behind",
            id="task",
        ),
        pytest.param(
            """
            import socket
            kept = []
            def test_it():
                kept.append(socket.create_server(("127.0.0.1", 0)))
            """,
            "socket: AF_INET",
            id="socket",
        ),
        pytest.param(
            """
            import subprocess, sys
            kept = []
            def test_it():
                kept.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1))
            """,
            "-c input()",
            id="process",
        ),
    ],
)
def test_what_a_test_leaves_behind_fails_it(tmp_path: Path, body: str, complaint: str) -> None:
    output = run_pytest(tmp_path, body)
    assert complaint in output
    assert "1 passed, 1 error" in output


def test_tidy_tests_pass(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        """
        import asyncio
        async def test_redis(redis, key_prefix):
            await redis.set(key_prefix, "1")
        async def test_own_redis(own_redis):
            server = await own_redis()
            async with server.client() as client:
                assert await client.ping()
        async def test_task_that_is_awaited():
            await asyncio.create_task(asyncio.sleep(0))
        """,
    )
    assert "3 passed" in output, output
