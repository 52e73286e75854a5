"""Saying again and again in the log what stays wrong, but not each time."""

from __future__ import annotations

REPEAT_S = 60.0
"""The same trouble of the same user is a line this often."""

MOST_KEPT = 1_000


class Complaints:
    """Remembers about whom something was said lately."""

    def __init__(self) -> None:
        self._due_s: dict[str, float] = {}

    def is_due(self, name: str, now_s: float) -> bool:
        """Say whether to speak of it now; whoever is told so, does."""
        if self._due_s.get(name, now_s) > now_s:
            return False
        if len(self._due_s) >= MOST_KEPT:
            self._due_s = {kept: due_s for kept, due_s in self._due_s.items() if due_s > now_s}
        if len(self._due_s) >= MOST_KEPT:
            # So much trouble is everybody's: the first thousand say enough.
            return False
        self._due_s[name] = now_s + REPEAT_S
        return True
