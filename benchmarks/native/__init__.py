"""The parts in C: compiled when there is a compiler, once for each version of their source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O2", "-std=gnu11", "-Wall")


def cache_folder() -> Path:
    """Give the folder in which what was compiled is kept.

    Raises:
        PermissionError: It is not ours; what lies in it cannot be trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"agent-relay-benchmarks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; remove it")
    return folder


def compile_program(name: str) -> Path | None:
    """Give the compiled program, or None where there is no C compiler.

    Raises:
        subprocess.CalledProcessError: The compiler refuses it; that is a defect.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(__file__).parent / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes() + compiler.encode()).hexdigest()[:16]
    folder = cache_folder()
    program = folder / f"{name}-{digest}"
    if not program.exists():
        unfinished = folder / f"{name}-{os.getpid()}"
        subprocess.run([compiler, *_FLAGS, "-o", unfinished, source], check=True)
        unfinished.rename(program)
    return program
