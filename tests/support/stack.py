"""The stack of the project's own tests: its logs are shown, and read for defects."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import psutil

from relay.testing.stack import READY_DEADLINE_S, GatewayProcess
from relay.testing.stack import Stack as TestingStack
from tests.support.acl import as_user
from tests.support.secrets_watch import remember

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from relay.testing.processes import ManagedProcess

__all__ = ["READY_DEADLINE_S", "GatewayProcess", "Stack", "rss_bytes"]


def rss_bytes(process: ManagedProcess) -> int:
    """Give the memory that a process holds in RAM."""
    return int(psutil.Process(process.pid).memory_info().rss)


class Stack(TestingStack):
    """A stack whose processes log in to Redis with the rights of ``deploy/acl``.

    It prints the last lines of every process's output when its block raises.
    """

    def __init__(self, folder: Path, redis_url: str, **options: Any) -> None:
        super().__init__(folder, redis_url, login=as_user, **options)
        remember(self.secret, "the secret of a stack")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        if error is not None:
            self.show_logs()

    def show_logs(self) -> None:
        """Print the end of every process's output; pytest shows it with the failure."""
        for name, lines in self.last_lines().items():
            print(f"--- the end of {name}\n{lines}")

    def assert_no_defects(self, *, except_for: str | None = None) -> None:
        """Fail if a process logged an error: a defect that clients happened not to notice.

        Args:
            except_for: Name of an event that the test has provoked.
        """
        for process in self.processes:
            for line in process.log.splitlines():
                is_error = re.search(r'"level": ?"(error|critical)"', line) is not None
                is_provoked = except_for is not None and f'"event": "{except_for}"' in line
                is_defect = (is_error and not is_provoked) or "Traceback" in line
                assert not is_defect, (process.log_path.name, line)
