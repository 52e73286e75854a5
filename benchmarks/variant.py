"""Runs a ``relay`` command with one thing about the process changed.

    python -m benchmarks.variant NAME gateway --port=0 ...

For deciding by numbers (``variants.py``): nothing of this is in the product.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from relay import cli


def _as_it_is() -> None:
    pass


Factory = Callable[[], asyncio.AbstractEventLoop]


def _use_loop(factory: Factory) -> None:
    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main)

    uvloop.run = run  # type: ignore[assignment]


def _asyncio_loop() -> None:
    _use_loop(asyncio.new_event_loop)


def _fast_transports(factory: Factory) -> None:
    """Use aiofastnet's transports, which are not among the project's dependencies."""
    _use_loop(importlib.import_module("aiofastnet").loop_factory(factory))


def _freeze() -> None:
    """What is imported is not looked at any more."""
    importlib.import_module("gateway.app")
    gc.collect()
    gc.freeze()


def _rare_collections() -> None:
    _freeze()
    gc.set_threshold(50_000, 20, 50)


def _no_collections() -> None:
    gc.disable()


VARIANTS: dict[str, Callable[[], None]] = {
    "as it is": _as_it_is,
    "asyncio loop": _asyncio_loop,
    "aiofastnet on uvloop": lambda: _fast_transports(uvloop.new_event_loop),
    "aiofastnet on asyncio": lambda: _fast_transports(asyncio.new_event_loop),
    "gc.freeze": _freeze,
    "gc rarely": _rare_collections,
    "gc off": _no_collections,
}


def main() -> None:
    name = sys.argv[1]
    sys.argv[1:] = sys.argv[2:]
    VARIANTS[name]()
    cli.main()


if __name__ == "__main__":
    main()
