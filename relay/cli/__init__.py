"""The command ``relay``: one module for each group of commands, put together here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from relay import __version__
from relay.cli import console, doctor, follow, operators, requests, serve, token, up
from relay.errors import RelayError

_HELP = """
Agent workers run AI agents and publish what happens; gateways deliver it, live, in order and
without loss, to the right user's browsers. Redis is what they share.

Start with [bold]relay up[/bold]: it runs all of it on this machine and prints a page to open.
"""

_EPILOG = (
    "Settings come from options, RELAY_* variables and a .env file; docs/operations.md lists them."
)

app = typer.Typer(
    name="relay",
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # A traceback is for --debug; everyone else gets a sentence.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TRY, _RUN, _USE = "Try it", "Run it", "Use it"

app.command("up", rich_help_panel=_TRY)(up.up)
app.command("gateway", rich_help_panel=_RUN)(serve.gateway)
app.command("worker", rich_help_panel=_RUN)(serve.worker)
app.command("doctor", rich_help_panel=_RUN)(doctor.doctor)
app.command("workers", rich_help_panel=_RUN)(operators.workers)
app.add_typer(operators.dead_letters, name="dead-letters", rich_help_panel=_RUN)
app.add_typer(token.app, name="token", rich_help_panel=_USE)
app.command("send", rich_help_panel=_USE)(follow.send)
app.command("tail", rich_help_panel=_USE)(follow.tail)
app.command("runs", rich_help_panel=_USE)(requests.runs)
app.command("cancel", rich_help_panel=_USE)(requests.cancel)
app.command("answer", rich_help_panel=_USE)(requests.answer)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.out.print(f"relay {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error comes from.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    console.show_tracebacks = debug


def main() -> None:
    """Run the command line. Errors become one sentence on stderr and exit code 1."""
    try:
        app()
    except Exception as error:
        if console.show_tracebacks:
            raise
        if isinstance(error, RelayError):
            console.print_error(str(error))
            console.print_advice(
                getattr(error, "recovery_suggestions", ()), getattr(error, "retry_after_ms", None)
            )
        else:
            console.print_error(
                f"Unexpected {type(error).__name__}: {error}. relay --debug … shows where it "
                "comes from."
            )
        sys.exit(1)
