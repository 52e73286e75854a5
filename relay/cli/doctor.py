"""``relay doctor``: looks at configuration and Redis, and says what to do about what it finds."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated

import orjson
import typer
from redis.exceptions import RedisError
from rich.table import Table
from rich.text import Text

from relay.cli import checks, console
from relay.cli.checks import Finding, Verdict
from relay.cli.local import default_folder
from relay.cli.serve import RedisUrl
from relay.config import Settings, find_unknown_variables, load_settings
from relay.errors import ConfigurationError, RedisMisconfigured, RelayError
from relay.scripts import RedisLink, mapped_errors

ROUND_TRIP_TIMEOUT_S = 2.0

_MARKS = {Verdict.OK: ("✓", "good"), Verdict.WARN: ("!", "care"), Verdict.FAIL: ("✗", "bad")}


def doctor(
    redis_url: RedisUrl = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, one object a line.")
    ] = False,
) -> None:
    """Check configuration and Redis; name each problem with its remedy.

    Ends with exit code 1 if something would not work.
    """
    findings = asyncio.run(examine(redis_url))
    if as_json:
        for finding in findings:
            typer.echo(
                orjson.dumps(
                    {
                        "subject": finding.subject,
                        "verdict": finding.verdict.value,
                        "fact": finding.fact,
                        "remedy": finding.remedy,
                    }
                )
            )
    else:
        _print(findings)
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(1)


async def examine(redis_url: str | None) -> list[Finding]:
    """Look at everything. Never raises for what it was asked to find."""
    try:
        settings = load_settings(redis_url=redis_url)
    except ConfigurationError as error:
        return [
            Finding("Configuration", Verdict.FAIL, str(error), "Correct the variables named here.")
        ]
    local = default_folder()
    running = local.running()
    if running is not None and "redis_url" not in settings.model_fields_set:
        settings = load_settings(redis_url=running.redis_url)
    return [
        Finding("Configuration", Verdict.OK, "all values are allowed"),
        *checks.check_variables(find_unknown_variables()),
        checks.check_token_keys(settings, has_local_secret=local.secret() is not None),
        checks.check_limits(settings),
        *await _examine_redis(settings),
    ]


async def _examine_redis(settings: Settings) -> list[Finding]:
    where = settings.redis_location
    try:
        link = RedisLink(settings.redis_url, max_connections=4)
        try:
            await link.check()
            return [
                Finding("Redis", Verdict.OK, f"answers at {where}"),
                *await _examine_server(link),
                *await _examine_round_trip(link, settings.key_prefix),
            ]
        finally:
            await link.aclose()
    except RedisMisconfigured as error:
        remedy = "Correct RELAY_REDIS_URL, or how the server is set up."
        return [Finding("Redis", Verdict.FAIL, str(error), remedy)]
    except RelayError as error:
        return [
            Finding(
                "Redis",
                Verdict.FAIL,
                str(error),
                "Start Redis, or set RELAY_REDIS_URL to where it is. relay up brings its own.",
            )
        ]


async def _examine_server(link: RedisLink) -> list[Finding]:
    with mapped_errors(link.url):
        info = await link.client.info()
        asked = time.time()
        seconds, microseconds = await link.client.time()
        answered = time.time()
    skew_ms = (seconds + microseconds / 1e6 - (asked + answered) / 2) * 1_000
    findings = [checks.check_version(info)]
    try:
        config = await link.client.config_get("*")
    except RedisError:
        findings.append(
            Finding(
                "Redis settings",
                Verdict.WARN,
                "CONFIG is not allowed here, so persistence and limits cannot be read.",
                "Make sure in your provider's console: append-only file on, maxmemory-policy "
                "noeviction.",
            )
        )
    else:
        readable = {_text(name): _text(value) for name, value in config.items()}
        findings += [
            checks.check_persistence(readable, info),
            *checks.check_memory(readable, info),
            checks.check_pubsub_buffer(readable),
            checks.check_replication(info, readable),
        ]
    findings.append(checks.check_clock(skew_ms))
    return findings


async def _examine_round_trip(link: RedisLink, prefix: str) -> list[Finding]:
    channel = f"{prefix}:node:doctor-{secrets.token_hex(6)}"
    round_trip_ms: float | None = None
    with mapped_errors(link.url):
        async with link.client.pubsub() as pubsub:
            await pubsub.subscribe(channel)
            clock = asyncio.get_running_loop().time
            began = clock()
            try:
                async with asyncio.timeout(ROUND_TRIP_TIMEOUT_S):
                    async for message in pubsub.listen():
                        if message["type"] == "subscribe":
                            began = clock()
                            await link.client.publish(channel, b"?")
                        elif message["type"] == "message":
                            round_trip_ms = (clock() - began) * 1_000
                            break
            except TimeoutError:
                round_trip_ms = None
    return [checks.check_round_trip(round_trip_ms, ROUND_TRIP_TIMEOUT_S)]


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _print(findings: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        fact = Text(finding.fact)
        if finding.remedy:
            fact.append(f"\n→ {finding.remedy}", style="cyan")
        table.add_row(Text(mark, style=style), finding.subject, fact)
    console.out.print(table)
    counts = dict.fromkeys(Verdict, 0)
    for finding in findings:
        counts[finding.verdict] += 1
    if counts[Verdict.FAIL]:
        summary, style = f"{counts[Verdict.FAIL]} of these will not work.", "bad"
    elif counts[Verdict.WARN]:
        summary, style = "It will work; look at the marked lines.", "care"
    else:
        summary, style = "All is well.", "good"
    console.out.print(Text(f"\n{summary}", style=style))
