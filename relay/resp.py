"""Redis' protocol: commands as bytes, in C. The client library writes them in Python."""

from __future__ import annotations

import hiredis


def pack(*words: str | bytes | int) -> bytes:
    """Give a command's bytes."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # stub of one word
    return packed
