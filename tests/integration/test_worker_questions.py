"""Questions to the user on a real Redis: answers from elsewhere, races, expiry, lost signals."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any

import pytest

from agent_worker import InputDenied, InputExpired, Run, SyncRun, Worker
from relay.config import Settings
from relay.errors import RequestRefused
from relay.events import EventType
from relay.inputs import InputAnswer
from tests.integration.worker_processes import worker as process_worker
from tests.integration.worker_processes import worker_process
from tests.integration.worker_support import Client, eventually, worker_settings

LEASE_MS = 1_000


@pytest.fixture
def settings(redis_url: str, key_prefix: str) -> Settings:
    return worker_settings(redis_url, key_prefix, lease_ms=LEASE_MS)


def asking_worker() -> Worker:
    worker = Worker()

    @worker.agent("mailer")
    async def mailer(run: Run) -> str:
        if not await run.approve("Send the mail?", timeout_s=float(run.request.content)):
            return "Not sent."
        await run.thinking("Sending")
        return "Sent."

    @worker.agent("asker")
    async def asker(run: Run) -> Any:
        try:
            return await run.ask("How many?", schema={"type": "integer"}, timeout_s=30)
        except InputDenied:
            return "denied"
        except InputExpired:
            return "expired"

    @worker.agent("anything")
    async def anything(run: Run) -> None:
        with contextlib.suppress(InputDenied):
            await run.ask("What?", schema={}, timeout_s=30)
        await asyncio.Event().wait()

    @worker.agent("plain")
    def plain(run: SyncRun) -> Any:
        return run.ask("Which?", "choice", choices=["red", "blue"], timeout_s=30)

    return worker


async def open_request(client: Client, run_id: str, *, attempt: int = 1) -> str:
    async def look() -> str | None:
        detail = await client.registry.get(client.user_id, run_id)
        if detail is None or detail.summary.attempt != attempt:
            return None
        return next(iter(detail.summary.open_inputs), None)

    request_id: str = await eventually(look)
    return request_id


async def answer(client: Client, run_id: str, request_id: str, value: Any) -> None:
    await client.registry.answer_input(client.user_id, run_id, request_id, InputAnswer(value))


ANSWER_SCRIPT = """
import asyncio, sys
from relay.inputs import InputAnswer
from relay.keys import Keys
from relay.runs import RunRegistry
from relay.scripts import RedisLink

async def main():
    url, prefix, user, run, request = sys.argv[1:]
    link = RedisLink(url)
    await RunRegistry(link, Keys(prefix)).answer_input(user, run, request, InputAnswer(True))
    await link.aclose()

