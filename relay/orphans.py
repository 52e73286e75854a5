"""Tasks that dead workers had taken: give them back, and forget the dead."""

from __future__ import annotations

import secrets
from typing import Any

import structlog

from relay.codec import decode_task, text_of
from relay.errors import DecodingFailed, NewerVersion
from relay.keys import Keys
from relay.scripts import RedisLink, ScriptFailed, mapped_errors
from relay.tasks import GROUP, TASK_FIELD, bury, dispatch, pass_on

SWEEP_COUNT = 100

log = structlog.stdlib.get_logger(__name__)


async def sweep_orphans(link: RedisLink, keys: Keys, lease_ms: int) -> None:
    """Give back the tasks of consumers whose worker is gone.

    One process of the cluster does it at a time. Giving a task back twice is harmless: its run
    is claimed by compare-and-set.

    Raises:
        RedisUnavailable: The rest is done in the next sweep.
    """
    with mapped_errors(link.url):
        is_ours = await link.client.set(
            keys.sweep, secrets.token_hex(4), nx=True, px=max(1_000, lease_ms // 2)
        )
        if not is_ours:
            return
        agents = await link.client.hkeys(keys.agents)
    for agent in agents:
        try:
            await _sweep_agent(link, keys, text_of(agent), lease_ms)
        except (ScriptFailed, DecodingFailed) as error:
            # What one agent's keys hold must not keep the others from being looked at.
            log.error("agent not swept", agent=repr(agent)[:200], error=str(error))


async def _sweep_agent(link: RedisLink, keys: Keys, agent: str, lease_ms: int) -> None:
    stream = keys.tasks(agent)
    try:
        with mapped_errors(link.url):
            consumers: list[dict[str, Any]] = await link.client.xinfo_consumers(stream, GROUP)
    except ScriptFailed as error:
        if "no such key" in str(error) or str(error).startswith("NOGROUP"):
            return
        raise
    for consumer in consumers:
        name = text_of(consumer["name"])
        if consumer["idle"] < lease_ms:
            continue
        with mapped_errors(link.url):
            is_alive = await link.client.exists(keys.worker(name))
        if not is_alive:
            await _give_back(link, keys, agent, name)


async def _give_back(link: RedisLink, keys: Keys, agent: str, consumer: str) -> None:
    stream = keys.tasks(agent)
    with mapped_errors(link.url):
        pending = await link.client.xpending_range(
            stream, GROUP, min="-", max="+", count=SWEEP_COUNT, consumername=consumer
        )
    for item in pending:
        entry_id: Any = item["message_id"]
        with mapped_errors(link.url):
            entries: Any = await link.client.xrange(stream, min=entry_id, max=entry_id)
        if entries:
            payload = entries[0][1].get(TASK_FIELD.encode(), b"")
            try:
                await dispatch(link, keys, decode_task(payload))
            except NewerVersion:
                await pass_on(link, keys, agent, entry_id, entries[0][1])
            except DecodingFailed as error:
                await bury(link, keys, agent, payload, str(error))
        with mapped_errors(link.url):
            await link.client.xack(stream, GROUP, entry_id)
            await link.client.xdel(stream, entry_id)
    if len(pending) < SWEEP_COUNT:
        with mapped_errors(link.url):
            await link.client.xgroup_delconsumer(stream, GROUP, consumer)
        log.info("dead worker forgotten", worker_id=consumer, agent=agent, tasks=len(pending))
