"""`eskernel run` and `eskernel check`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kernel.app import App, load_app
from kernel.cli import EXIT_CODES
from kernel.cli.common import asynchronous, console, explain, fail, print_findings, print_json
from kernel.cli.exit_codes import FAILED
from kernel.cli.options import settings_options
from kernel.runtime.memory import settle_memory
from kernel.service import Service
from kernel.settings.fields import shown
from kernel.settings.sources import Loaded, load
from kernel.telemetry.logging import set_up
from kernel.workers.supervisor import Supervisor

if TYPE_CHECKING:
    from kernel.preflight import Finding


@click.command(epilog=EXIT_CODES)
@click.argument("app")
@settings_options
@asynchronous
async def run(app: str, loaded: Loaded) -> None:
    """Run an APP, given as package.module:variable, until SIGTERM or Ctrl-C.

    \b
    eskernel run examples.bank:app
    eskernel run examples.bank:app --workers 2
    eskernel run examples.bank:app --nats nats://host:4222 --database postgresql://user@host/name
    eskernel run examples.bank:app --config production.toml --set stream.replicas=3

    Settings come from a TOML file, the environment (ESKERNEL_STREAM__REPLICAS=3) and the command line; a later source
    overrides an earlier one. `eskernel config show` lists all settings; docs/configuration.md explains them.

    At a stop the service answers the commands in progress and writes the last batch. A second signal stops it at once;
    the next start continues from the last written batch.
    """
    settings = loaded.settings
    set_up(settings.logging)  # importing an app may log already
    found = load_app(app)
    set_up(settings.logging, found.name)
    service: Service | Supervisor
    if settings.workers == 1:
        service = Service(found, settings, spec=app)
    else:
        service = Supervisor(found.name, app, settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if stop.is_set():
            os._exit(FAILED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    starting = asyncio.ensure_future(service.start())
    waiting = [starting, *(asyncio.ensure_future(event.wait()) for event in (stop, service.stopped))]
    await asyncio.wait(waiting[:2], return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        await starting
        settle_memory()
        _print(service, found.name)
        await asyncio.wait(waiting[1:], return_when=asyncio.FIRST_COMPLETED)
        console.print("stopping: answering the commands in progress ...", highlight=False)
        await service.stop()
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    if service.failure:
        fail(service.failure, FAILED)
    console.print("stopped", highlight=False)


def _print(service: Service | Supervisor, app: str) -> None:
    lines = {
        "log": shown(service.nats_url) + (" (embedded)" if service.settings.embedded else ""),
        "workers": f"{len(service.workers)} processes" if isinstance(service, Supervisor) else "1, this process",
        "durability": service.durability,
        "database": shown(service.database_url),
        "http": f"{service.http.url}/healthz  /readyz  /metrics",
        "data": str(service.directory.path),
    }
    console.print(f"[bold]{app}[/bold] is running", highlight=False)
    for name, value in lines.items():
        console.print(f"  {name:<11}{value}", highlight=False, markup=False, soft_wrap=True)
    console.print("  stop it with Ctrl-C or SIGTERM", highlight=False)
    sys.stdout.flush()


@click.command(epilog=EXIT_CODES)
@click.argument("app", required=False)
@click.option(
    "--database",
    is_flag=False,
    flag_value="",
    metavar="[URL]",
    help="Compare the tables of this database too, or those of the configured one.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with settings.  [default: eskernel.toml, if it exists]",
)
@click.option("--data", type=click.Path(path_type=Path), help="Data directory of the service.  [default: .eskernel]")
@click.option("--json", "as_json", is_flag=True)
def check(app: str | None, database: str | None, config: Path | None, data: Path | None, as_json: bool) -> None:
    """Check an APP's declarations without starting anything, and list them.

    All problems are listed at once, each with its remedy. With --database, the tables are compared with the models:
    what a start would build, what would prevent it, what others have built on the views, and views of projections that
    the app no longer has. Nothing is changed. Exits with 1 if something would prevent the start.
    """
    if app is None and database and "://" not in database:
        app, database = database, ""  # the app was written after --database
    if app is None:
        raise click.UsageError("give the app, as package.module:variable")
    try:
        loaded = load_app(app)
        findings = _compare(loaded, database, config, data) if database is not None else []
    except Exception as error:
        explain(error)
    listing: dict[str, Any] = {
        "app": loaded.name,
        "aggregates": {
            declared.name: {
                "commands": sorted(declared.commands),
                "events": {event.name: event.version for event in declared.events.values()},
            }
            for declared in loaded.types.values()
        },
        "projections": {p.name: {"kind": p.kind, "of": p.aggregate, "version": p.version} for p in loaded.projections},
    }
    if database is not None:
        listing["database"] = [finding._asdict() for finding in findings]
    if as_json:
        print_json(listing)
    else:
        _list(loaded)
        print_findings(findings)
    if any(finding.level == "error" for finding in findings):
        sys.exit(FAILED)


def _compare(app: App, database: str | None, config: Path | None, data: Path | None) -> list[Finding]:
    from kernel.preflight import compare_database

    given = {name: value for name, value in (("database.url", database), ("data", data)) if value}
    return compare_database(app, load(config, given).settings)


def _list(loaded: App) -> None:
    console.print(f"{loaded.name}: the declarations have no problems", highlight=False)
    for declared in loaded.types.values():
        console.print(f"  {declared.name}", style="bold", highlight=False)
        console.print(f"    commands  {', '.join(sorted(declared.commands))}", highlight=False)
        console.print(f"    events    {', '.join(sorted(declared.events))}", highlight=False)
    for p in loaded.projections:
        console.print(f"  {p.name} ({p.kind} of {p.aggregate}, version {p.version})", highlight=False)
