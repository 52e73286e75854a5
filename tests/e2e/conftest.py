"""What the tests of whole stacks share: browsers, and the processes' logs beside a failure."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.support.stack import Stack


@pytest.fixture(
    params=[
        pytest.param("chromium", marks=[pytest.mark.needs_browser, pytest.mark.faults_both]),
        pytest.param("firefox", marks=[pytest.mark.needs_firefox, pytest.mark.faults_full]),
    ]
)
def browser_name(request: pytest.FixtureRequest) -> str:
    """Each browser in ``make faults``; the quick one in ``make test``."""
    name: str = request.param
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the last lines of a shared stack's processes with a test that fails on it."""
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(stack, Stack):
        for process in [*stack.gateways, *stack.workers]:
            lines = process.log.splitlines()[-40:]
            report.sections.append((process.log_path.name, "\n".join(lines)))
    return report
