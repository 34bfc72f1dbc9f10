"""`eskernel config`: what is set, and whether it works."""

from __future__ import annotations

import sys
from typing import Any

import click

from kernel.app import load_app
from kernel.cli import EXIT_CODES
from kernel.cli.common import asynchronous, console, explain, print_json
from kernel.cli.exit_codes import FAILED
from kernel.cli.options import settings_options
from kernel.preflight import Finding, examine
from kernel.settings import Settings
from kernel.settings.sources import Loaded, leaves, shown_value, value_of

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@click.group()
def config() -> None:
    """Show the settings, check them against the running servers, or print their JSON schema."""


@config.command(epilog=EXIT_CODES)
@click.option("--changed", "only_changed", is_flag=True, help="Only what is not a default.")
@click.option("--json", "as_json", is_flag=True)
@settings_options
def show(only_changed: bool, as_json: bool, loaded: Loaded) -> None:
    """Print every setting's value and where it comes from; secrets, and passwords in URLs, are masked."""
    rows = []
    for name, _ in leaves():
        origin = next((loaded.origins[one] for one in loaded.origins if f"{one}.".startswith(f"{name}.")), "default")
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
    print_json(Settings.model_json_schema())


@config.command(epilog=EXIT_CODES)
@click.argument("app")
@click.option("--json", "as_json", is_flag=True)
@settings_options
@asynchronous
async def check(app: str, as_json: bool, loaded: Loaded) -> None:
    """Try the settings for an APP on the running servers, without changing anything.

    Exits with 1 when something would keep the service from starting or working.
    """
    try:
        found = load_app(app)
    except Exception as error:
        explain(error)
    findings = await examine(found, loaded.settings)
    if as_json:
        print_json([_plain(one) for one in findings])
    else:
        for one in findings:
            console.print(f"[{_STYLES[one.level]}]{one.level:<8}[/]", end="", highlight=False)
            console.print(f"{one.what}: {one.told}", markup=False, highlight=False, soft_wrap=True)
            if one.remedy:
                console.print(f"{'':8}{one.remedy}", markup=False, highlight=False, soft_wrap=True)
    if any(one.level == "error" for one in findings):
        sys.exit(FAILED)


def _plain(one: Finding) -> dict[str, Any]:
    return {"level": one.level, "what": one.what, "told": one.told, "remedy": one.remedy}