asyncio.run(main())
"""


async def test_approval_answered_by_another_process(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        run_id = await client.submit("mailer", "60")
        request_id = await open_request(client, run_id)
        assert await client.status(run_id) == "waiting"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            ANSWER_SCRIPT,
            settings.redis_url,
            settings.key_prefix,
            client.user_id,
            run_id,
            request_id,
        )
        assert (await client.ended(run_id)).as_json()["result"] == "Sent."
        assert await process.wait() == 0
        events = await client.checked_log(run_id)
        assert [event["type"] for event in events[2:]] == [
            "input_requested",
            "input_resolved",
            "agent_thinking",
            "agent_completed",
        ]


async def test_of_two_answers_at_the_same_instant_one_wins(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        for _ in range(20):
            run_id = await client.submit("asker")
            request_id = await open_request(client, run_id)
            async with Client(settings) as other_tab:
                outcomes = await asyncio.gather(
                    answer(client, run_id, request_id, 1),
                    answer(other_tab, run_id, request_id, 2),
                    return_exceptions=True,
                )
            [refused] = [outcome for outcome in outcomes if outcome is not None]
            assert isinstance(refused, RequestRefused)
            # The run may have ended already by the time the second answer is read.
            assert refused.code in ("unknown_request", "run_ended")
            winner = 1 if outcomes[0] is None else 2
            assert (await client.ended(run_id)).as_json()["result"] == winner
            events = await client.checked_log(run_id)
            resolved = [event for event in events if event["type"] == "input_resolved"]
            assert [event["data"]["value"] for event in resolved] == [winner]


async def test_question_without_an_answer_expires_and_is_not_a_denial(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        began_s = time.monotonic()
        run_id = await client.submit("mailer", "1.5")
        request_id = await open_request(client, run_id)
        assert (await client.ended(run_id)).as_json()["result"] == "Not sent."
        assert 1.4 < time.monotonic() - began_s < 4
        events = await client.checked_log(run_id)
        [resolved] = [event for event in events if event["type"] == "input_resolved"]
        assert (resolved["data"]["outcome"], resolved["data"]["by"]) == ("expired", "system")
        with pytest.raises(RequestRefused):
            await answer(client, run_id, request_id, True)


async def test_refusal_and_unfitting_answers(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        run_id = await client.submit("asker")
        request_id = await open_request(client, run_id)
        with pytest.raises(RequestRefused, match="not of type 'integer'"):
            await answer(client, run_id, request_id, "three")
        denial = InputAnswer(is_denied=True)
        await client.registry.answer_input(client.user_id, run_id, request_id, denial)
        assert (await client.ended(run_id)).as_json()["result"] == "denied"
        await client.checked_log(run_id)


async def test_plain_function_gets_one_of_the_choices(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        run_id = await client.submit("plain")
        request_id = await open_request(client, run_id)
        with pytest.raises(RequestRefused, match="invalid_frame"):
            await answer(client, run_id, request_id, "green")
        await answer(client, run_id, request_id, "blue")
        assert (await client.ended(run_id)).as_json()["result"] == "blue"


async def test_answer_whose_signal_is_lost_arrives_with_the_lease(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings) as running:
        run_id = await client.submit("mailer", "60")
        request_id = await open_request(client, run_id)
        channel = client.keys.worker(running.worker_id)
        assert (await client.link.client.pubsub_numsub(channel))[0][1] == 1
        # Nobody listens on the channel that the run's hash names from here on, and the real one
        # loses its connection as well.
        run_key = client.keys.user(client.user_id).run(run_id)
        await client.link.client.hset(run_key, "worker", "nobody")
        await client.link.client.client_kill_filter(_type="pubsub")
        await answer(client, run_id, request_id, True)
        assert (await client.ended(run_id, deadline_s=5)).as_json()["result"] == "Sent."
        await client.checked_log(run_id)


async def test_answer_that_is_given_again_is_taken_as_before(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        run_id = await client.submit("mailer", "60")
        request_id = await open_request(client, run_id)
        for _ in range(2):
            await answer(client, run_id, request_id, True)
        assert (await client.ended(run_id)).as_json()["result"] == "Sent."
        await answer(client, run_id, request_id, True)
        with pytest.raises(RequestRefused, match="run_ended"):
            await answer(client, run_id, request_id, False)
        events = await client.checked_log(run_id)
        assert [event["type"] for event in events].count("input_resolved") == 1


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (InputAnswer(1), [InputAnswer(True), InputAnswer("1"), InputAnswer(is_denied=True)]),
        (InputAnswer(is_denied=True), [InputAnswer(None), InputAnswer(False)]),
        (InputAnswer({"a": 1, "b": [0]}), [InputAnswer({"a": 1, "b": [False]})]),
    ],
)
async def test_another_answer_than_the_first_one_is_refused(
    settings: Settings, first: InputAnswer, others: list[InputAnswer]
) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        run_id = await client.submit("anything")
        request_id = await open_request(client, run_id)

        async def give(given: InputAnswer) -> None:
            await client.registry.answer_input(client.user_id, run_id, request_id, given)

        await give(first)
        for other in others:
            with pytest.raises(RequestRefused, match="unknown_request"):
                await give(other)
        if isinstance(first.value, dict):
            await give(InputAnswer(dict(reversed(first.value.items()))))
        await give(first)


async def test_answer_that_is_given_again_reaches_a_worker_that_was_not_told(
    redis_url: str, key_prefix: str
) -> None:
    # No lease is renewed in time: the second answer's signal alone can tell.
    settings = worker_settings(redis_url, key_prefix, lease_ms=60_000)
    async with Client(settings) as client, asking_worker().running(settings) as running:
        run_id = await client.submit("mailer", "60")
        request_id = await open_request(client, run_id)
        run_key = client.keys.user(client.user_id).run(run_id)
        await client.link.client.hset(run_key, "worker", "nobody")
        await answer(client, run_id, request_id, True)
        assert await client.status(run_id) == "running"
        await client.link.client.hset(run_key, "worker", running.worker_id)
        await answer(client, run_id, request_id, True)
        assert (await client.ended(run_id, deadline_s=5)).as_json()["result"] == "Sent."
        await client.checked_log(run_id)


async def test_cancelling_a_run_that_waits_closes_its_question(settings: Settings) -> None:
    async with Client(settings) as client, asking_worker().running(settings):
        run_id = await client.submit("mailer", "60")
        await open_request(client, run_id)
        await client.registry.cancel(client.user_id, run_id)
        assert (await client.ended(run_id, deadline_s=2)).summary.status == "cancelled"
        events = await client.checked_log(run_id)
        assert [event["type"] for event in events[-3:]] == [
            "cancel_requested",
            "input_resolved",
            "agent_cancelled",
        ]
        assert events[-2]["data"]["outcome"] == "cancelled"


@pytest.mark.parametrize("how", ["terminate", "kill"])
async def test_pending_approval_is_asked_again_when_its_worker_is_replaced(
    redis_url: str, key_prefix: str, how: str
) -> None:
    settings = worker_settings(redis_url, key_prefix, lease_ms=LEASE_MS, worker_grace_s=0)
    async with Client(settings) as client, worker_process(settings) as process:
        run_id = await client.submit("approved")
        first = await open_request(client, run_id)
        async with process_worker.running(settings):
            process.terminate() if how == "terminate" else process.kill()
            second = await open_request(client, run_id, attempt=2)
            with pytest.raises(RequestRefused, match="unknown_request"):
                await answer(client, run_id, first, True)
            await answer(client, run_id, second, True)
            assert (await client.ended(run_id)).as_json()["result"] == "approved in attempt 2"
        events = await client.checked_log(run_id)
        [retrying] = [event for event in events if event["type"] == "agent_retrying"]
        assert retrying["data"]["reason"] == (
            "worker_stopping" if how == "terminate" else "worker_lost"
        )


async def test_pending_approval_survives_while_its_stopping_worker_lives(
    settings: Settings,
) -> None:
    async with Client(settings) as client, worker_process(settings) as process:
        run_id = await client.submit("approved")
        request_id = await open_request(client, run_id)
        process.terminate()
        await asyncio.sleep(0.3)
        await answer(client, run_id, request_id, True)
        assert (await client.ended(run_id)).as_json()["result"] == "approved in attempt 1"
        assert await process.exit_code() == 0
        await client.has_event(run_id, EventType.AGENT_COMPLETED)
