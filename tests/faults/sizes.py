"""The sizes of fault tests: small in ``make test``, full in ``make faults``, or one in both."""

from __future__ import annotations

from typing import Any

import pytest

one_size = pytest.mark.faults_both
"""For a round whose smallest size that shows anything is its full one."""


def sized(small: Any, full: Any) -> pytest.MarkDecorator:
    """Parametrise a test by ``size``."""
    return pytest.mark.parametrize(
        "size",
        [
            pytest.param(small, id="small"),
            pytest.param(full, id="full", marks=pytest.mark.faults_full),
        ],
    )
