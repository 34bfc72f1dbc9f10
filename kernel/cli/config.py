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
    from kernel.permissions import Kind
    from kernel.settings.sources import Loaded


KINDS: tuple[Kind, ...] = ("service", "client", "operator", "monitoring")
READERS = "read-only"


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
@click.argument("kinds", nargs=-1, type=click.Choice([*KINDS, READERS]), metavar="[KIND]...")
@click.option("--json", "as_json", is_flag=True)
@settings_options
def permissions(app: str, kinds: tuple[str, ...], as_json: bool, loaded: Loaded) -> None:
    """Print the permissions that an APP's users need on the NATS servers, as their configuration takes them.

    KIND is service, client, operator, monitoring or read-only; all of them unless given. Readers need an account of
    their own, which imports a part of JetStream's API from the service's account, called APP here.
    """
    from kernel.app import load_app
    from kernel.permissions import permissions_of, share_of

    try:
        found = load_app(app)
    except Exception as error:
        explain(error)
    settings = loaded.settings
    needed = {kind: permissions_of(kind, found, settings) for kind in KINDS if kind in (kinds or KINDS)}
    share = share_of(found, settings) if READERS in (kinds or (READERS,)) else None
    if as_json:
        print_json(
            {kind: permissions._asdict() for kind, permissions in needed.items()}
            | ({READERS: share._asdict()} if share is not None else {})
        )
        return
    for kind, permissions in needed.items():
        click.echo(f"# {kind}\npermissions: {permissions.as_config()}")
    if share is not None:
        click.echo(f"# {READERS}: an account with jetstream.api_prefix = {share.prefix!r}")
        click.echo(f"# of the account APP\nexports: [\n{share.as_exports()}\n]")
        click.echo(f"# of the readers' account\nimports: [\n{share.as_imports('APP')}\n]")


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
