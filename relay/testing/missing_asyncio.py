"""What stands in for the asynchronous fixtures where pytest-asyncio is missing: what to do."""

from __future__ import annotations

import pytest

_TEXT = (
    "{name} needs pytest-asyncio: pip install 'agent-relay[testing]'. Tests without an event loop "
    "can use relay_stack_sync."
)


def _missing(name: str) -> None:
    pytest.fail(_TEXT.format(name=name), pytrace=False)


@pytest.fixture
def relay_stack_factory() -> None:
    """Fails, and says what is missing."""
    _missing("relay_stack_factory")


@pytest.fixture
def relay_stack() -> None:
    """Fails, and says what is missing."""
    _missing("relay_stack")


@pytest.fixture
def relay_client() -> None:
    """Fails, and says what is missing."""
    _missing("relay_client")


@pytest.fixture
def relay_token() -> None:
    """Fails, and says what is missing."""
    _missing("relay_token")
