"""This gateway's place in the cluster: its id, its sign of life, its signals."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import orjson
import structlog

from relay.errors import RelayError
from relay.keys import NODE_TTL_MS, Keys
from relay.scripts import RedisLink, mapped_errors

RENEW_INTERVAL_S = 1.0

log = structlog.stdlib.get_logger(__name__)


class Node:
    """One gateway process among others.

    Args:
        link: Which Redis.
        keys: Names of the nodes' keys.
        on_disconnect_user: Called with a user id when an operator asked for it on any node.
        on_replaced: Called with connection id and user id when another node took over its place.
        on_presumed_dead: Called when the sign of life had expired: others may have acted on it.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        *,
        on_disconnect_user: Callable[[str], None],
        on_replaced: Callable[[str, str], None],
        on_presumed_dead: Callable[[], None],
    ) -> None:
        # Random, not the host's name: a restarted process is another node.
        self.node_id = "gw-" + secrets.token_hex(5)
        self.channel = keys.node(self.node_id)
        self._link = link
        self._keys = keys
        self._on_disconnect_user = on_disconnect_user
        self._on_replaced = on_replaced
        self._on_presumed_dead = on_presumed_dead

    async def run(self) -> None:
        """Renew the sign of life until cancelled; others may then take it that we are gone."""
        was_renewed = True
        while True:
            try:
                await self.renew()
            except RelayError as error:
                # Whatever Redis or a proxy before it answers, it may be another answer next time.
                if was_renewed:
                    log.warning("sign of life not renewed", error=str(error))
                was_renewed = False
            else:
                was_renewed = True
            await asyncio.sleep(RENEW_INTERVAL_S)

    async def renew(self) -> None:
        """Say that this node lives.

        Raises:
            RedisUnavailable, RedisMisconfigured, ScriptFailed: Redis did not take it.
        """
        with mapped_errors(self._link.url):
            before = await self._link.client.set(self.channel, b"gateway", px=NODE_TTL_MS, get=True)
        if before is None:
            self._on_presumed_dead()

    async def leave(self) -> None:
        """Say that this node is gone, as far as Redis can be reached."""
        try:
            with mapped_errors(self._link.url):
                await self._link.client.delete(self.channel)
        except RelayError as error:
            # Whatever Redis says: it must not hide why a gateway could not start.
            log.debug("sign of life left to expire", error=str(error))

    def receive(self, payload: bytes) -> None:
        """Take a signal of this node's channel."""
        try:
            signal = orjson.loads(payload)
            kind, user_id = signal["kind"], signal["user_id"]
        except (ValueError, TypeError, KeyError):
            log.warning("signal not understood", size_bytes=len(payload))
            return
        connection_id = signal.get("connection_id")
        if kind == "disconnect" and isinstance(user_id, str):
            self._on_disconnect_user(user_id)
        elif kind == "replaced" and isinstance(user_id, str) and isinstance(connection_id, str):
            self._on_replaced(connection_id, user_id)
        else:
            log.warning("signal not known", kind=str(kind)[:64])

    async def tell_replaced(self, node_id: str, user_id: str, connection_id: str) -> None:
        """Tell another node that a newer connection of the same client took over a place.

        Raises:
            RedisUnavailable: It may not have been told.
        """
        signal = {"kind": "replaced", "user_id": user_id, "connection_id": connection_id}
        with mapped_errors(self._link.url):
            await self._link.client.publish(self._keys.node(node_id), orjson.dumps(signal))

    async def disconnect_everywhere(self, user_id: str) -> int:
        """Close a user's connections on every node.

        Returns:
            How many nodes were told.

        Raises:
            RedisUnavailable: Some nodes may not have been told.
        """
        signal = orjson.dumps({"kind": "disconnect", "user_id": user_id})
        with mapped_errors(self._link.url):
            # A node that can be told anything is subscribed to its own channel.
            channels = await self._link.client.pubsub_channels(self._keys.node("*"))
            for channel in channels:
                await self._link.client.publish(channel, signal)
        return len(channels)
