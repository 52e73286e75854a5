"""The agent on a real relay: gateways as processes, a real Redis, users with real tokens.

`relay_stack` and `relay_client` come from the pytest plugin that agent-relay brings along.
"""

import pytest
from travel_agent import worker

pytestmark = pytest.mark.relay(workers=[worker])


async def test_a_trip_is_found_and_booked(relay_client):
    alice = await relay_client("alice")
    run_id = await alice.ask("Lisbon")

    await alice.approve(run_id)
    end = await alice.wait_end(run_id)

    assert end["data"]["result"] == "Booked: 18:40 to Lisbon."
    alice.assert_lifecycle(
        run_id,
        [
            "agent_queued",
            "agent_started",
            "agent_thinking",
            "tool_executing",
            "tool_completed",
            "input_requested",
            "input_resolved",
            "tool_executing",
            "tool_completed",
            "agent_completed",
        ],
    )
    alice.assert_complete(run_id, text="There is a train at 18:40 for 49 euros. ")


async def test_nothing_is_booked_without_a_yes(relay_client):
    alice = await relay_client("alice")
    run_id = await alice.ask("Porto")

    await alice.deny(run_id)
    end = await alice.wait_end(run_id)

    assert end["data"]["result"] == "Nothing was booked."
    calls = [event["data"]["tool_name"] for event in alice.events_of(run_id, "tool_executing")]
    assert calls == ["find_train"]


async def test_an_unknown_place_is_explained(relay_client):
    alice = await relay_client("alice")
    run_id = await alice.ask("Atlantis")

    end = await alice.wait_for("agent_error", run_id=run_id)

    assert end["data"]["code"] == "invalid_request"
    assert end["data"]["error_message"] == "No train goes to Atlantis."
    # The tool call that was open is closed before the run ends.
    alice.assert_lifecycle(run_id, [..., "tool_executing", "tool_completed", "agent_error"])


async def test_stop_ends_the_run(relay_client):
    alice = await relay_client("alice")
    run_id = await alice.ask("Lisbon")
    await alice.wait_for("text_delta", run_id=run_id)

    await alice.cancel(run_id)

    await alice.wait_for("agent_cancelled", run_id=run_id)
    alice.assert_complete(run_id)


async def test_a_lost_connection_costs_nothing(relay_client):
    alice = await relay_client("alice")
    run_id = await alice.ask("Lisbon")
    await alice.wait_for("text_delta", run_id=run_id)

    await alice.drop_connection()
    await alice.approve(run_id)

    await alice.wait_end(run_id)
    alice.assert_complete(run_id, text="There is a train at 18:40 for 49 euros. ")


@pytest.mark.relay(gateways=2)
async def test_a_killed_gateway_costs_nothing_and_nobody_sees_anothers_trip(
    relay_stack, relay_client
):
    alice, bob = await relay_client("alice", gateway=0), await relay_client("bob", gateway=1)
    trips = {alice: await alice.ask("Lisbon"), bob: await bob.ask("Porto")}
    await alice.wait_for("text_delta")

    await relay_stack.kill_gateway(0)

    for user, run_id in trips.items():
        await user.approve(run_id)
        await user.wait_end(run_id)
        user.assert_complete(run_id)
    relay_stack.assert_isolated()


def test_without_an_event_loop(relay_stack_sync):
    alice = relay_stack_sync.client("alice")
    run_id = alice.ask("Porto")

    alice.approve(run_id)

    assert alice.wait_end(run_id)["data"]["result"] == "Booked: 17:05 to Porto."
