"""Publishing how an attempt ends, whatever it ended with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from agent_worker import endings
from agent_worker.endings import Ending, Retry
from relay.amending import new_support_id
from relay.errors import AgentError, EncodingFailed, InvalidEvent

if TYPE_CHECKING:
    from relay.run_stream import RunStream


async def publish_ending(
    stream: RunStream, ending: Ending, log: structlog.typing.FilteringBoundLogger
) -> Ending:
    """Publish a terminal event; where it cannot be published, an error in its place.

    Returns:
        What was published.

    Raises:
        PublishRefused: The run was ended or taken over elsewhere.
    """
    try:
        await stream.finish(ending.event_type, ending.data)
    except (EncodingFailed, InvalidEvent, AgentError) as error:
        support_id = new_support_id()
        log.error("agent_result_not_publishable", support_id=support_id, reason=str(error))
        # An AgentError is the publisher's own: the result is too large.
        if isinstance(error, AgentError):
            ending = endings.failed(error, support_id)
        else:
            ending = endings.failed_unexpectedly(support_id)
        await stream.finish(ending.event_type, ending.data)
    return ending


async def publish_retry(stream: RunStream, retry: Retry) -> None:
    """Publish that another attempt follows.

    Raises:
        PublishRefused: The run was ended or taken over elsewhere.
    """
    await stream.retry(
        {
            "attempt": stream.claim.envelope.attempt + 1,
            "reason": retry.reason,
            "delay_ms": retry.delay_ms,
            "message": retry.message,
        }
    )
