"""The page's modules, tested by Node's own test runner (tests/js)."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.needs_node
@pytest.mark.timeout(180)
def test_javascript_modules() -> None:
    files = sorted(
        str(path.relative_to(ROOT))
        for pattern in ("*.test.js", "*.test.mjs")
        for path in (ROOT / "tests/js").rglob(pattern)
    )
    assert files, "tests/js has no *.test.js or *.test.mjs"
    done = subprocess.run(
        ["node", "--test", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
