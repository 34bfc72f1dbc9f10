"""Prints what a second fold of the log found out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernel.cli.common import console

if TYPE_CHECKING:
    from kernel.projector.verification import Verified
    from projections.comparison import RowDifference, TableComparison

SHOWN = 10
"""Rows of each table that are named."""


def print_verified(verified: Verified) -> None:
    """Print whether a projection's tables are what the log says, and the first rows that are not."""
    rate = verified.events / max(verified.seconds, 1e-9)
    rows = sum(table.rows for table in verified.tables)
    said = f"{verified.differing:,} rows differ" if verified.differing else f"all {rows:,} rows are what the log says"
    _line(
        f"{verified.projection} version {verified.version} (generation {verified.generation}): {said}, up to sequence "
        f"{verified.sequence} ({verified.events:,} events in {verified.seconds:.1f} s, {rate:,.0f} events/s)",
        "red" if verified.differing else "green",
    )
    for table in verified.tables:
        print_table(table)
    print_parked(verified, "fails, and did not before, at event")


def print_parked(verified: Verified, how: str) -> None:
    """Print at which aggregates the program fails."""
    for parked in verified.parked[:SHOWN]:
        _line(f"  {parked.aggregate} {parked.aggregate_id} {how} {parked.sequence}: {parked.error}", "yellow")
    if len(verified.parked) > SHOWN:
        _line(f"  ... {len(verified.parked) - SHOWN:,} more aggregates")


def print_table(table: TableComparison, *, rehearsal: bool = False) -> None:
    """Print how a table differs.

    Args:
        rehearsal: the other table is what another program would make: no fault is implied.
    """
    if not table.differing:
        return
    kinds = {"changed": table.changed, "missing": table.missing, "only in the table": table.extra}
    if rehearsal:
        kinds = {"changed": table.changed, "new": table.missing, "gone": table.extra}
    counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
    columns = ", ".join(f"{name} {count:,}" for name, count in table.columns.items())
    _line(f"  {table.view}: {counted} of {table.rows:,} rows" + (f"; by column: {columns}" if columns else ""))
    for difference in table.examples[:SHOWN]:
        _line(f"    {describe(difference, rehearsal=rehearsal)}")
    if table.differing > min(SHOWN, len(table.examples)):
        _line(f"    ... {table.differing - min(SHOWN, len(table.examples)):,} more")


def describe(difference: RowDifference, *, rehearsal: bool = False) -> str:
    """Return one line for a row that differs."""
    key = ", ".join(f"{name} {value}" for name, value in difference.key.items()) or "a row"
    since = f", since event {difference.since}" if difference.since else ""
    if difference.what == "missing":
        return f"{key} is {'new' if rehearsal else 'missing'}{since}: {_values(difference.folded)}"
    if difference.what == "extra":
        gone = "is gone" if rehearsal else "is in the table, and the log does not lead to it"
        return f"{key} {gone}: {_values(difference.stored)}"
    other = "becomes" if rehearsal else "by the log"
    parts = [f"{name} is {old!r}, {other} {difference.folded[name]!r}" for name, old in difference.stored.items()]
    never = "" if rehearsal else ", no event gives what is stored"
    return f"{key}: {'; '.join(parts)}{since or never}"


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items())


def _line(text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
