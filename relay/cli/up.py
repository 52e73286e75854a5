"""``relay up``: the whole stack on this machine, with one command."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import relay
from relay.cli import console
from relay.cli.local import DataFolder, RunningStack, default_folder
from relay.cli.serve import RedisUrl
from relay.cli.stack import Stack, StackPlan
from relay.config import Settings, find_unknown_variables, load_settings
from relay.errors import ConfigurationError
from relay.tokens import mint_token

LINK_TTL_S = 86_400
PEOPLE = ("alice", "bob")
MAX_GATEWAYS = 16


def up(
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            min=0,
            max=65_535 - MAX_GATEWAYS,
            help="The first gateway's port; the others take the next ones. 0 takes free ones. "
            "[dim]RELAY_PORT, else 8080[/dim]",
            show_default=False,
        ),
    ] = None,
    gateways: Annotated[
        int,
        typer.Option("--gateways", metavar="N", min=1, max=MAX_GATEWAYS, help="How many gateways."),
    ] = 2,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="MODULE:ATTR",
            help="Your own worker instead of the example agents.",
            show_default=False,
        ),
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            metavar="FOLDER",
            help="Where history and secret are kept. [dim].relay in the current folder[/dim]",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in your browser.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what every process logs.")
    ] = False,
) -> None:
    """Run everything on this machine: Redis, two gateways, a worker with example agents.

    Prints the page's address. History and secret survive a restart. Ctrl-C ends all of it.
    """
    settings = load_settings(redis_url=redis_url)
    console.warn_of_unknown(find_unknown_variables())
    folder = DataFolder(data_dir) if data_dir is not None else default_folder()
    folder.create()
    plan = _plan(settings, folder, settings.port if port is None else port, gateways, worker)
    raise typer.Exit(asyncio.run(_run(plan, folder, open_page=open_page, verbose=verbose)))


def _plan(
    settings: Settings, folder: DataFolder, port: int, gateways: int, worker: str | None
) -> StackPlan:
    running = folder.running()
    if running is not None:
        raise ConfigurationError(
            f"relay up is already running with the data in {folder.path} (process {running.pid}): "
            f"{running.gateways[0]}. Stop it first, or choose another folder with --data-dir."
        )
    with ExitStack() as held:
        ports = [
            held.enter_context(_held_port(port and port + number, f"gateway {number + 1}"))
            for number in range(gateways)
        ]
        admin_ports = [held.enter_context(_held_port(0, "the internal listener")) for _ in ports]
    secret = settings.secrets[0] if settings.secrets else folder.ensure_secret()
    return StackPlan(
        settings=settings,
        redis_dir=None if "redis_url" in settings.model_fields_set else folder.redis_dir,
        ports=ports,
        admin_ports=admin_ports,
        secret=secret,
        worker=worker or "demo:worker",
        app_dir=Path.cwd() if worker else example_folder(),
        default_agent=settings.default_agent or (None if worker else "docs"),
    )


@contextmanager
def _held_port(port: int, whose: str) -> Iterator[int]:
    """Make sure that a port is free, and keep it from the other processes that we look for one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port that a closed connection still occupies counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except PermissionError as error:
            raise ConfigurationError(
                f"Port {port} for {whose} needs more rights than you have. "
                "Choose one above 1023 with --port."
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"Port {port} for {whose} is in use. Stop the program that uses it, or choose "
                "another one with --port (the gateways take that one and the next)."
            ) from error
        yield probe.getsockname()[1]


def example_folder() -> Path:
    """Give the folder of the example agents: beside the package in a checkout, or within it."""
    package = Path(relay.__file__).resolve().parent
    for folder in (package.parent / "examples", package / "_examples"):
        if (folder / "demo.py").is_file():
            return folder
    raise ConfigurationError(
        "The example agents are not part of this installation. Name a worker of your own: "
        "relay up --worker MODULE:ATTR."
    )


async def _run(plan: StackPlan, folder: DataFolder, *, open_page: bool, verbose: bool) -> int:
    stack = Stack(plan, verbose=verbose)
    work = asyncio.ensure_future(_until_stopped(stack, plan, folder, open_page=open_page))
    loop = asyncio.get_running_loop()
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            work.cancel()
        else:
            stack.kill()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    # nohup asks to go on when the terminal closes.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, stop)
    try:
        return await work
    except asyncio.CancelledError:
        return 0
    finally:
        folder.withdraw()
        if asked:
            console.err.print(Text("\nStopping. Ctrl-C again to hurry.", style="quiet"))
        await stack.stop()


async def _until_stopped(
    stack: Stack, plan: StackPlan, folder: DataFolder, *, open_page: bool
) -> int:
    with console.err.status("Starting", spinner="dots") as status:
        await stack.start(on_step=status.update)
    addresses = [f"http://127.0.0.1:{port}" for port in plan.ports]
    folder.announce(RunningStack(os.getpid(), addresses, stack.redis_url, plan.settings.key_prefix))
    links = {
        (person, number): f"{address}/#token={_token(plan, person)}"
        for person in PEOPLE
        for number, address in enumerate(addresses, 1)
    }
    _print_summary(stack, plan, folder, links)
    if open_page:
        webbrowser.open(links[PEOPLE[0], 1])
    console.print_error(await stack.wait_until_broken())
    return 1


def _token(plan: StackPlan, user: str) -> str:
    settings = plan.settings
    return mint_token(
        plan.secret,
        user,
        LINK_TTL_S,
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
    )


def _print_summary(
    stack: Stack, plan: StackPlan, folder: DataFolder, links: dict[tuple[str, int], str]
) -> None:
    out = console.out
    out.print()
    out.print(
        Text.assemble(("  Agent Relay", "bold"), (f" {relay.__version__}", "quiet"), " is running")
    )
    out.print()
    out.print(
        Text("  Open one of these. Every link is a signed-in user, valid for a day.", "quiet")
    )
    # The last user has one link only: to see that the others' events do not arrive there.
    for (person, number), link in links.items():
        if person != PEOPLE[0] and number > 1:
            continue
        out.print()
        out.print(Text.assemble("  ", (person, "name"), (f" on gateway {number}", "quiet")))
        # In one piece: terminals and mouse clicks know where a link ends only if nothing cuts it.
        out.print(Text.assemble("  ", (link, f"link {link}")), soft_wrap=True)
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="quiet", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("Redis", stack.redis_description)
    facts.add_row("Data", str(folder.path))
    facts.add_row("Worker", plan.worker)
    # As it was started here: in a virtual environment that is not active, relay is not on the PATH.
    is_script = Path(sys.argv[0]).name == "relay" and shutil.which("relay") is None
    command = shlex.quote(sys.argv[0]) if is_script else "relay"
    facts.add_row("Try", f"{command} send --user alice 'How does resume work?'")
    out.print()
    out.print(Padding(facts, (0, 0, 0, 2)))
    out.print()
    out.print(Text("  Ctrl-C stops everything.", style="quiet"))
    out.print()
