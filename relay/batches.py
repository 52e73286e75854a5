"""What a run has published and Redis has not acknowledged: merged, numbered, bounded.

Decides without I/O what the next batch of a run is, and what an answer to it means. The
publisher sends; ``publish.lua`` has the other half of the contract.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relay.codec import EventEncoder, RunEnvelope
from relay.columns import Columns
from relay.errors import PublishRefused, RunEnded, StaleFence
from relay.events import Kind

BATCH_BYTES = 512 * 1024
"""A batch ends when it passes this; one larger event is a batch of its own."""

REPLAY_BYTES = 2 * 1024 * 1024
"""Acknowledged batches kept, in case Redis falls back to an older copy and asks again.

At the pace of a fast model, a minute of text: longer than a replica may lag behind.
"""

ITEM_OVERHEAD_BYTES = 400
"""What an event takes beside its bytes while it is kept: its batch, its arguments, the objects."""

STAGE_ABOVE_BYTES = 256 * 1024
"""A larger event is written to Redis in pieces beforehand: one script call would hold it up."""

TEXT_CHARS = 64 * 1024
"""Longer pieces of text are cut, for the same reason."""

KIND_STAGED = 3
"""Kind of a lifecycle event of which the arguments have the size only; see ``_run.lua``."""

_KIND_TEXT, _KIND_PROGRESS = int(Kind.TEXT), int(Kind.PROGRESS)

Arguments = tuple[int | str | bytes, ...]


@dataclass(slots=True)
class _Text:
    """Pieces of one message that wait to be sent as one delta."""

    message_id: str
    position: int
    bytes_before: int
    pieces: list[str]
    size_bytes: int
    timestamp_ms: int


@dataclass(slots=True)
class _Item:
    """One encoded event in the form of ``publish.lua``'s arguments."""

    arguments: Arguments
    size_bytes: int
    progress_of: str | None = None
    body: bytes | None = None


