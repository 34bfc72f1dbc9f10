"""`eskernel query`."""

from __future__ import annotations

import csv
import sys
from typing import Any

import click
from rich.table import Table

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, console, print_json, reported, target_options

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
