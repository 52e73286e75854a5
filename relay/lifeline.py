"""What a process starts ends with it, however it ends: SIGKILL and power-off of a shell included.

A small shell waits at the other end of a pipe. The kernel closes the pipe when the last process
that holds it is gone; nobody has to run for that. It works on every POSIX system, for containers
as well as for processes, unlike Linux' parent-death signal.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

# A line through the pipe is the release; end of file without one is the loss of the owner.
# The shell ignores what a terminal sends to everyone: it has to outlive its owner.
_WAIT = 'trap "" INT TERM HUP QUIT; read -r released && exit 0; exec "$@"'

_END_GROUP = """
kill -TERM "-$1" 2>/dev/null
seconds=0
while kill -0 "-$1" 2>/dev/null && [ "$seconds" -lt "$2" ]; do
  sleep 1
  seconds=$((seconds + 1))
done
kill -KILL "-$1" 2>/dev/null
"""

_RELEASE_TIMEOUT_S = 5


class Lifeline:
    """Runs a command if, and only if, this process ends without having released it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._shell = subprocess.Popen(  # noqa: S603 (the caller is this package)
            ["/bin/sh", "-c", _WAIT, "lifeline", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @classmethod
    def for_process_group(cls, group_id: int, *, grace_s: int = 10) -> Lifeline:
        """End a process group: SIGTERM, and SIGKILL after ``grace_s``."""
        return cls(["/bin/sh", "-c", _END_GROUP, "lifeline", str(group_id), str(grace_s)])

    def release(self) -> None:
        """Forget about it: the guarded thing has ended or is in other hands. Idempotent."""
        pipe = self._shell.stdin
        if pipe is None or pipe.closed:
            return
        # The pipe is broken where somebody ended the shell: nothing is left to release then.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(b"released\n")
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        self._shell.wait(_RELEASE_TIMEOUT_S)
