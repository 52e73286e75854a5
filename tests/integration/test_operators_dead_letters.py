"""Dead letters on a real Redis: found, shown, carried out after all, or dropped."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from agent_worker import Run, Worker
from relay.cli import operators
from relay.codec import Task, encode_task
from relay.config import Settings
from relay.dead_letters import DeadLetter, DeadLetters
from relay.errors import RequestRefused
from relay.keys import Keys
from relay.reaper import Reaper
from relay.run_model import AgentInfo, Claim, RunLimits
from relay.runs import RunRegistry
from relay.scripts import RedisLink
from relay.tasks import TASK_FIELD, bury
from tests.integration.worker_support import Client, eventually, worker_settings

NONSENSE = b"\x93not a task"


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix, lease_ms=500)


@pytest_asyncio.fixture
async def link(redis_url: str) -> AsyncIterator[RedisLink]:
    opened = RedisLink(redis_url)
    yield opened
    await opened.aclose()


@pytest.fixture
def keys(key_prefix: str) -> Keys:
    return Keys(key_prefix)


@pytest_asyncio.fixture
async def letters(link: RedisLink, keys: Keys) -> DeadLetters:
    registry = RunRegistry(link, keys)
    await registry.register_agents([AgentInfo("echo"), AgentInfo("other")])
    return DeadLetters(link, keys, registry)


def echo_worker() -> Worker:
    worker = Worker("echoing")

    @worker.agent("echo")
    async def echo(run: Run) -> str:
        return f"{run.request.content} {run.request.metadata}"

    return worker


async def lose_a_run(client: Client, link: RedisLink, settings: Settings, **asked: Any) -> str:
    """Let a run's only worker vanish, and a reaper notice it."""
    run_id = await client.submit("echo", **asked)
    claim = await client.registry.claim(client.user_id, run_id, "vanished", 1)
    assert isinstance(claim, Claim)
    async with Reaper(link, client.keys, lease_ms=settings.lease_ms, cancel_grace_ms=300):
        await client.ended(run_id)

        async def is_buried() -> int:
            return await link.client.xlen(client.keys.dead_letters)

        await eventually(is_buried)
    return run_id


