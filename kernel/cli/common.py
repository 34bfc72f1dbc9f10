"""What all commands share: finding the service, printing, and failing with a reason and an exit code."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import orjson
from rich.console import Console
from sqlalchemy.exc import DBAPIError

from aggregates import DeclarationError, InvalidId, InvalidMessage, Rejected
from aggregates.messages import plain
from kernel.app import App, AppNotFound, load_app
from kernel.client import Client, QueryTimeout
from kernel.log import LogError
from kernel.messages import CommandError
from kernel.runtime import AlreadyRunning, NotRunning, WorkersFailed, find_running
from kernel.settings import DEFAULT_DATA
from projections import SchemaError
from projections.dead_letters import NoSuchLetter

F = TypeVar("F", bound=Callable[..., Any])
FAILED, USAGE, UNREACHABLE = 1, 2, 3

console = Console()
errors = Console(stderr=True)

_CODES: list[tuple[tuple[type[BaseException], ...], int]] = [
    ((Rejected, CommandError, NoSuchLetter), FAILED),
    ((AppNotFound, DeclarationError, InvalidId, InvalidMessage, KeyError), USAGE),
    ((WorkersFailed,), UNREACHABLE),
    ((NotRunning, AlreadyRunning, ConnectionError, LogError, TimeoutError, QueryTimeout), UNREACHABLE),
    ((SchemaError, DBAPIError, OSError), FAILED),
]


@dataclass(frozen=True, slots=True)
class Target:
    """A running app, as the options or the data directory name it."""

    app: App
    nats: str
    database: str | None

    async def client(self) -> Client:
        """Connect to it."""
        return await Client.connect(self.app, nats=self.nats, database=self.database)


def target_options(command: F) -> F:
    """Add the options that say which service is meant."""
    for option in (
        click.option(
            "--app", metavar="SPEC", help="The app, as package.module:variable; or the name of a running one."
        ),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            default=DEFAULT_DATA,
            show_default=True,
            help="Data directory of the running service.",
        ),
        click.option("--nats", metavar="URL", help="A NATS server, instead of the running service's; needs --app."),
        click.option("--database", metavar="URL", help="A projection database, instead of the running service's."),
    ):
        command = option(command)
    return command


def find_target(app: str | None, data: Path, nats: str | None, database: str | None) -> Target:
    """Return the service that the options mean."""
    if nats is not None:
        if app is None or ":" not in app:
            raise click.UsageError("--nats needs --app package.module:variable")
        return Target(load_app(app), nats, database)
    loaded = load_app(app) if app is not None and ":" in app else None
    running = find_running(data, loaded.name if loaded is not None else app)
    if loaded is None:
        sys.path.insert(0, running.directory)
        loaded = load_app(running.spec)
    return Target(loaded, running.nats, database or running.database)


def fail(message: str, code: int) -> NoReturn:
    """Print an error and exit."""
    errors.print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def explain(error: BaseException) -> NoReturn:
    """Exit with the error's own words, if it is one that users can cause; raise it again otherwise."""
    for kinds, code in _CODES:
        if isinstance(error, kinds):
            text = str(error.orig) if isinstance(error, DBAPIError) else str(error)
            fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else text.strip(), code)
    raise error


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
