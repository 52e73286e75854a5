"""Notices: events of a user that belong to no run."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

from relay.codec import Position, encode_fields
from relay.errors import AgentError
from relay.events import EventType, format_timestamp, validate_data
from relay.keys import Keys
from relay.scripts import RedisLink, ScriptCall

MAX_NOTICE_BYTES = 1024 * 1024


class Notice:
    """A notice, ready to be sent as often as it takes: it appears once.

    Args:
        user_id: Whose it is.
        data: severity, title, body, and any payload.

    Raises:
        InvalidEvent, EncodingFailed: The data do not fit.
        AgentError: ``payload_too_large``: larger than 1 MiB.
        ValueError: The user id is empty or too long.
    """

    def __init__(self, keys: Keys, user_id: str, data: Mapping[str, Any]) -> None:
        self._user = keys.user(user_id)
        _ = self._user.base
        fields = {
            "type": EventType.NOTICE.value,
            "user_id": user_id,
            "timestamp": format_timestamp(time.time_ns() // 1_000_000),
        }
        self._event = encode_fields(fields, validate_data(EventType.NOTICE, dict(data)))
        if len(self._event) > MAX_NOTICE_BYTES:
            raise AgentError("payload_too_large")
        self._id = secrets.token_hex(8)

    async def send(self, link: RedisLink) -> Position:
        """Append it to the user's channel, once however often it is sent.

        Raises:
            RedisUnavailable: Whether it was appended is unknown; send it again.
        """
        digest = hashlib.sha256(self._event).hexdigest()
        call: ScriptCall = link.call("notice", self._user, None, self._id, self._event, digest)
        [reply] = await link.run([call])
        return Position(reply[0].decode(), int(reply[1]))
