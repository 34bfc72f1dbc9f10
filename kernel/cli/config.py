"""`eskernel config`: shows and checks the settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import asynchronous, explain, print_findings, print_json
from kernel.cli.exit_codes import FAILED
from kernel.cli.options import settings_options

if TYPE_CHECKING:
    from kernel.settings.sources import Loaded


@click.group()
def config() -> None:
    """Show the settings, check them against the running servers, or print their JSON schema."""


@config.command(epilog=EXIT_CODES)
@click.option("--changed", "only_changed", is_flag=True, help="Only the settings that are not defaults.")
@click.option("--json", "as_json", is_flag=True)
@settings_options
def show(only_changed: bool, as_json: bool, loaded: Loaded) -> None:
    """Print every setting's value and its origin. Secrets, and passwords in URLs, are masked."""
    from kernel.settings.sources import leaves, shown_value, value_of

    rows = []
    for name, _ in leaves():
        origins = [origin for key, origin in loaded.origins.items() if f"{key}.".startswith(f"{name}.")]
        origin = origins[0] if origins else "default"
        if origin != "default" or not only_changed:
            rows.append({"name": name, "value": shown_value(value_of(loaded.settings, name)), "origin": origin})
    if as_json:
        print_json(rows)
        return
    width = max((len(str(row["name"])) for row in rows), default=0)
    for row in rows:
        value = ", ".join(map(str, row["value"])) if isinstance(row["value"], list) else row["value"]
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        click.echo(f"{row['name']:<{width}}  {text or '-'}  ({row['origin']})")


@config.command()
def schema() -> None:
    """Print the JSON schema of the settings, for editors of the TOML file."""
    from kernel.settings import Settings

    print_json(Settings.model_json_schema())


@config.command(epilog=EXIT_CODES)
@click.argument("app")
@click.option("--json", "as_json", is_flag=True)
@settings_options
@asynchronous
async def check(app: str, as_json: bool, loaded: Loaded) -> None:
    """Check the settings for an APP on the running servers, without changing anything.

    Exits with 1 if a finding would prevent the service from starting or working.
    """
    from kernel.app import load_app
    from kernel.preflight import examine

    try:
        found = load_app(app)
    except Exception as error:
        explain(error)
    findings = await examine(found, loaded.settings)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(findings)
    if any(finding.level == "error" for finding in findings):
        sys.exit(FAILED)
