"""A worker process whose runs end with a result of ten megabytes, one for each line on stdin.

    python -m benchmarks.large_results REDIS_URL USER

It prints one JSON line when it is ready, and one when Redis has taken a result. Each result ends
with the load generator's mark.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop

from benchmarks.load import user_name
from relay.events import EventType
from relay.keys import Keys
from relay.publisher import Publisher
from relay.run_model import AgentInfo, Claim, SubmitRequest
from relay.runs import RunRegistry
from relay.scripts import RedisLink

RESULT_BYTES = 10 * 1_048_576
AGENT = "large"
_BLOCK = 'abc "\\\n€äß😀\t, and then some words of the usual kind. '
"""Characters of one to four bytes, and those that JSON escapes."""


def _text() -> str:
    size = len(_BLOCK.encode())
    return _BLOCK * (RESULT_BYTES // size)


async def _main(url: str, user: int) -> None:
    link, keys = RedisLink(url), Keys()
    registry = RunRegistry(link, keys)
    text = _text()
    async with Publisher(link, keys) as publisher:
        await registry.register_agents([AgentInfo(AGENT)])
        print(json.dumps({"ready": 1}), flush=True)
        number = 0
        while await asyncio.to_thread(sys.stdin.readline):
            request = SubmitRequest(user_name(user), "t", AGENT, "go", f"m{number}")
            submitted = await registry.submit(request)
            claim = await registry.claim(user_name(user), submitted.run_id, "bench", 600_000)
            if not isinstance(claim, Claim):
                raise SystemExit(f"run not claimed: {claim.reason}")
            stream = publisher.open(claim)
            await stream.publish(EventType.AGENT_STARTED, {})
            mark = f"bench:{user}:{number}:{time.monotonic_ns()};"
            result = {"result": text + mark, "duration_ms": 1}
            await stream.finish(EventType.AGENT_COMPLETED, result)
            stream.close()
            number += 1
            print(json.dumps({"published": number}), flush=True)
    await link.aclose()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], int(sys.argv[2])))
