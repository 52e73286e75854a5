"""Makes the example files importable as they are for a worker: their folder is on the path."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"

for folder in (EXAMPLES, EXAMPLES / "data"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

# These tests state what is computed, not how quickly: a busy machine must not fail them.
settings.register_profile("examples", deadline=None)
settings.load_profile("examples")
