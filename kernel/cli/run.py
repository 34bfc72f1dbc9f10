"""`eskernel run` and `eskernel check`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
from sqlalchemy.engine import make_url

from kernel.app import load_app
from kernel.cli import EXIT_CODES
from kernel.cli.common import FAILED, asynchronous, console, explain, fail, print_json
from kernel.log.wire import shown
from kernel.service import Service
from kernel.settings import Settings
from kernel.supervisor import Supervisor

_DEFAULTS = Settings()


@click.command(epilog=EXIT_CODES)
@click.argument("app")
@click.option("--data", type=click.Path(path_type=Path), default=_DEFAULTS.data, show_default=True)
@click.option("--nats", metavar="URL", help="A NATS server with JetStream; without it an embedded one is started.")
@click.option("--database", metavar="URL", help="postgresql://... or sqlite:///file; without it SQLite in --data.")
@click.option(
    "--partitions",
    type=click.IntRange(1, 4096),
    default=_DEFAULTS.partitions,
    show_default=True,
    help="Used when the stream is created.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 5),
    default=_DEFAULTS.replicas,
    show_default=True,
    help="Used when the stream is created.",
)
@click.option("--sync", is_flag=True, help="Embedded server: wait for the disk at every commit.")
@click.option(
    "--group-commit", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
    help="Whether commits that are ready together go out as one atomic batch; auto measures the server.",
)  # fmt: skip
@click.option("--host", default=_DEFAULTS.host, show_default=True, help="Where HTTP listens.")
@click.option("--port", type=click.IntRange(0, 65535), default=_DEFAULTS.port, help="HTTP port; a free one by default.")
@click.option(
    "--max-actors",
    type=click.IntRange(1),
    default=_DEFAULTS.max_actors,
    show_default=True,
    help="Aggregates that stay live.",
)
@click.option(
    "--idle",
    type=click.FloatRange(0),
    default=_DEFAULTS.idle,
    show_default=True,
    help="Seconds until an unused aggregate goes.",
)
@click.option(
    "--max-commands",
    type=click.IntRange(1),
    default=_DEFAULTS.max_commands,
    show_default=True,
    help="Commands under way at once.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=_DEFAULTS.drain,
    show_default=True,
    help="Seconds that a stop waits for commands.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that share the partitions; the same command on another machine joins them.",
)
@click.option(
    "--lease",
    type=click.FloatRange(0.5, 60),
    default=_DEFAULTS.lease,
    show_default=True,
    help="Seconds after which a dead or frozen worker has lost its partitions.",
)
@click.option(
    "--retry-after",
    type=click.FloatRange(0.01),
    default=_DEFAULTS.retry_after,
    show_default=True,
    help="Seconds until a projection handler that failed with something transient is tried again; then doubled.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=_DEFAULTS.retries,
    show_default=True,
    help="How often that is tried before the event waits for `eskernel dead-letters`.",
)
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@asynchronous
async def run(app: str, workers: int, log_level: str, **options: Any) -> None:
    """Run an APP, named as package.module:variable, until SIGTERM or Ctrl-C.

    \b
    eskernel run examples.bank:app
    eskernel run examples.bank:app --workers 2
    eskernel run examples.bank:app --nats nats://host:4222 --database postgresql://user@host/name

    A stop drains: commands under way are answered and the last batch is written. A second signal stops at once;
    the next start goes on from what was written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    logging.getLogger("eskernel").setLevel(log_level.upper())
    loaded, settings = load_app(app), Settings(**options)
    service: Service | Supervisor
    if workers == 1:
        service = Service(loaded, settings, spec=app)
    else:
        service = Supervisor(loaded.name, app, settings, workers, log_level)
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
        _tell(service, loaded.name)
        await asyncio.wait(waiting[1:], return_when=asyncio.FIRST_COMPLETED)
        console.print("stopping: answering what is under way ...", highlight=False)
        await service.stop()
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    if service.failure:
        fail(service.failure, FAILED)
    console.print("stopped", highlight=False)


def _tell(service: Service | Supervisor, app: str) -> None:
    lines = {
        "log": shown(service.nats_url) + (" (embedded)" if service.settings.nats is None else ""),
        "workers": f"{len(service.workers)} processes" if isinstance(service, Supervisor) else "1, this process",
        "durability": service.durability,
        "database": make_url(service.database_url).render_as_string(hide_password=True),
        "http": f"{service.http.url}/healthz  /readyz  /metrics",
        "data": str(service.directory.path),
    }
    console.print(f"[bold]{app}[/bold] is running", highlight=False)
    for name, value in lines.items():
        console.print(f"  {name:<11}{value}", highlight=False, markup=False, soft_wrap=True)
    console.print("  stop it with Ctrl-C or SIGTERM", highlight=False)
    sys.stdout.flush()


@click.command(epilog=EXIT_CODES)
@click.argument("app")
@click.option("--json", "as_json", is_flag=True)
def check(app: str, as_json: bool) -> None:
    """Check an APP's declarations without starting anything, and list them.

    All problems are listed at once, each with its remedy.
    """
    try:
        loaded = load_app(app)
    except Exception as error:
        explain(error)
    listing = {
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
    if as_json:
        print_json(listing)
        return
    console.print(f"{loaded.name}: the declarations are fine", highlight=False)
    for declared in loaded.types.values():
        console.print(f"  {declared.name}", style="bold", highlight=False)
        console.print(f"    commands  {', '.join(sorted(declared.commands))}", highlight=False)
        console.print(f"    events    {', '.join(sorted(declared.events))}", highlight=False)
    for p in loaded.projections:
        console.print(f"  {p.name} ({p.kind} of {p.aggregate}, version {p.version})", highlight=False)
