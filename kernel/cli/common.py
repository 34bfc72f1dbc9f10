"""What all commands share: finding the service, printing, and failing with a reason and an exit code."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import orjson
from rich.console import Console
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from aggregates.messages import plain
from kernel.app import App, load_app
from kernel.cli.exit_codes import exit_code_of
from kernel.client import Client
from kernel.packages import enter
from kernel.runtime.directory import find_running
from kernel.settings import Settings
from kernel.settings.sources import changed, load
from kernel.telemetry.logging import writes_json
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from projections.database import open_database

if TYPE_CHECKING:
    from kernel.preflight import Finding

logger = logging.getLogger("eskernel.cli")

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}

console = Console()
errors = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Target:
    """A running app, as the options or the data directory name it."""

    app: App
    settings: Settings

    @property
    def database(self) -> str | None:
        """URL of the projection database, if it is known."""
        return self.settings.database.url

    def engine(self, *, read_only: bool = False) -> Engine:
        """Open the projection database.

        Raises:
            click.UsageError: nobody has said where it is.
        """
        if self.database is None:
            raise click.UsageError("--nats needs --database too, the URL that the service was started with")
        return open_database(self.database, read_only=read_only, **self.settings.database.options())

    async def client(self) -> Client:
        """Connect to it."""
        return await Client.connect(self.app, self.settings)

    async def connection(self) -> NatsConnection:
        """Connect to its NATS server."""
        return await dial(self.settings, name=f"eskernel cli {self.app.name}")


@dataclass(frozen=True, slots=True)
class Where:
    """What the options say about which service is meant."""

    app: str | None
    data: Path | None
    config: Path | None
    nats: str | None
    database: str | None

    def find(self) -> Target:
        """Return the service that is meant.

        Raises:
            NotRunning, AppNotFound, SettingsError, click.UsageError: it can't be found; what to do.
        """
        given = {"data": self.data, "connection.servers": self.nats, "database.url": self.database}
        settings = load(self.config, {name: value for name, value in given.items() if value is not None}).settings
        app = self.app
        if not settings.embedded:
            if app is None or ":" not in app:
                raise click.UsageError("--nats, or servers in the settings, need --app package.module:variable")
            return Target(load_app(app), settings)
        loaded = load_app(app) if app is not None and ":" in app else None
        running = find_running(settings.data, loaded.name if loaded is not None else app)
        if loaded is None:
            enter(Path(running.directory))
            loaded = load_app(running.spec)
        found = running.as_settings()
        return Target(loaded, changed(found, {"database.url": self.database}) if self.database else found)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which service is meant; the command gets them as `where`."""

    @functools.wraps(command)
    def gathered(
        *args: Any,
        app: str | None,
        data: Path | None,
        config: Path | None,
        nats: str | None,
        database: str | None,
        **options: Any,
    ) -> Any:
        return command(*args, where=Where(app, data, config, nats, database), **options)

    added: Callable[..., Any] = gathered
    for option in (
        click.option(
            "--app", metavar="SPEC", help="The app, as package.module:variable; or the name of a running one."
        ),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="Data directory of the running service.  [default: .eskernel]",
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Settings of the service, where it is not one that runs here.  [default: eskernel.toml, if there]",
        ),
        click.option("--nats", metavar="URL", help="A NATS server, instead of the running service's; needs --app."),
        click.option("--database", metavar="URL", help="A projection database, instead of the running service's."),
    ):
        added = option(added)
    return added


def fail(message: str, code: int) -> NoReturn:
    """Print an error and exit."""
    if writes_json():
        logger.error("%s", message)
    else:
        errors.print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def explain(error: BaseException) -> NoReturn:
    """Exit with the error's own words, if it is one that users can cause; raise it again otherwise."""
    code = exit_code_of(type(error))
    if code is None:
        raise error
    text = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    fail(text.strip(), code)


def asynchronous(command: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Run an async command, and turn what users can cause into an error line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return asyncio.run(command(*args, **options))
        except (click.ClickException, SystemExit):
            raise
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            explain(error)

    return run


def print_json(value: object) -> None:
    """Print a value as JSON, indented for people, whole for programs."""
    click.echo(orjson.dumps(value, default=plain, option=orjson.OPT_INDENT_2).decode())


def print_findings(findings: Sequence[Finding]) -> None:
    """Print the results of checks, each with the action that helps."""
    for finding in findings:
        console.print(f"[{_STYLES[finding.level]}]{finding.level:<8}[/]", end="", highlight=False)
        console.print(f"{finding.what}: {finding.detail}", markup=False, highlight=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"{'':8}{finding.remedy}", markup=False, highlight=False, soft_wrap=True)
