"""`eskernel query` and `eskernel show`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click
import orjson
from rich.table import Table

from aggregates.cell import Cell
from aggregates.commit import Envelope, decode
from aggregates.errors import InvalidMessage, NewerEvent, SequenceError
from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, fail, print_json, reported, target_options
from kernel.cli.exit_codes import FAILED

MAX_BYTES_SHOWN = 60


@click.command(epilog=EXIT_CODES)
@click.argument("sql")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as a JSON array of objects.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the rows as CSV with a header.")
@target_options
@reported
def query(sql: str, as_json: bool, as_csv: bool, where: Where) -> None:
    """Run an SQL query on the projection database. The query can't change data.

    \b
    eskernel query "select * from balances order by cents desc limit 10"
    """
    from projections.queries import run_query

    engine = where.open_database()
    rows = run_query(engine, sql)
    engine.dispose()
    if as_json:
        print_json(rows)
    elif as_csv:
        writer = csv.writer(sys.stdout)
        if rows:
            writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    else:
        console.print(_table(rows) if rows else "no rows")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        text = value.decode(errors="replace")
        return text if len(text) <= MAX_BYTES_SHOWN else f"{text[:MAX_BYTES_SHOWN]}... ({len(value)} bytes)"
    return "" if value is None else str(value)


@click.command(epilog=EXIT_CODES)
@click.argument("aggregate")
@click.argument("id")
@click.option("--history", is_flag=True, help="Print the events too.")
@click.option("--at", metavar="SEQ|TIME", help="State after an event (1, 2, ...), or at an ISO 8601 time (UTC).")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def show(aggregate: str, id: str, history: bool, at: str | None, as_json: bool, where: Where) -> None:
    """Print an aggregate's state, folded from the log. With --at, print its state at that event or time.

    \b
    eskernel show Account alice --history
    eskernel show Account alice --at 3
    eskernel show Account alice --at 2026-01-31T12:00
    """
    target = where.find()
    declared = target.app.type_of(aggregate)
    until = _until(at)
    async with await target.client() as client:
        stored = await client.log.read_subject(client.log.subjects.address(aggregate, id).subject)
    if not stored:
        fail(f"{aggregate} {id!r} has no events", FAILED)
    cell = Cell(declared, id)
    events: list[dict[str, Any]] = []
    for commit in stored:
        try:
            envelopes = [envelope for envelope in decode(commit.payload) if until(envelope)]
            cell.replay(envelopes, commit.sequence)
        except NewerEvent as error:
            fail(f"{aggregate} {id!r}: {error}. Up to event {cell.version}: --at {cell.version}", FAILED)
        except (SequenceError, InvalidMessage) as error:
            sound = (
                f"up to event {cell.version} it is sound: --at {cell.version}"
                if cell.version
                else "it has no beginning"
            )
            fail(f"the history is damaged at stream sequence {commit.sequence}: {error}; {sound}", FAILED)
        events += [_event(envelope, commit.sequence) for envelope in envelopes]
    if not events:
        first = decode(stored[0].payload)[0].time
        fail(f"{aggregate} {id!r} had no events at {at}; its first event happened at {first}", FAILED)
    state = {name: value for name, value in vars(cell.state).items() if name != "id"}
    if as_json:
        print_json({"aggregate": aggregate, "id": id, "version": cell.version, "state": state}
                   | ({"events": events} if history else {}))  # fmt: skip
        return
    console.print(f"{aggregate} {id}, version {cell.version}", style="bold", highlight=False, markup=False)
    for name, value in state.items():
        console.print(f"  {name} = {value!r}", highlight=False, markup=False)
    if history:
        for event in events:
            data = orjson.dumps(event["data"]).decode()
            console.print(
                f"  {event['sequence']:>6}  {event['time'][:23]}  {event['type']} {data}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _event(envelope: Envelope, stream_sequence: int) -> dict[str, Any]:
    return {
        "sequence": envelope.sequence,
        "stream_sequence": stream_sequence,
        "time": envelope.time,
        "type": envelope.type,
        "command_id": envelope.commandid,
        "data": orjson.loads(bytes(envelope.data)),
    }


def _until(at: str | None) -> Callable[[Envelope], bool]:
    """Return a function that tests whether an event is included in the state at that sequence or time."""
    if at is None:
        return lambda _: True
    if at.isdigit():
        return lambda envelope: envelope.sequence <= int(at)
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise click.UsageError(f"--at {at!r} is neither a sequence nor an ISO 8601 time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return lambda envelope: datetime.fromisoformat(envelope.time) <= moment
