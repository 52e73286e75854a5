"""One attempt's way through the publisher: its command, packed from parts that stay the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from relay.batches import Arguments, Batch
from relay.keys import UserKeys
from relay.resp import pack
from relay.scripts import RedisLink

if TYPE_CHECKING:
    from relay.run_stream import RunStream


class PublishLane:
    """What the publisher knows of a stream.

    Attributes:
        is_open: Whether its events are still to be sent.
        is_busy: Whether a batch of it is in flight, or is being staged.
        is_queued: Whether it stands in the row of those that are due.
        failures: How often in a row its script has failed.
        staging: Writes its large events at the moment; None if there are none.
    """

    def __init__(self, stream: RunStream, user: UserKeys, link: RedisLink) -> None:
        self.stream = stream
        self.user = user
        self.is_open = True
        self.is_busy = False
        self.is_queued = False
        self.failures = 0
        self.staging: asyncio.Task[None] | None = None
        self._link = link
        self._epoch = ""
        self._instance = ""
        self._head = b""
        self._head_count = 0

    def pack(self, instance: str, arguments: Arguments) -> bytes:
        """Give the bytes of a call of ``publish.lua``.

        Args:
            instance: Identity of the server that the connection leads to.
            arguments: The script's own, run id and fence first.
        """
        if not self._epoch or instance != self._instance:
            self._instance = instance
            run_id, fence = arguments[:2]
            call = self._link.call("publish", self.user, self.stream.claim.run_id, run_id, fence)
            self._epoch = call.epoch
            words = self._link.command(call, instance)
            self._head, self._head_count = _pack_words(words), len(words)
        rest = arguments[2:]
        return b"*%d\r\n%s%s" % (self._head_count + len(rest), self._head, _pack_words(rest))

    def acknowledged(self, epoch: bytes) -> None:
        """Take note of a success, in this epoch of the channel."""
        self.failures = 0
        if epoch == self._epoch.encode():
            self.renew_epoch()

    def renew_epoch(self) -> None:
        """Offer another name for the next epoch: the last one is, or may be, in use."""
        self._epoch = ""

    def count_failure_of_staging(self, batch: Batch) -> None:
        """Take note that Redis did not have what had been staged, if that was the reason."""
        if batch.bodies and not batch.is_staged:
            self.failures += 1


def _pack_words(words: Arguments) -> bytes:
    """Pack words as a part of a command, without the count that stands before a whole one."""
    packed = pack(*words)
    return packed[packed.index(b"\n") + 1 :]
