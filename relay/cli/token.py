"""``relay token``: a token, as your application's backend would make it; and the end of one."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated, Any

import jwt
import typer

from relay.cli import console
from relay.cli.local import mint, operator_settings
from relay.cli.serve import RedisUrl
from relay.client.http import http_address
from relay.config import Settings, load_settings
from relay.errors import ConfigurationError
from relay.events import format_timestamp
from relay.keys import Keys
from relay.revocations import Revocation, RevocationLog, revocation_of
from relay.scripts import RedisLink
from relay.tokens import LATEST_EXPIRY_S, looks_like_token

app = typer.Typer(help="Print a token for a user, or revoke tokens.")


@app.callback(invoke_without_command=True)
def token(
    context: typer.Context,
    user: Annotated[
        str | None,
        typer.Option("--user", metavar="ID", help="Whom the token speaks for.", show_default=False),
    ] = None,
    ttl_s: Annotated[
        int,
        typer.Option(
            "--ttl-s",
            metavar="SECONDS",
            min=1,
            max=31_536_000,
            help="How many seconds it is valid.",
        ),
    ] = 3600,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="A gateway's address: prints the link that opens its page as this user.",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            metavar="NAME",
            help="A right beyond the user's own, e.g. relay:admin. Repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print a token, signed with RELAY_JWT_SECRET or the secret of the relay up in this folder.

    Nothing else is written to stdout, so that it can be piped.
    """
    if context.invoked_subcommand is not None:
        return
    if user is None:
        raise ConfigurationError("Say whom the token speaks for: --user ID.")
    made = mint(load_settings(), user, ttl_s, scope or ())
    # Whoever has the link is the user; a fragment at least never reaches a server or its logs.
    typer.echo(f"{http_address(url)}/#token={made}" if url else made)


@app.command("revoke")
def revoke(
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="JTI",
            help="The token's id (claim jti); or the token itself, - reads it from stdin.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            "--user",
            metavar="ID",
            help="Revoke all tokens that this user has been issued so far.",
            show_default=False,
        ),
    ] = None,
    exp: Annotated[
        int | None,
        typer.Option(
            "--exp",
            metavar="SECONDS",
            min=0,
            max=LATEST_EXPIRY_S,
            help="When the token expires (claim exp), so that it can be forgotten after that.",
            show_default=False,
        ),
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Revoke one token, or all of a user, on every gateway within a second.

    Connections that were opened with them are closed with 4401.
    """
    if (which is None) == (user is None):
        raise ConfigurationError("Name one token by its jti, or one user with --user.")
    now_ms = time.time_ns() // 1_000_000
    if user is not None:
        revocation = revocation_of("user", user, now_ms, exp)
    else:
        jti, expires_s = _read_claims(sys.stdin.readline().strip() if which == "-" else which or "")
        revocation = revocation_of("token", jti, now_ms, expires_s if exp is None else exp)
    asyncio.run(_keep(operator_settings(redis_url), revocation))
    what = f"All tokens of {user}" if user is not None else f"Token {revocation.subject}"
    console.out.print(
        f"{what} revoked until {format_timestamp(revocation.until_ms)}.",
        highlight=False,
        markup=False,
    )


def _read_claims(shown: str) -> tuple[str, float | None]:
    """Give id and expiry of a token, or the id that was given itself.

    Nobody has to be convinced of a token that is to be worth nothing: it is not verified.
    """
    if not looks_like_token(shown):
        return shown, None
    try:
        claims: dict[str, Any] = jwt.decode(shown, options={"verify_signature": False})
    except jwt.PyJWTError:
        # An id may look like a token.
        return shown, None
    jti, expires_s = claims.get("jti"), claims.get("exp")
    if not isinstance(jti, str):
        raise ConfigurationError(
            "The token has no id (claim jti). Revoke all tokens of its user with --user."
        )
    return jti, expires_s if isinstance(expires_s, int | float) else None


async def _keep(settings: Settings, revocation: Revocation) -> None:
    link = RedisLink(settings.redis_url, max_connections=2)
    try:
        await link.check()
        await RevocationLog(link, Keys(settings.key_prefix)).add(revocation)
    finally:
        await link.aclose()
