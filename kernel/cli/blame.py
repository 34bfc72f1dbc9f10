"""`eskernel blame`: the events that have made a row what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import orjson

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, errors, fail, print_json, spoken_of, target_options, told_of
from kernel.cli.exit_codes import FAILED

if TYPE_CHECKING:
    from kernel.projector.row_history import RowStep


@click.command(epilog=EXIT_CODES)
@click.argument("table")
@click.argument("key", nargs=-1, required=True)
@click.option("--column", metavar="NAME", help="Only events that changed this column.")
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the last N of them.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def blame(
    table: str, key: tuple[str, ...], column: str | None, last: int | None, as_json: bool, where: Where
) -> None:
    """Print the events that have made a row, in order: what each changed, and the command that led to it.

    TABLE belongs to a Rows or a Tallies projection, and KEY is the row's primary key: a value for each of its columns.
    For a row of Tallies the whole log is read.

    \b
    eskernel blame balances alice
    eskernel blame balances alice --column cents --last 5
    eskernel blame delays UA 2013-01-31 --json
    """
    from kernel.projector import blaming

    target = where.find()
    engine = target.engine(read_only=True)
    async with await target.client() as client:
        with errors.status(f"reading the events of {table} {' '.join(key)}") as status:

            def show(done: int, total: int) -> None:
                status.update(f"{done:,} of {total:,} commits read")

            steps = await blaming.blame(target.app, client.log, engine, table, key, show)
    engine.dispose()
    if not steps:
        fail(f"no event has changed a row {' '.join(key)} of {table}", FAILED)
    if column is not None:
        if not any(column in step.changed for step in steps):
            known = sorted({name for step in steps for name in step.changed})
            fail(f"no event has changed {table}.{column} in that row; changed were {', '.join(known)}", FAILED)
        steps = [step for step in steps if column in step.changed]
    steps = steps[-last:] if last else steps
    if as_json:
        print_json([_as_json(step) for step in steps])
        return
    for step in steps:
        _print(step, column)


def _as_json(step: RowStep) -> dict[str, Any]:
    event = step.event
    return {
        "aggregate": step.aggregate[0],
        "aggregate_id": step.aggregate[1],
        "sequence": event.sequence,
        "stream_sequence": step.stream_sequence,
        "time": event.time,
        "type": event.type,
        "event_id": event.id,
        "command_id": event.commandid,
        "correlation_id": event.correlation_id or event.commandid,
        **told_of(event),
        "data": orjson.loads(bytes(event.data)),
        "changed": {name: {"before": before, "after": after} for name, (before, after) in step.changed.items()},
        "error": step.error,
    }


def _print(step: RowStep, column: str | None) -> None:
    event = step.event
    shown = {name: values for name, values in step.changed.items() if column in (None, name)}
    changes = ", ".join(f"{name} {before!r} -> {after!r}" for name, (before, after) in shown.items())
    what = f"is not folded: {step.error}" if step.error else changes
    console.print(
        f"{event.time[:23]}  {step.aggregate[0]} {step.aggregate[1]} event {event.sequence}  {event.type}",
        highlight=False,
        markup=False,
        soft_wrap=True,
        style="red" if step.error else "",
    )
    console.print(f"    {what}", highlight=False, markup=False, soft_wrap=True)
    origin = f"command {event.commandid}"
    if event.correlation_id not in (None, event.commandid):
        origin += f", correlation {event.correlation_id}"
    if said := spoken_of(event):
        origin += f", {said}"
    console.print(f"    {origin}", style="dim", highlight=False, markup=False, soft_wrap=True)
