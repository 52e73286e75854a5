"""What clients send: every mistake is answered, and the connection lives where it may."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import jwt
import pytest
from websockets.frames import Frame, Opcode

from gateway.app import Gateway, running_gateway
from relay.config import SMALLEST_FRAME_LIMIT
from relay.errors import CloseCode
from relay.tokens import MAX_TOKEN_CHARS
from tests.integration.gateway_support import SECRET, Work, gateway_settings, tab, token

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_FRAME = SMALLEST_FRAME_LIMIT


@pytest.fixture
async def gateway(redis_url: str, key_prefix: str, server: str) -> AsyncIterator[Gateway]:
    settings = gateway_settings(
        redis_url, key_prefix, max_frame_bytes=MAX_FRAME, max_content_chars=500
    )
    async with running_gateway(settings) as running:
        yield running


MISTAKES = {
    "{": "invalid_json",
    "not json": "invalid_json",
    '{"a": NaN}': "invalid_json",
    "[]": "invalid_frame",
    "{}": "invalid_frame",
    '{"type": "subscribe", "id": "1", "channel": "relay:{bob}:live"}': "unknown_type",
    '{"type": "input_response", "id": "1", "run_id": "r", "request_id": "q"}': "invalid_frame",
    '{"type": "user_message", "id": "1", "content": "x"}': "invalid_frame",
    '{"type": "user_message", "id": "1", "thread_id": "t", "content": 5}': "invalid_frame",
}


async def test_mistakes_are_answered_and_the_next_request_works(gateway: Gateway) -> None:
    async with tab(gateway) as opened:
        for text, code in MISTAKES.items():
            await opened.socket.send(text)
            assert (await opened.error())["code"] == code
            assert await opened.is_alive()


async def test_limits_are_told_and_the_next_request_works(
    gateway: Gateway, redis_url: str, key_prefix: str
) -> None:
    async with Work(gateway.settings), tab(gateway) as opened:
        message = {"type": "user_message", "thread_id": "t", "agent": "echo"}
        answer = await opened.ask(**message, content="")
        assert (answer["code"], answer["retryable"]) == ("invalid_frame", False)
        assert "content: must not be empty" in answer["message"]
        assert (await opened.ask(**message, content="x" * 501))["code"] == "payload_too_large"
        answer = await opened.ask(**{**message, "agent": "nobody"}, content="x")
        assert answer["code"] == "unknown_agent"
        assert "echo" in answer["message"]
        await opened.socket.send(json.dumps({"type": "ping", "id": "x", "pad": "x" * MAX_FRAME}))
        assert (await opened.error())["code"] == "frame_too_large"
        answer = await opened.ask(**message, content="x" * 500)
        assert answer["type"] == "ack"
        assert answer["run_id"].startswith("run_")
        assert answer["duplicate"] is False


async def test_token_of_the_greatest_length_can_be_refreshed(gateway: Gateway) -> None:
    claims = jwt.decode(token(), SECRET, algorithms=["HS256"])
    # Three bytes of a claim are four characters.
    claims["groups"] = "x" * ((MAX_TOKEN_CHARS - len(token())) // 4 * 3 - 30)
    long = jwt.encode(claims, SECRET, algorithm="HS256")
    assert MAX_TOKEN_CHARS - 60 < len(long) <= MAX_TOKEN_CHARS
    async with tab(gateway) as opened:
        answer = await opened.ask(type="refresh_token", token=long)
        assert answer["type"] == "ack", answer


async def test_binary_frame_is_answered(gateway: Gateway) -> None:
    async with tab(gateway) as opened:
        await opened.socket.send(b'{"type": "ping", "id": "1"}')
        assert (await opened.error())["code"] == "binary_not_supported"
        assert await opened.is_alive()


async def test_fragmented_message_is_one_frame(gateway: Gateway) -> None:
    async with tab(gateway) as opened:
        await opened.socket.send(['{"type": "pi', 'ng", "id"', ': "7"}'])
        assert (await opened.until("pong"))["id"] == "7"


async def test_message_far_above_the_limit_closes_with_1009(gateway: Gateway) -> None:
    async with tab(gateway) as opened:
        await opened.socket.send("x" * (MAX_FRAME * 4 + 1))
        assert (await opened.closed())[0] == CloseCode.TOO_BIG
    async with tab(gateway) as opened:
        assert await opened.is_alive()


async def test_text_that_is_not_utf8_closes_with_1007(
    gateway: Gateway, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with tab(gateway) as opened, tab(gateway) as other:
        connection = opened.socket
        # The client library would refuse to send this.
        frame = Frame(Opcode.TEXT, b'{"type": "ping\xff"}')
        connection.transport.write(frame.serialize(mask=True))
        assert (await opened.closed())[0] == 1007
        assert await other.is_alive()
    # What a client does wrong is not an error of ours, and no reason for a stack.
    assert server == "asgi" or not [
        record for record in caplog.records if record.levelname == "ERROR"
    ]


async def test_repeated_mistakes_close_with_1008(gateway: Gateway) -> None:
    async with tab(gateway) as opened, tab(gateway) as other:
        for _ in range(10):
            await opened.socket.send("{")
        assert (await opened.closed())[0] == CloseCode.POLICY
        assert [frame["type"] for frame in opened.frames].count("error") == 10
        assert await other.is_alive()


async def test_too_many_frames_are_refused_not_dropped(gateway: Gateway) -> None:
    async with tab(gateway) as opened:
        for number in range(40):
            await opened.send(type="ping", id=str(number))
        answers = [await opened.receive() for _ in range(40)]
        assert [answer["id"] for answer in answers] == [str(number) for number in range(40)]
        assert answers[0]["type"] == "pong"
        refused = [answer for answer in answers if answer["type"] == "error"]
        assert 10 <= len(refused) <= 20
        assert {answer["code"] for answer in refused} == {"rate_limited"}
        assert refused[0]["retry_after_ms"] == 1_000


async def test_same_message_sent_again_is_the_same_run(gateway: Gateway) -> None:
    async with Work(gateway.settings), tab(gateway) as first, tab(gateway) as second:
        message = {"type": "user_message", "id": "m1", "thread_id": "t", "content": "x"}
        one = await first.ask(**message)
        again = await second.ask(**message)
        assert (one["duplicate"], again["duplicate"]) == (False, True)
        assert one["run_id"] == again["run_id"]


async def test_agent_that_is_not_named_is_the_only_one_or_must_be(gateway: Gateway) -> None:
    async with tab(gateway) as opened:
        message = {"type": "user_message", "thread_id": "t", "content": "x"}
        answer = await opened.ask(**message)
        assert answer["code"] == "unknown_agent"
        assert "relay worker" in answer["recovery_suggestions"][0]
        async with Work(gateway.settings) as work:
            assert (await opened.ask(**message))["type"] == "ack"
            await work.link.client.hset(work.keys.agents, "other", "{}")
            answer = await opened.ask(**message)
            assert answer["code"] == "unknown_agent"
            assert "echo, other" in answer["message"]


async def test_cancel_ends_a_queued_run_and_a_foreign_one_is_unknown(gateway: Gateway) -> None:
    async with Work(gateway.settings) as work, tab(gateway) as alice, tab(gateway, "bob") as bob:
        run_id = await work.submit("alice")
        answer = await bob.ask(type="cancel", run_id=run_id)
        assert answer["code"] == "unknown_run"
        answer = await alice.ask(type="cancel", run_id=run_id, reason="changed my mind")
        assert answer == {
            "type": "ack",
            "id": answer["id"],
            "run_id": run_id,
            "status": "cancelled",
        }
        if not any(frame["type"] == "agent_cancelled" for frame in alice.frames):
            await alice.until("agent_cancelled")
        again = await alice.ask(type="cancel", run_id=run_id, reason="changed my mind")
        assert again == {**answer, "id": again["id"]}
        assert (await alice.ask(type="cancel", run_id="run_x"))["code"] == "unknown_run"
        assert await bob.is_alive()
        assert not bob.events


async def test_question_is_answered_by_its_user_once(gateway: Gateway) -> None:
    async with Work(gateway.settings) as work, tab(gateway) as alice, tab(gateway, "bob") as bob:
        run_id = await work.submit("alice")
        answer = {"type": "input_response", "run_id": run_id, "request_id": "q1"}
        assert (await alice.ask(**answer, value="blue"))["code"] == "unknown_request"
        await work.question(run_id)
        await alice.until("input_requested")
        for wrong in ({}, {"value": "blue", "denied": True}, {"denied": False}):
            refused = await alice.ask(**answer, **wrong)
            assert refused["code"] == "invalid_frame"
            assert "denied" in refused["message"]
        assert (await bob.ask(**answer, value="red"))["code"] == "unknown_run"
        accepted = await alice.ask(**answer, value="blue")
        assert (accepted["type"], accepted["run_id"], accepted["request_id"]) == (
            "ack",
            run_id,
            "q1",
        )
        resolved = [frame for frame in alice.frames if frame["type"] == "input_resolved"]
        data = (resolved[0] if resolved else await alice.until("input_resolved"))["data"]
        assert (data["outcome"], data["value"]) == ("answered", "blue")
        # As a client does whose connection was lost before the ack came.
        again = await alice.ask(**answer, value="blue")
        assert again == {**accepted, "id": again["id"]}
        assert (await alice.ask(**answer, denied=True))["code"] == "unknown_request"
        assert not bob.events
