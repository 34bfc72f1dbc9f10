"""The options of commands that take settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kernel.cli.common import explain
from kernel.errors import SettingsError
from kernel.settings.sources import leaves, load, parse_assignment

_OPTIONS: list[tuple[str, str, str, click.Choice[str] | None]] = [
    ("--data", "data", "DIRECTORY", None),
    ("--nats", "connection.servers", "URL", None),
    ("--database", "database.url", "URL", None),
    ("--workers", "workers", "N", None),
    ("--partitions", "stream.partitions", "N", None),
    ("--replicas", "stream.replicas", "N", None),
    ("--group-commit", "jetstream.group_commit", "", click.Choice(["auto", "always", "never"])),
    ("--host", "http.host", "ADDRESS", None),
    ("--port", "http.port", "PORT", None),
    ("--max-actors", "passivation.count", "N", None),
    ("--idle", "passivation.idle", "SECONDS", None),
    ("--max-commands", "commands.pending", "N", None),
    ("--lease", "lease", "SECONDS", None),
    ("--retry-after", "dead_letters.retry_after", "SECONDS", None),
    ("--retries", "dead_letters.retries", "N", None),
    ("--drain", "drain", "SECONDS", None),
    ("--log-level", "logging.level", "", click.Choice(["debug", "info", "warning", "error"])),
    ("--log-format", "logging.format", "", click.Choice(["text", "json"])),
]
"""Options that set a setting; `--set` sets any setting."""


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for settings. The command gets the settings as `loaded`."""

    @functools.wraps(command)
    def gathered(*args: Any, config: Path | None, assignments: tuple[str, ...], **options: Any) -> Any:
        given = {}
        for _, name, _, _ in _OPTIONS:
            if (value := options.pop(name.replace(".", "_"))) is not None:
                given[name] = value
        if options.pop("sync"):
            given["stream.sync"] = True
        try:
            loaded = load(config, given | dict(map(parse_assignment, assignments)))
        except SettingsError as error:
            explain(error)
        return command(*args, loaded=loaded, **options)

    added: Callable[..., Any] = gathered
    fields = dict(leaves())
    added = click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any setting, such as stream.max_bytes=10GiB."
    )(added)
    added = click.option("--sync", is_flag=True, help="Embedded server: acknowledge a commit only when it is on disk.")(
        added
    )
    for option, name, metavar, kind in reversed(_OPTIONS):
        described = (fields[name].description or "").replace("\n", " ").split(". ")[0].rstrip(".")
        default = fields[name].default
        shown = f"  [default: {default}]" if default not in (None, ()) else ""
        added = click.option(
            option, name.replace(".", "_"), type=kind, metavar=metavar or None, help=f"{described}.{shown}"
        )(added)
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help="TOML file with settings.  [default: eskernel.toml, if it exists]",
    )(added)
