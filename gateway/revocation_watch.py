"""A gateway's knowledge of revoked tokens: complete before it serves, and never old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from relay.errors import RedisMisconfigured, RedisUnavailable
from relay.revocations import CLOCK_MARGIN_MS, Revocation, RevocationLog, RevokedTokens
from relay.scripts import ScriptFailed
from relay.tokens import Identity

LOOK_EVERY_S = 0.5
"""Pub/sub may lose the message that says there is something new."""

FULL_READ_EVERY_S = 600.0

log = structlog.stdlib.get_logger(__name__)


class RevocationWatch:
    """Holds all revocations in memory and acts on each new one.

    Redis may lose entries: a failover to a replica that lags, a restart, a key deleted by hand. The
    set only grows until its members expire, so whoever finds an entry missing puts it back.

    Args:
        log: Where they are kept.
        on_revoked: Called when there is something new; closes what is open.
        now_ms: The wall clock.
    """

    def __init__(
        self, log: RevocationLog, on_revoked: Callable[[], None], now_ms: Callable[[], int]
    ) -> None:
        self.channel = log.channel
        self._log = log
        self._on_revoked = on_revoked
        self._now_ms = now_ms
        self._entries: dict[str, Revocation | None] = {}
        self._revoked = RevokedTokens()
        self._wake = asyncio.Event()
        self._read_s: float | None = None
        self._full_read_s = float("-inf")

    def __len__(self) -> int:
        return len(self._revoked)

    @property
    def age_s(self) -> float:
        """Time since Redis was last asked with success; infinite before the first time."""
        return float("inf") if self._read_s is None else time.monotonic() - self._read_s

    def is_revoked(self, identity: Identity) -> bool:
        """Tell whether the token behind an identity was revoked; no trip to Redis."""
        return self._revoked.includes(identity)

    def receive(self, _: bytes) -> None:
        """Take a message of the channel: there is something new."""
        self._wake.set()

    async def run(self) -> None:
        """Keep up until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # Time to look by ourselves.
            self._wake.clear()
            try:
                await self.look()
            except (RedisUnavailable, RedisMisconfigured, ScriptFailed) as error:
                # What is known stays in force; how old it is makes readiness red.
                log.debug("revocations not read", error=str(error))
                # The server behind the address may be another one next time.
                self._full_read_s = float("-inf")

    async def look(self) -> None:
        """Read what is new; everything where anything seems to be missing.

        Raises:
            RedisUnavailable, RedisMisconfigured: Nothing is known about what is new.
        """
        asked_s = time.monotonic()
        is_full = asked_s - self._full_read_s > FULL_READ_EVERY_S
        if not is_full:
            entries, length = await self._log.read(next(reversed(self._entries), "-"))
            self._entries |= entries
            self._take(entries.values())
            is_full = length != len(self._entries)
        if is_full:
            await self._read_all()
            self._full_read_s = asked_s
        self._read_s = asked_s

    async def _read_all(self) -> None:
        before = self._revoked
        self._entries, _ = await self._log.read("-")
        found = RevokedTokens(entry for entry in self._entries.values() if entry is not None)
        self._take(self._entries.values())
        now_ms = self._now_ms()
        lost = [
            held
            for held in before
            if held.until_ms > now_ms + CLOCK_MARGIN_MS
            and not ((kept := found.get(held)) and kept.covers(held))
        ]
        for held in lost:
            found.add(held)
        if lost:
            log.warning("revocations were missing in Redis; put back", count=len(lost))
            await self._log.add(*lost)
        self._revoked = found
        await self._prune(now_ms)

    async def _prune(self, now_ms: int) -> None:
        """Remove what has expired, and what another entry covers."""
        newest: dict[tuple[str, str], Revocation] = {}
        superfluous = []
        for entry_id, entry in reversed(self._entries.items()):
            if entry is None:
                continue
            other = newest.setdefault((entry.kind, entry.subject), entry)
            has_expired = entry.until_ms < now_ms - CLOCK_MARGIN_MS
            if has_expired or (other is not entry and other.covers(entry)):
                superfluous.append(entry_id)
        if superfluous:
            await self._log.remove(superfluous)
            for entry_id in superfluous:
                del self._entries[entry_id]
            self._revoked = RevokedTokens(
                entry for entry in self._entries.values() if entry is not None
            )

    def _take(self, entries: Iterable[Revocation | None]) -> None:
        fresh = [
            entry
            for entry in entries
            if entry is not None
            and not ((known := self._revoked.get(entry)) and known.covers(entry))
        ]
        for entry in fresh:
            self._revoked.add(entry)
            if self._read_s is not None:
                # Whoever revoked it, and however; what it finds at its start is no news.
                log.info("revocation in force", kind=entry.kind, subject=entry.subject)
        if fresh:
            self._on_revoked()
