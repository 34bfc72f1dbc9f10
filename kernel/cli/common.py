"""What all commands share: finding the service, printing, and failing with a reason and an exit code."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click
import orjson
from rich.console import Console

from aggregates.messages import plain
from kernel.cli import INTERRUPTED
from kernel.cli.exit_codes import exit_code_of, exit_code_of_worker, is_database_error
from kernel.errors import WorkersFailed
from kernel.packages import enter

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from aggregates.commit import Envelope
    from kernel.app import App
    from kernel.client import Client
    from kernel.preflight import Finding
    from kernel.settings import Settings
    from kernel.transport.connection import NatsConnection

logger = logging.getLogger("eskernel.cli")

NO_DATABASE = "--nats needs --database too, the URL that the service was started with"
_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}

WIDE = 1_000
"""Columns of what is written to a file or a pipe: other programs read lines, and no line is broken for them."""


def _width(stream: TextIO) -> int | None:
    """Return how wide a stream is; None where the terminal, or the variable COLUMNS, says it."""
    return None if "COLUMNS" in os.environ or stream.isatty() else WIDE


console = Console(width=_width(sys.stdout))
errors = Console(stderr=True)


def told_of(event: Envelope) -> dict[str, Any]:
    """Return what the sender of an event's command has said, without what it has not."""
    said = {
        "actor": event.actor,
        "tenant": event.tenant,
        "metadata": event.metadata and dict(event.metadata),
        "occurred_at": event.occurred_at,
    }
    return {name: value for name, value in said.items() if value}


def spoken_of(event: Envelope) -> str:
    """Return the same for people; empty if nothing was said."""
    said = told_of(event)
    parts = [f"by {said['actor']}"] if "actor" in said else []
    parts += [f"for {said['tenant']}"] if "tenant" in said else []
    parts += [f"of {said['occurred_at']}"] if "occurred_at" in said else []
    parts += [f"{name}={value}" for name, value in said.get("metadata", {}).items()]
    return ", ".join(parts)


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
            click.UsageError: no option or setting has its URL.
        """
        from projections.database import open_database

        if self.database is None:
            raise click.UsageError(NO_DATABASE)
        return open_database(self.database, read_only=read_only, **self.settings.database.options())

    async def client(self) -> Client:
        """Connect to it."""
        from kernel.client import Client
        from kernel.settings.sources import changed
        from kernel.transport.inboxes import inbox_prefix

        # an operator's client reads the log: its answers are not for other clients
        prefix = inbox_prefix(self.app.name, self.settings, "operator")
        return await Client.connect(self.app, changed(self.settings, {"connection.inbox_prefix": prefix}))

    async def connection(self) -> NatsConnection:
        """Connect to its NATS server."""
        from kernel.transport.dial import dial

        return await dial(self.settings, app=self.app.name, role="operator", name=f"eskernel cli {self.app.name}")


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
        from kernel.app import load_app
        from kernel.runtime.running import find_running
        from kernel.settings.sources import changed

        settings = self._settings()
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

    def open_database(self) -> Engine:
        """Open the projection database of the service that is meant, for reading. Its app is not loaded.

        Raises:
            NotRunning, SettingsError, SchemaError, click.UsageError: it can't be found; what to do.
        """
        from projections.database import open_database

        url, options = self._running_database() if self._only_running() else self._configured_database()
        return open_database(self.database or url, read_only=True, **options)

    def _only_running(self) -> bool:
        """Return whether no settings are given, so that the service's own description says everything."""
        given = [name for name in os.environ if name.upper().startswith("ESKERNEL_") and name != "ESKERNEL_DATA"]
        return not (given or self.config or self.nats or os.path.lexists("eskernel.toml"))

    def _running_database(self) -> tuple[str, dict[str, Any]]:
        from kernel.runtime.running import find_running

        data = self.data or Path(os.environ.get("ESKERNEL_DATA") or ".eskernel")
        running = find_running(data, self.app)
        options = dict(running.settings.get("database", {}))
        return options.pop("url", running.database), options

    def _configured_database(self) -> tuple[str, dict[str, Any]]:
        from kernel.runtime.running import find_running

        settings = self._settings()
        if settings.embedded:
            settings = find_running(settings.data, self.app).as_settings()
        if settings.database.url is None:
            raise click.UsageError(NO_DATABASE)
        return settings.database.url, settings.database.options()

    def _settings(self) -> Settings:
        from kernel.settings.sources import load

        given = {"data": self.data, "connection.servers": self.nats, "database.url": self.database}
        return load(self.config, {name: value for name, value in given.items() if value is not None}).settings


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
    # only a command that has configured its logging can have chosen JSON
    logging_ = sys.modules.get("kernel.telemetry.logging")
    if logging_ is not None and logging_.writes_json():
        logger.error("%s", message)
    else:
        try:
            errors.print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
        except OSError:
            pass  # it can't be written; the exit code says that there was an error
    sys.exit(code)


def explain(error: BaseException) -> NoReturn:
    """Exit with the error's own words, if it is one that users can cause; raise it again otherwise."""
    code = exit_code_of_worker(error.kinds) if isinstance(error, WorkersFailed) else exit_code_of(type(error))
    if code is None:
        raise error
    text = str(getattr(error, "orig", error)) if is_database_error(type(error)) else str(error)
    fail(text.strip(), code)


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what users can cause into an error line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (click.ClickException, SystemExit):
            raise
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception as error:
            explain(error)

    return run


def asynchronous(command: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Run an async command, and turn what users can cause into an error line and an exit code."""

    @reported
    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        return asyncio.run(command(*args, **options))

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
