"""Delivery's state machine: a feed with its cursors, without clock or I/O.

A **feed** is a gateway's view of one user's channel: how far it has been read without a gap (the
head) and a short ring of recent publications. A **cursor** is one connection's place in it. A
cursor is live while it has everything up to the head: a publication is then written to it as it
comes. In every other case it catches up, by reading from the ring or from history until it meets
the head. Nothing is ever queued for a cursor that is behind, so memory is bounded, and resume,
gap repair, slow clients and large events are one code path.

Inputs are methods; what has to be read or fetched is left in ``Feed.effects`` for the shell.
Docs: docs/delivery.md; the reasons stand in ADR 0001 and ADR 0002.

====================  ==============================================================
``feed``              One user's channel: what is delivered, and when it has a gap.
``cursor``            One connection: where it starts, catches up and is live.
``ring``              The publications that a feed keeps for whoever is just behind.
``parts``             One large event or text on its way to a client.
``pages``             What a read of history gives.
``effects``           What the machine asks of its shell.
``requests``          Which of these one answer serves.
====================  ==============================================================
"""

from relay.recovery.cursor import Cursor, CursorState
from relay.recovery.effects import (
    Advance,
    Broken,
    Effect,
    FeedState,
    FetchBody,
    Read,
    Request,
    ResetReason,
    Rotate,
    Since,
    Sink,
)
from relay.recovery.feed import Feed
from relay.recovery.pages import (
    HEADER_ONLY,
    ActiveRun,
    LargeText,
    Page,
    TextMark,
    surviving_offset,
)
from relay.recovery.parts import PART_BYTES, PART_THRESHOLD_BYTES
from relay.recovery.requests import RequestQueue, SharedRequest

__all__ = [
    "HEADER_ONLY",
    "PART_BYTES",
    "PART_THRESHOLD_BYTES",
    "ActiveRun",
    "Advance",
    "Broken",
    "Cursor",
    "CursorState",
    "Effect",
    "Feed",
    "FeedState",
    "FetchBody",
    "LargeText",
    "Page",
    "Read",
    "Request",
    "RequestQueue",
    "ResetReason",
    "Rotate",
    "SharedRequest",
    "Since",
    "Sink",
    "TextMark",
    "surviving_offset",
]