@dataclass(slots=True)
class Batch:
    """A numbered batch. It is sent again exactly as it is until it is acknowledged.

    Attributes:
        size_bytes: What the agent gave: events, and text without the envelope of its events.
        kept_bytes: What it takes to keep it; for a few letters of text many times that.
        bodies: Events to stage beforehand, by their index in the batch.
        is_staged: Whether Redis has them, as far as is known.
    """

    number: int
    arguments: Arguments
    size_bytes: int
    kept_bytes: int
    bodies: tuple[tuple[int, bytes], ...] = ()
    is_staged: bool = False


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Redis has the batch.

    Attributes:
        next_run: Run of the same thread whose turn has come, with its agent; None if none.
    """

    cancel: bytes | None
    next_run: tuple[str, str] | None


NOTHING_NEW = Acknowledged(None, None)


class OutgoingBatches:
    """The unacknowledged events of one attempt, in order.

    Args:
        envelope: The attempt.
        fence: Its fence.
        epoch: The channel's epoch when the run was claimed.

    Attributes:
        encoder: Gives the bytes of the attempt's events.
        size_bytes: What Redis has not acknowledged yet.
    """

    def __init__(self, envelope: RunEnvelope, fence: str, epoch: str) -> None:
        self.encoder = EventEncoder(envelope)
        self.size_bytes = 0
        self._envelope = envelope
        self._fence = fence
        self._epoch = epoch
        self._pending: deque[_Item | _Text] = deque()
        self._sending: deque[Batch] = deque()
        self._acknowledged: deque[Batch] = deque()
        self._acknowledged_bytes = 0
        self._next_number = 1
        self._has_urgent = False
        self._is_forced = False
        self._message_number = 0
        self._is_in_message = False
        self._position = self._bytes_before = 0
        self._open_text: _Text | None = None

    @property
    def is_empty(self) -> bool:
        """Whether Redis has acknowledged everything."""
        return not self._pending and not self._sending

    @property
    def is_due(self) -> bool:
        """Whether there is something that need not wait for more text to come."""
        return self._has_urgent or bool(self._sending)

    def add_event(self, columns: Columns) -> None:
        """Take an encoded lifecycle event. It ends the current message."""
        event = columns.event
        size = len(event)
        if size > STAGE_ABOVE_BYTES:
            staged = (KIND_STAGED, columns.type, columns.subject_id, columns.value)
            self._pending.append(_Item((*staged, size, columns.digest), size, body=event))
        else:
            self._pending.append(_Item(columns, size))
        self.size_bytes += size
        self._is_in_message = False
        self._open_text = None
        self._has_urgent = True

    def add_progress(self, tool_call_id: str, event: bytes) -> None:
        """Take a progress event; it replaces an earlier one of the same tool that still waits."""
        arguments = (_KIND_PROGRESS, "", "", "", event, "")
        last = self._pending[-1] if self._pending else None
        if isinstance(last, _Item) and last.progress_of == tool_call_id:
            self._pending.pop()
            self.size_bytes -= last.size_bytes
        self._pending.append(_Item(arguments, len(event), tool_call_id))
        self.size_bytes += len(event)
        self._open_text = None
        self._has_urgent = True

    def add_text(self, text: str, now_ms: int) -> None:
        """Take a piece of text; pieces of one message that wait together become one delta.

        Raises:
            UnicodeEncodeError: It has no UTF-8 form; nothing was taken.
        """
        if self.extend_text(text):
            return
        size = len(text) if text.isascii() else len(text.encode())
        if len(text) > TEXT_CHARS:
            for start in range(0, len(text), TEXT_CHARS):
                self.add_text(text[start : start + TEXT_CHARS], now_ms)
            return
        if not self._is_in_message:
            self._message_number += 1
            self._is_in_message = True
            self._position = self._bytes_before = 0
        name = f"m{self._message_number}"
        last = _Text(name, self._position, self._bytes_before, [text], size, now_ms)
        self._open_text = last
        self._pending.append(last)
        self._position += len(text)
        self._bytes_before += size
        self.size_bytes += size

    def extend_text(self, text: str) -> bool:
        """Take a piece of text where an earlier one still waits that it can be joined to.

        Returns:
            Whether it was taken.

        Raises:
            UnicodeEncodeError: It has no UTF-8 form; nothing was taken.
        """
        last = self._open_text
        if last is None:
            return False
        chars = len(text)
        size = chars if text.isascii() else len(text.encode())
        if chars > TEXT_CHARS or last.size_bytes + size > BATCH_BYTES:
            return False
        last.pieces.append(text)
        last.size_bytes += size
        self._position += chars
        self._bytes_before += size
        self.size_bytes += size
        return True

    def release_text(self) -> None:
        """Let the text that waits for more wait no longer."""
        self._has_urgent = bool(self._pending)

    def next_batch(self) -> tuple[Batch, Arguments]:
        """Give the batch to send now and the arguments of its script call.

        The same one is given until it is acknowledged.
        """
        if not self._sending:
            self._sending.append(self._freeze())
        batch = self._sending[0]
        force = "force" if self._is_forced else ""
        head = (self._envelope.run_id, self._fence, batch.number, self._epoch, force)
        return batch, head + batch.arguments

    def _freeze(self) -> Batch:
        arguments: list[int | str | bytes] = []
        bodies: list[tuple[int, bytes]] = []
        size = kept = count = 0
        pending = self._pending
        while pending and (size == 0 or size + pending[0].size_bytes <= BATCH_BYTES):
            item = pending.popleft()
            size += item.size_bytes
            if isinstance(item, _Text):
                text, event = self._encode_text(item)
                arguments += (_KIND_TEXT, "", item.message_id, text, event, item.bytes_before)
                kept += len(event)
            else:
                arguments += item.arguments
                if item.body is not None:
                    bodies.append((count, item.body))
            count += 1
        if not pending:
            self._open_text = None
        self._has_urgent = bool(pending)
        kept += size + count * ITEM_OVERHEAD_BYTES
        batch = Batch(self._next_number, tuple(arguments), size, kept, tuple(bodies))
        self._next_number += 1
        return batch

    def _encode_text(self, item: _Text) -> tuple[str, bytes]:
        text = "".join(item.pieces)
        return text, self.encoder.encode_text(
            item.timestamp_ms, item.message_id, item.position, text
        )

    def receive_answer(self, batch: Batch, answer: Sequence[Any]) -> Acknowledged | None:
        """Take the script's answer to a batch.

        Returns:
            What was acknowledged; None if batches have to be sent again first.

        Raises:
            StaleFence: Another attempt owns the run.
            RunEnded: The run has its terminal event.
            PublishRefused: Redis does not know the run, or batches are missing.
        """
        kind: bytes = answer[0]
        if kind == b"ok":
            _, epoch, _, _, _, cancel, next_run, next_agent = answer
            self._epoch = epoch.decode()
            self._is_forced = False
            self._sending.popleft()
            self.size_bytes -= batch.size_bytes
            self._remember(batch)
            if not cancel and not next_run:
                return NOTHING_NEW
            following = (next_run.decode(), next_agent.decode()) if next_run else None
            return Acknowledged(cancel or None, following)
        if kind == b"expected":
            self._send_again_from(int(answer[1]))
            return None
        if kind == b"staging":
            batch.is_staged = False
            return None
        run_id = self._envelope.run_id
        if kind == b"stale":
            raise StaleFence(f"attempt {self._envelope.attempt} of {run_id} has been superseded")
        if kind == b"ended":
            raise RunEnded(run_id, answer[1].decode())
        raise PublishRefused(
            f"run {run_id}: Redis answered {kind.decode()} to batch {batch.number}"
        )

    def _remember(self, batch: Batch) -> None:
        self._acknowledged.append(batch)
        self._acknowledged_bytes += batch.kept_bytes
        while self._acknowledged_bytes > REPLAY_BYTES and len(self._acknowledged) > 1:
            self._acknowledged_bytes -= self._acknowledged.popleft().kept_bytes

    def _send_again_from(self, number: int) -> None:
        """History was rewound: put what Redis has lost before what it has not yet seen."""
        again = [batch for batch in self._acknowledged if batch.number >= number]
        if not again or again[0].number > number:
            # The buffer does not reach back that far. Clients get a reset for the lost part.
            self._is_forced = True
        for batch in reversed(again):
            self._acknowledged.pop()
            self._acknowledged_bytes -= batch.kept_bytes
            self._sending.appendleft(batch)
            self.size_bytes += batch.size_bytes
