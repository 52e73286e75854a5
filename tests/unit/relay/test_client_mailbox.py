"""The way from the socket to whoever iterates: nothing lost, nothing unbounded."""

from __future__ import annotations

import asyncio

import pytest

from relay.client.mailbox import MAX_WAITING_UPDATES, Mailbox
from relay.client.state import Degraded


def update(number: int) -> Degraded:
    return Degraded(str(number))


@pytest.mark.parametrize("steps", range(8))
async def test_taker_that_is_cancelled_loses_nothing(steps: int) -> None:
    mailbox = Mailbox()
    taker = asyncio.create_task(mailbox.take())
    putting = asyncio.create_task(mailbox.put(update(1)))
    for _ in range(steps):
        await asyncio.sleep(0)
    taken = [taker.result()] if taker.done() else []
    taker.cancel()
    await asyncio.wait({taker, putting})
    if not taken and not taker.cancelled():
        taken.append(taker.result())
    await mailbox.close(None)
    while (rest := await mailbox.take()) is not None:
        taken.append(rest)
    assert taken == [update(1)]


async def test_full_mailbox_makes_the_reader_of_the_socket_wait() -> None:
    mailbox = Mailbox()
    for number in range(MAX_WAITING_UPDATES):
        await mailbox.put(update(number))
    one_more = asyncio.create_task(mailbox.put(update(-1)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not one_more.done()
    assert await mailbox.take() == update(0)
    await one_more


async def test_what_waits_is_given_before_the_error() -> None:
    mailbox = Mailbox()
    await mailbox.put(update(1))
    await mailbox.close(OSError("gone"))
    assert await mailbox.take() == update(1)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            await mailbox.take()


async def test_end_without_error_is_none_for_all_takers() -> None:
    mailbox = Mailbox()
    takers = [asyncio.create_task(mailbox.take()) for _ in range(3)]
    await asyncio.sleep(0)
    await mailbox.close(None)
    assert await asyncio.gather(*takers) == [None, None, None]
