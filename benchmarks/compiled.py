"""The relay as its compiled wheel, built where there is a compiler.

python -m benchmarks.compiled     prints the folder with its packages
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.native import cache_folder
from benchmarks.processes import ROOT, BenchmarkFailed

PACKAGES = ("relay", "gateway", "agent_worker")
HOOK = "HATCH_BUILD_HOOK_ENABLE_MYPYC"
BUILD_LIMIT_S = 600.0


def compiled_relay(say: Callable[[str], None]) -> Path | None:
    """Give a folder with the packages of the compiled wheel, or None where there is no C compiler.

    Raises:
        BenchmarkFailed: The wheel cannot be built although there is a compiler.
    """
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        say("no C compiler: the relay is measured as its source")
        return None
    folder = cache_folder() / f"relay-{_digest()}"
    if not folder.exists():
        say("building the compiled wheel: about a minute, and once for each state of the source")
        _build(folder)
    return folder


def environment(folder: Path | None) -> Mapping[str, str]:
    """Give the variables with which a process runs what is in the folder, not the source."""
    if folder is None:
        return {}
    # Without the second, the folder in which a process starts would come first.
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}


def _digest() -> str:
    digest = hashlib.sha256(sys.version.encode())
    sources = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    for path in (ROOT / "pyproject.toml", *sorted(sources)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        # The wheel is built from a source distribution, so that nothing is left beside the source.
        built = subprocess.run(
            [sys.executable, "-m", "build", "--outdir", work, str(ROOT)],
            env={**os.environ, HOOK: "1"},
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
            check=False,
        )
        if built.returncode:
            raise BenchmarkFailed(
                f"The compiled wheel cannot be built:\n{(built.stdout + built.stderr)[-2000:]}"
            )
        (wheel,) = Path(work).glob("*.whl")
        unpacked = Path(work) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        unpacked.rename(folder)


if __name__ == "__main__":
    print(compiled_relay(lambda text: print(f"... {text}", file=sys.stderr, flush=True)) or "")
