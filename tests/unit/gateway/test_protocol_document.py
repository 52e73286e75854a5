"""docs/protocol.md says what the code does: its tables are compared with the code's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from gateway import outbox, protocol, session, wire
from gateway.requests import FRAME_MODELS, CancelBody, InputBody, RunBody
from gateway.server import FRAME_HEADROOM
from relay.errors import AGENT_ERRORS, WIRE_ERRORS, CloseCode
from relay.events import DATA_MODELS
from relay.recovery import ResetReason

TEXT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Give the cells of the first table after a line that starts with ``heading``."""
    after = TEXT[TEXT.index(f"\n{heading}") + 1 :]
    table = re.search(r"((?:^\|.*\n)+)", after, re.MULTILINE)
    assert table is not None
    lines = table[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> dict[str, bool]:
    """Give the field names of a cell, and whether each is required."""
    return {name: not optional for name, optional in re.findall(r"`(\w+)`(\?)?", cell)}


def fields(model: type[BaseModel], *leave_out: str) -> dict[str, bool]:
    return {
        name: field.is_required()
        for name, field in model.model_fields.items()
        if name not in leave_out
    }


def test_errors_are_those_of_the_code() -> None:
    documented = {code.strip("`"): cells for code, *cells in rows("### Errors")}
    expected = {
        code: ["yes" if g.retryable else "no", str(g.http_status), g.message]
        for code, g in WIRE_ERRORS.items()
    }
    assert documented == expected


def test_agent_errors_are_those_of_the_code() -> None:
    documented = {code.strip("`"): cells for code, *cells in rows("Codes of `agent_error`:")}
    expected = {
        code: ["yes" if g.retryable else "no", g.message] for code, g in AGENT_ERRORS.items()
    }
    assert documented == expected


def test_reasons_of_a_reset_are_those_of_the_code() -> None:
    documented = {reason.strip("`") for reason, _ in rows("Reasons of `reset`:")}
    assert documented == set(get_args(ResetReason))


def test_close_codes_are_those_of_the_code() -> None:
    documented = {
        int(code): (name.strip("`"), reconnect)
        for code, name, _, reconnect in rows("### Close codes")
    }
    expected = {int(code): (code.name, "yes" if code.may_reconnect else "no") for code in CloseCode}
    assert documented == expected


def test_client_frames_are_those_of_the_code() -> None:
    documented = {
        kind.strip("`"): names(cell) for kind, cell, _ in rows("## Frames from the client")
    }
    expected = {kind: fields(model, "type", "id") for kind, model in FRAME_MODELS.items()}
    assert documented == expected


def test_bodies_are_those_of_the_code() -> None:
    documented = {request.split(" {")[0].strip("`"): names(request.partition(" {")[2])
                  for request, _ in rows("## HTTP")}  # fmt: skip
    assert documented["POST /v1/runs"] == fields(RunBody)
    assert documented["POST /v1/runs/{run_id}/cancel"] == fields(CancelBody)
    assert documented["POST /v1/runs/{run_id}/inputs/{request_id}"] == fields(InputBody)


def test_events_are_those_of_the_code() -> None:
    documented = {kind.strip("`"): names(cell) for kind, cell in rows("### Events")}
    expected = {
        str(kind): {
            field.alias or name: field.is_required()
            for name, field in model.model_fields.items()
            if name != "message"
        }
        for kind, model in DATA_MODELS.items()
    }
    assert documented == expected


def test_numbers_are_those_of_the_code() -> None:
    assert session.ABUSE_LIMIT == 10
    assert "the tenth\n  within 60 seconds closes with 1008" in TEXT
    assert session.ABUSE_WINDOW_MS == 60_000
    assert session.FLOOD_SECONDS == 10
    assert "ten seconds' worth" in TEXT
    assert FRAME_HEADROOM == 4
    assert "one above four times that" in TEXT
    assert session.EXPIRY_WARNING_MS == 30_000
    assert "30 seconds before the token expires" in TEXT
    assert (session.PINGS_AT_ONCE, session.PINGS_PER_SECOND) == (100, 20)
    assert "100 at once and 20 a second" in TEXT
    assert wire.MAX_FRAGMENTS == 1_000
    assert "more than 1,000 fragments" in TEXT
    assert outbox.NO_PROGRESS_LIMIT_MS == 60_000
    assert (protocol.PING_INTERVAL_MS, protocol.PING_TIMEOUT_MS) == (20_000, 20_000)
