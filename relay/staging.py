"""Large events on their way to Redis: written in pieces before the script that publishes them.

Redis does one thing at a time. A script that takes 10 MiB keeps it from everybody for tens of
milliseconds, and so does one string of that size, however it grows. Pieces let it serve others in
between, and the script only renames the key.
"""

from __future__ import annotations

from relay.batches import Batch
from relay.keys import BODY_PIECE_BYTES, UPLOAD_TTL_MS, UserKeys
from relay.scripts import RedisLink, mapped_errors

_PIECES_AT_ONCE = 8


def pieces_of(body: bytes) -> dict[str, bytes | memoryview]:
    """Give the fields of the hash that holds a large event."""
    view = memoryview(body)
    pieces: dict[str, bytes | memoryview] = {"size": b"%d" % len(body)}
    for number, start in enumerate(range(0, len(body), BODY_PIECE_BYTES)):
        pieces[str(number)] = view[start : start + BODY_PIECE_BYTES]
    return pieces


async def stage_bodies(link: RedisLink, user: UserKeys, fence: str, batch: Batch) -> None:
    """Write a batch's large events to keys of their own.

    Doing so again, also after half of it, leads to the same keys.

    Raises:
        RedisUnavailable: What is there by now is unknown; begin again.
        ScriptFailed: A key of another type is in the way.
    """
    for index, body in batch.bodies:
        key = user.upload(fence, batch.number, index)
        fields = list(pieces_of(body).items())
        for start in range(0, len(fields), _PIECES_AT_ONCE):
            with mapped_errors(link.url):
                async with link.client.pipeline(transaction=False) as pipeline:
                    # A command for each: between two commands Redis serves others.
                    for name, piece in fields[start : start + _PIECES_AT_ONCE]:
                        pipeline.hset(key, name, piece)
                    pipeline.pexpire(key, UPLOAD_TTL_MS)
                    await pipeline.execute()


async def read_large_event(link: RedisLink, key: str) -> bytes | None:
    """Read a whole large event, piece by piece; None where it is not there.

    Raises:
        RedisUnavailable: Redis did not answer.
    """
    with mapped_errors(link.url):
        size = int(await link.client.hget(key, "size") or 0)
        async with link.client.pipeline(transaction=False) as pipeline:
            for number in range(-(-size // BODY_PIECE_BYTES)):
                pipeline.hget(key, str(number))
            pieces = await pipeline.execute()
    body = b"".join(piece or b"" for piece in pieces)
    return body if body and len(body) == size else None
