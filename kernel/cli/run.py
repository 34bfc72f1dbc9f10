"""`eskernel run` and `eskernel check`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kernel.cli import EXIT_CODES, INTERRUPTED
from kernel.cli.check_log import LogReport, examine_log, print_report
from kernel.cli.common import asynchronous, console, explain, fail, print_findings, print_json
from kernel.cli.exit_codes import FAILED
from kernel.cli.options import settings_options
from kernel.cli.streams import outlive_reader

if TYPE_CHECKING:
    from kernel.app import App
    from kernel.preflight import Finding
    from kernel.service import Service
    from kernel.settings.sources import Loaded
    from kernel.workers.supervisor import Supervisor

logger = logging.getLogger("eskernel.cli")


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
    from kernel.app import load_app
    from kernel.runtime.files import allow_files
    from kernel.runtime.memory import settle_memory
    from kernel.service import Service
    from kernel.telemetry.logging import set_up
    from kernel.workers.supervisor import Supervisor

    outlive_reader()
    allow_files()  # workers and the embedded server inherit it
    settings = loaded.settings
    set_up(settings.logging)  # importing an app may log already
    found = load_app(app)
    set_up(settings.logging, found.name)
    if loaded.ignored:
        names = ", ".join(loaded.ignored)
        logger.info("variables of Kubernetes Services, which are no settings, are ignored: %s", names)
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
    from kernel.settings.fields import shown
    from kernel.workers.supervisor import Supervisor

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
@click.option("--log", is_flag=True, help="Decode the stored events with this program too.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="With --log: only N commits, spread over the log.")
@click.option("--nats", metavar="URL", help="With --log: the NATS server, instead of the one in the settings.")
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
def check(
    app: str | None,
    log: bool,
    sample: int | None,
    nats: str | None,
    database: str | None,
    config: Path | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Check an APP's declarations without starting anything, and list them.

    All problems are listed at once, each with its remedy. With --log, every stored event is decoded: a deployment whose
    program can't read its log is noticed before it starts. With --database, the tables are compared with the models:
    what a start would build, what would prevent it, what others have built on the views, and views of projections that
    the app no longer has. Nothing is changed. Exits with 1 if an event does not decode, or belongs to an aggregate that
    the app does not declare, or if something would prevent the start.

    \b
    eskernel check examples.bank:app
    eskernel check examples.bank:app --log --sample 100000
    eskernel check examples.bank:app --log --nats nats://host:4222
    eskernel check examples.bank:app --database
    """
    from kernel.app import load_app

    if app is None and database and "://" not in database:
        app, database = database, ""  # the app was written after --database
    if app is None:
        raise click.UsageError("give the app, as package.module:variable")
    report = None
    findings: list[Finding] = []
    try:
        loaded = load_app(app)
        if log or sample is not None:
            report = _examine_log(loaded, sample, {"connection.servers": nats, "data": data}, config, quiet=as_json)
        if database is not None:
            findings = _compare(loaded, database, config, data)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
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
        "projections": {p.name: {"kind": p.kind, "of": p.of, "version": p.version} for p in loaded.projections},
        "reactions": {
            each.name: {"kind": each.kind, "of": sorted(each.types), "start": each.start} for each in loaded.reactions
        },
    }
    if report is not None:
        listing["log"] = asdict(report)
    if database is not None:
        listing["database"] = [finding._asdict() for finding in findings]
    if as_json:
        print_json(listing)
    else:
        _list(loaded)
        if report is not None:
            print_report(report)
        print_findings(findings)
    if (report is not None and report.problems) or any(finding.level == "error" for finding in findings):
        sys.exit(FAILED)


def _examine_log(app: App, sample: int | None, given: dict[str, Any], config: Path | None, *, quiet: bool) -> LogReport:
    from kernel.settings.sources import load

    settings = load(config, {name: value for name, value in given.items() if value is not None}).settings
    return asyncio.run(examine_log(app, settings, sample, quiet=quiet))


def _compare(app: App, database: str | None, config: Path | None, data: Path | None) -> list[Finding]:
    from kernel.preflight import compare_database
    from kernel.settings.sources import load

    given = {name: value for name, value in (("database.url", database), ("data", data)) if value}
    return compare_database(app, load(config, given).settings)


def _list(loaded: App) -> None:
    console.print(f"{loaded.name}: the declarations have no problems", highlight=False)
    for declared in loaded.types.values():
        console.print(f"  {declared.name}", style="bold", highlight=False)
        console.print(f"    commands  {', '.join(sorted(declared.commands))}", highlight=False)
        console.print(f"    events    {', '.join(sorted(declared.events))}", highlight=False)
    for p in loaded.projections:
        console.print(f"  {p.name} ({p.kind} of {p.of}, version {p.version})", highlight=False)
    for each in loaded.reactions:
        console.print(f"  {each.name} ({each.kind} of {', '.join(each.types)})", highlight=False)