async def test_operators_keep_as_much_history_as_gateways(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_LOG_MAX_EVENTS", "5000")
    monkeypatch.setenv("RELAY_LOG_MAX_AGE_S", "604800")
    async with operators._operating(redis_url) as operator:
        limits = operator.link.limits
    assert (limits.max_events, limits.max_age_ms) == (5_000, 604_800_000)


async def only(letters: DeadLetters) -> DeadLetter:
    [letter] = (await letters.page()).letters
    return letter


async def test_lost_run_is_requeued_as_one_new_run_however_often(
    settings: Settings, link: RedisLink, letters: DeadLetters
) -> None:
    async with Client(settings) as client:
        lost = await lose_a_run(
            client, link, settings, content="hello", metadata={"a": 1}, thread_id="t"
        )
        letter = await only(letters)
        assert "vanished" in letter.reason
        assert (letter.agent, letter.task) == ("echo", Task("alice", lost, "echo"))
        shown = letter.as_json()
        assert (shown["run_id"], shown["user_id"]) == (lost, "alice")
        assert shown["payload"] is None

        first, second = await asyncio.gather(
            letters.requeue(letter.letter_id), letters.requeue(letter.letter_id)
        )
        assert first.how == second.how == "run"
        assert first.run_id == second.run_id != lost
        assert sorted([first.duplicate, second.duplicate]) == [False, True]
        assert await letters.count() == 0

        async with echo_worker().running(settings):
            detail = await client.ended(str(first.run_id))
        assert detail.as_json()["result"] == "hello {'a': 1}"
        assert detail.summary.thread_id == "t"
        # The first one keeps its end.
        assert await client.status(lost) == "error"


async def test_task_that_nobody_understands_goes_back_as_it_is(
    settings: Settings, link: RedisLink, keys: Keys, letters: DeadLetters
) -> None:
    async with Client(settings), echo_worker().running(settings):
        await link.client.xadd(keys.tasks("echo"), {TASK_FIELD: NONSENSE})
        await eventually(letters.count)
    letter = await only(letters)
    assert letter.task is None
    assert letter.agent == "echo"
    assert letter.payload == NONSENSE
    assert letter.entry_id
    requeued = await letters.requeue(letter.letter_id)
    assert requeued.as_json() == {
        "how": "task",
        "agent": "echo",
        "run_id": None,
        "duplicate": False,
    }
    assert await letters.count() == 0
    [(_, fields)] = await link.client.xrange(keys.tasks("echo"))
    assert fields == {TASK_FIELD.encode(): NONSENSE}
    # It is no better than before: it comes back, and nothing else suffers.
    async with Client(settings) as client, echo_worker().running(settings):
        await eventually(letters.count)
        await client.ended(await client.submit("echo"))


async def test_run_that_still_waits_gets_its_task_again(
    settings: Settings, link: RedisLink, keys: Keys, letters: DeadLetters
) -> None:
    async with Client(settings) as client:
        run_id = await client.submit("echo", "later")
        await link.client.delete(keys.tasks("echo"))
        # Whoever gave it up did not know its agent.
        await bury(link, keys, "unknown", encode_task(Task("alice", run_id, "unknown")), "odd")
        requeued = await letters.requeue((await only(letters)).letter_id)
        assert (requeued.how, requeued.agent, requeued.run_id) == ("task", "echo", run_id)
        async with echo_worker().running(settings):
            assert (await client.ended(run_id)).summary.status == "completed"


@pytest.mark.parametrize(
    ("agent", "payload", "code"),
    [
        ("echo", encode_task(Task("alice", "run_gone", "echo")), "unknown_run"),
        ("nobody", NONSENSE, "unknown_agent"),
        ("", b"", "unknown_agent"),
    ],
)
async def test_letter_that_cannot_be_requeued_stays(
    link: RedisLink, keys: Keys, letters: DeadLetters, agent: str, payload: bytes, code: str
) -> None:
    await bury(link, keys, agent, payload, "broken")
    letter = await only(letters)
    with pytest.raises(RequestRefused) as refused:
        await letters.requeue(letter.letter_id)
    assert refused.value.code == code
    assert await letters.count() == 1


@pytest.mark.parametrize(
    "fields", [{"request": "{"}, {"request": '{"content": 1}'}, {"thread": b"\xff"}]
)
async def test_run_whose_request_cannot_be_read_is_not_repeated(
    settings: Settings,
    link: RedisLink,
    keys: Keys,
    letters: DeadLetters,
    fields: dict[str, Any],
) -> None:
    async with Client(settings) as client:
        lost = await lose_a_run(client, link, settings)
        await link.client.hset(keys.user("alice").run(lost), mapping=fields)
        with pytest.raises(RequestRefused, match="cannot be repeated"):
            await letters.requeue((await only(letters)).letter_id)


async def test_run_key_of_another_type_is_not_repeated(
    link: RedisLink, keys: Keys, letters: DeadLetters
) -> None:
    await link.client.set(keys.user("alice").run("run_x"), "a string")
    await bury(link, keys, "echo", encode_task(Task("alice", "run_x", "echo")), "odd")
    with pytest.raises(RequestRefused, match="cannot be used"):
        await letters.requeue((await only(letters)).letter_id)


async def test_refused_request_leaves_the_letter_for_later(
    settings: Settings, link: RedisLink, keys: Keys, letters: DeadLetters
) -> None:
    async with Client(settings) as client:
        await lose_a_run(client, link, settings)
        letter = await only(letters)
        strict = DeadLetters(
            link, keys, RunRegistry(link, keys, RunLimits(max_active=0, max_queued=0))
        )
        with pytest.raises(RequestRefused, match="rate_limited"):
            await strict.requeue(letter.letter_id)
        assert (await letters.requeue(letter.letter_id)).how == "run"


async def test_pages_are_whole_and_the_newest_comes_first(
    link: RedisLink, keys: Keys, letters: DeadLetters
) -> None:
    for number in range(7):
        await bury(link, keys, "echo", NONSENSE, f"reason {number}")
    seen: list[str] = []
    before, sizes = None, []
    while True:
        page = await letters.page(before=before, limit=3)
        seen += [letter.reason for letter in page.letters]
        sizes.append(len(page.letters))
        before = page.before
        if before is None:
            break
    assert sizes == [3, 3, 1]
    assert seen == [f"reason {number}" for number in reversed(range(7))]
    exact = await letters.page(limit=7)
    assert (len(exact.letters), exact.before) == (7, None)


async def test_dropping_one_and_all(link: RedisLink, keys: Keys, letters: DeadLetters) -> None:
    assert await letters.drop_all() == 0
    for number in range(5):
        await bury(link, keys, "echo", NONSENSE, f"reason {number}")
    letter = (await letters.page(limit=1)).letters[0]
    await letters.drop(letter.letter_id)
    with pytest.raises(RequestRefused, match="not_found"):
        await letters.drop(letter.letter_id)
    with pytest.raises(RequestRefused, match="not_found"):
        await letters.requeue(letter.letter_id)
    assert await letters.count() == 4
    assert await letters.drop_all() == 4
    assert await letters.count() == 0


@pytest.mark.parametrize("odd", ["", "1", "-", "+", "1-", "x-1", "1-1-1", f"{2**64}-0", "\n1-1"])
async def test_odd_ids_are_refused(letters: DeadLetters, odd: str) -> None:
    for call in (letters.get, letters.requeue, letters.drop):
        with pytest.raises(RequestRefused, match="invalid_frame"):
            await call(odd)
    with pytest.raises(RequestRefused, match="invalid_frame"):
        await letters.page(before=odd)


async def test_letters_of_others_are_shown_as_far_as_they_go(
    link: RedisLink, keys: Keys, letters: DeadLetters
) -> None:
    await link.client.xadd(keys.dead_letters, {"something": uuid.uuid4().hex})
    await link.client.xadd(keys.dead_letters, {"reason": b"\xff", "at_ms": "soon"})
    for letter in (await letters.page()).letters:
        assert letter.task is None
        assert letter.as_json()["at"].startswith("20")
