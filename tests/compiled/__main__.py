"""``make test-compiled``: the tests of delivery, on the compiled wheel instead of the source.

Left out are the tests that take a rule out of the running code to see that it is missed: compiled
code cannot be changed while it runs. They are about the tests, and run on the source.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.compiled import compiled_relay, environment
from benchmarks.processes import ROOT, BenchmarkFailed

COMPILED = (
    "relay.codec",
    "relay.recovery.feed",
    "relay.pubsub",
    "gateway.feed",
    "gateway.direct",
    "gateway.protocol",
)
TESTS = (
    "tests/unit/relay/test_codec.py",
    "tests/unit/relay/test_recovery.py",
    "tests/unit/relay/test_recovery_model.py",
    "tests/unit/relay/test_recovery_stateful.py",
    "tests/unit/relay/test_ring.py",
    "tests/unit/gateway",
    "tests/integration/test_feed_hub.py",
    "tests/integration/test_gateway_delivery.py",
    "tests/integration/test_gateway_frames.py",
    "tests/integration/test_gateway_socket.py",
    "tests/integration/test_gateway_sse.py",
    "tests/integration/test_subscriber.py",
    "tests/fuzz/test_parsers.py",
)
SOURCE_ONLY = "not left_out and not taken_out"


def main() -> int:
    try:
        folder = compiled_relay(lambda text: print(f"... {text}", flush=True))
    except BenchmarkFailed as failure:
        print(f"Error: {failure}", file=sys.stderr)
        return 1
    if folder is None:
        print("Error: install a C compiler, for example: apt-get install gcc", file=sys.stderr)
        return 1
    env = {**os.environ, **environment(folder)}
    for name in COMPILED:
        # Otherwise this would say that the source passes.
        where = f"import sys, {name}; sys.exit(not {name}.__file__.endswith('.so'))"
        if subprocess.run([sys.executable, "-c", where], env=env, check=False).returncode:
            print(f"Error: {name} of the wheel in {folder} is not compiled", file=sys.stderr)
            return 1
    pytest = [sys.executable, "-m", "pytest", "--import-mode=append", "-k", SOURCE_ONLY]
    parallel = ["--numprocesses", "2", "--dist", "loadfile"]
    command = [*pytest, *parallel, *TESTS, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
