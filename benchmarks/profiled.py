"""Runs a ``relay`` command with a sampling profiler; the stacks are written when it ends.

    python -m benchmarks.profiled STACKS gateway --port=0 ...

From one SIGUSR1 to the next the process is interrupted after each few milliseconds of its processor
time and notes where it is. Nothing of this is in the product: only what is started in this way is
profiled.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from relay import cli

INTERVAL_S = 0.001
"""The kernel rounds it up to its own tick, often 4 ms."""

MAX_DEPTH = 120


class Sampler:
    """Counts the stacks that it finds."""

    def __init__(self) -> None:
        self._stacks: Counter[tuple[tuple[str, str, int], ...]] = Counter()
        self._is_on = False

    def toggle_on_signal(self) -> None:
        signal.signal(signal.SIGPROF, self._sample)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.signal(signal.SIGUSR1, self._toggle)

    def _toggle(self, _: int, __: FrameType | None) -> None:
        self._is_on = not self._is_on
        interval_s = INTERVAL_S if self._is_on else 0
        signal.setitimer(signal.ITIMER_PROF, interval_s, interval_s)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        stack: list[tuple[str, str, int]] = []
        while frame is not None and len(stack) < MAX_DEPTH:
            code = frame.f_code
            stack.append((code.co_filename, code.co_qualname, code.co_firstlineno))
            frame = frame.f_back
        self._stacks[tuple(reversed(stack))] += 1

    def write(self, path: Path) -> None:
        """Write one line a stack: frames separated by semicolons, a space, the count."""
        lines = [
            ";".join(_label(*frame) for frame in stack) + f" {count}\n"
            for stack, count in self._stacks.most_common()
        ]
        path.write_text("".join(lines))


def _label(filename: str, name: str, line: int) -> str:
    parts = Path(filename).parts
    return f"{name} ({'/'.join(parts[-2:])}:{line})".replace(";", ",")


def main() -> None:
    path = Path(sys.argv[1])
    sys.argv[1:] = sys.argv[2:]
    sampler = Sampler()
    sampler.toggle_on_signal()
    try:
        cli.main()
    finally:
        sampler.stop()
        sampler.write(path)


if __name__ == "__main__":
    main()
