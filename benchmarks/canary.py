"""What the machine itself adds to latencies: how late a thread is woken that only sleeps."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from benchmarks.figures import distribution_of, format_ms

INTERVAL_S = 0.005


class Canary:
    """Sleeps in a thread for as long as the block lasts, and notes by how much it oversleeps."""

    def __init__(self) -> None:
        self._late_ms: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sleep, name="canary", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _sleep(self) -> None:
        while not self._is_over.is_set():
            began_s = time.perf_counter()
            time.sleep(INTERVAL_S)
            self._late_ms.append((time.perf_counter() - began_s - INTERVAL_S) * 1e3)

    def note(self) -> str:
        """Give a sentence for the results."""
        late = distribution_of(self._late_ms)
        return (
            f"Meanwhile a thread that only slept was woken late by {format_ms(late.p99_ms)} ms "
            f"(p99) and {format_ms(late.max_ms)} ms (max): so much the machine adds to every hop."
        )
