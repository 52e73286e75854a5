"""``relay token``: a token for a user, as your application's backend would make it."""

from __future__ import annotations

from typing import Annotated

import typer

from relay.cli.local import mint
from relay.client.http import http_address
from relay.config import load_settings


def token(
    user: Annotated[
        str,
        typer.Option("--user", metavar="ID", help="Whom the token speaks for.", show_default=False),
    ],
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
    made = mint(load_settings(), user, ttl_s, scope or ())
    # Whoever has the link is the user; a fragment at least never reaches a server or its logs.
    typer.echo(f"{http_address(url)}/#token={made}" if url else made)
