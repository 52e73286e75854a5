"""Every fault test in two sizes: small in ``make test``, full in ``make faults``."""

from __future__ import annotations

from typing import Any

import pytest


def sized(small: Any, full: Any) -> pytest.MarkDecorator:
    """Parametrise a test by ``size``."""
    return pytest.mark.parametrize(
        "size",
        [
            pytest.param(small, id="small"),
            pytest.param(full, id="full", marks=pytest.mark.faults_full),
        ],
    )
