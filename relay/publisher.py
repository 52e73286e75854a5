"""Publishing: from an agent's calls to acknowledged events, in order, once.

Each run has one batch in flight. What is due when the event loop comes round leaves in one write
on one connection, whatever the number of runs; no task wakes up for it. While Redis is away
everything waits in bounded buffers, and then the agents wait: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from relay.batch_sender import BatchSender
from relay.batches import Acknowledged
from relay.cancellation import end_tasks
from relay.codec import Task
from relay.encoding import SECRET_NAMES
from relay.errors import PublishRefused, RedisMisconfigured, RedisUnavailable
from relay.keys import Keys
from relay.publish_lane import PublishLane
from relay.run_model import Claim
from relay.run_stream import RunStream
from relay.scripts import RedisLink, ScriptFailed
from relay.tasks import dispatch

LAST_DISPATCHES_S = 1.0
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 1.0


class Publisher:
    """Sends the batches of all runs of one process.

    Args:
        link: Where to.
        keys: Key names.
        merge_ms: How long a piece of text may wait for the next one.
        secret_names: Lower-case key names whose values are redacted, by exact match.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        *,
        merge_ms: int = 20,
        secret_names: frozenset[str] = SECRET_NAMES,
    ) -> None:
        self.secret_names = secret_names
        self._link = link
        self._keys = keys
        self._merge_s = merge_ms / 1000
        self._lanes: dict[RunStream, PublishLane] = {}
        self._merging: list[RunStream] = []
        self._merge_timer: asyncio.Handle | None = None
        self._dispatches: deque[Task] = deque()
        self._dispatching: asyncio.Task[None] | None = None
        self._dispatch_error: str | None = None
        self._is_closed = False
        self._sender = BatchSender(
            link, on_acknowledged=self._acknowledged, on_refused=self._refused
        )

    @property
    def is_available(self) -> bool:
        """Whether Redis answered last."""
        return self._sender.is_available

    @property
    def last_error(self) -> str | None:
        """What went wrong last; None if nothing has."""
        return self._sender.last_error or self._dispatch_error

    @property
    def lag_s(self) -> float:
        """How long the run that waits longest has waited for an acknowledgement."""
        return max((stream.waiting_s for stream in self._lanes), default=0.0)

    @property
    def buffered_bytes(self) -> int:
        """What Redis has not acknowledged yet, over all runs."""
        return sum(stream.batches.size_bytes for stream in self._lanes)

    async def __aenter__(self) -> Publisher:
        self._loop = asyncio.get_running_loop()
        self._sender.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        if self._merge_timer is not None:
            self._merge_timer.cancel()
        # First: each acknowledgement may make another run due.
        await self._sender.aclose()
        if self._dispatching is not None:
            # The next runs of threads whose last run has just ended must not wait for the reaper.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_DISPATCHES_S):
                    await asyncio.wait([self._dispatching])
            await end_tasks([self._dispatching])
        for stream in list(self._lanes):
            stream.close()

    def open(
        self, claim: Claim, *, on_refused: Callable[[PublishRefused], None] | None = None
    ) -> RunStream:
        """Begin to publish an attempt.

        Args:
            claim: The right to it.
            on_refused: Called once when Redis takes no more events of this attempt.
        """
        stream = RunStream(self, claim, on_refused)
        user = self._keys.user(claim.envelope.user_id)
        self._lanes[stream] = PublishLane(stream, user, self._link)
        return stream

    def forget(self, stream: RunStream) -> None:
        """Stop sending this stream's events."""
        lane = self._lanes.pop(stream, None)
        if lane is not None:
            lane.is_open = False
            if lane.staging is not None:
                lane.staging.cancel()

    def create_future(self) -> asyncio.Future[None]:
        """Give a future of the loop that the publisher runs on."""
        return self._loop.create_future()

    def send_soon(self, stream: RunStream) -> None:
        """Send what the stream holds when the event loop comes round."""
        lane = self._lanes.get(stream)
        if lane is not None:
            self._sender.send_soon(lane)

    def merge(self, stream: RunStream) -> None:
        """Send the stream's text when it has waited for more; one timer serves all runs."""
        stream.text_waits = True
        self._merging.append(stream)
        if self._merge_timer is None and not self._is_closed:
            if self._merge_s:
                self._merge_timer = self._loop.call_later(self._merge_s, self._merged)
            else:
                self._merge_timer = self._loop.call_soon(self._merged)

    def _merged(self) -> None:
        self._merge_timer = None
        merged, self._merging = self._merging, []
        for stream in merged:
            stream.text_waits = False
            stream.batches.release_text()
            self.send_soon(stream)

    def _acknowledged(self, lane: PublishLane, outcome: Acknowledged) -> None:
        if outcome.cancel:
            lane.stream.cancel_requested = outcome.cancel
        if outcome.next_run is not None:
            run_id, agent = outcome.next_run
            self._dispatches.append(Task(lane.stream.claim.envelope.user_id, run_id, agent))
            if self._dispatching is None or self._dispatching.done():
                self._dispatching = asyncio.create_task(self._dispatch(), name="next-runs")

    def _refused(self, lane: PublishLane, refusal: PublishRefused) -> None:
        self.forget(lane.stream)
        lane.stream.refuse(refusal)

    async def _dispatch(self) -> None:
        """Tell the workers of runs whose turn has come."""
        delay_s = _RETRY_FIRST_S
        while self._dispatches:
            try:
                await dispatch(self._link, self._keys, self._dispatches[0])
                self._dispatches.popleft()
            except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
                self._dispatch_error = str(error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _RETRY_MOST_S)
