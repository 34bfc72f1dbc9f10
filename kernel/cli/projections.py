"""`eskernel projections`: the projections that the database has, and those that nothing keeps up to date."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED

if TYPE_CHECKING:
    from sqlalchemy import Engine


@click.group()
def projections() -> None:
    """List the projections of the database, drop one that the app no longer declares, or resume one that is paused."""


@projections.command("list", epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def list_(as_json: bool, where: Where) -> None:
    """List every projection of the database: its tables by generation, and whether the app declares it."""
    target = where.find()
    found = await asyncio.to_thread(_read, target, target.engine(read_only=True))
    if as_json:
        print_json(found)
        return
    for known in found:
        state = "" if known["declared"] else f", not in the app: eskernel projections drop {known['name']}"
        _line(f"{known['name']}{state}")
        for table in known["tables"]:
            live = ", live" if table["generation"] == known["live"] else ""
            _line(f"  {table['view']}: {table['table']} (generation {table['generation']}{live})")


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@target_options
@asynchronous
async def drop(name: str, where: Where) -> None:
    """Drop the projection NAME, which the app no longer declares: its views, its tables and its dead letters.

    It can be built again from the log, by an app that declares it.
    """
    from projections import schema

    target = where.find()
    engine = target.engine()
    dropped = await asyncio.to_thread(schema.drop_projection, engine, name, target.app.projections)
    engine.dispose()
    _line(
        f"{name} is dropped: views {', '.join(map(str, dropped.views)) or 'none'}; "
        f"tables {', '.join(dropped.tables) or 'none'}"
    )


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@target_options
@asynchronous
async def resume(name: str, where: Where) -> None:
    """Have the service fold the projection NAME again, which it has paused because too many aggregates failed.

    If they still fail, it is paused again. A start of the service does the same by itself.
    """
    from projections import checkpoints

    target = where.find()
    target.app.projection(name)
    engine = target.engine()
    live = await asyncio.to_thread(checkpoints.resume, engine, name)
    engine.dispose()
    if not live:
        fail(f"{name} has not been built; start the service, or rebuild the projection", FAILED)
    _line(f"{name} is folded again, from where it was paused")


def _read(target: Target, engine: Engine) -> list[dict[str, Any]]:
    from projections import schema
    from projections.database import reads
    from projections.generations import numbers, recorded

    declared = {known.name for known in target.app.projections}
    with reads(engine).connect() as connection:
        found = []
        for name in schema.names(connection):
            tables = [
                {"view": str(table.view), "table": table.physical, "generation": table.generation}
                for table in recorded(connection, name)
            ]
            live = numbers(connection, name, "live")
            found.append(
                {"name": name, "declared": name in declared, "live": live[0] if live else None, "tables": tables}
            )
    engine.dispose()
    return found


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
