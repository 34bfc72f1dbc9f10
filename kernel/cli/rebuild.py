"""`eskernel rebuild`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, print_json, target_options
from kernel.cli.progress import progress_bar

if TYPE_CHECKING:
    from kernel.projector.rebuild import Rebuilt
    from projections.repair import Repaired

LOOK_AGAIN_S = 0.5
"""Between two looks at a worker that uses another database: it may be dead."""


@click.command(epilog=EXIT_CODES)
@click.argument("projection", required=False)
@click.option("--all", "everything", is_flag=True, help="Every projection of the app, in one pass over the log.")
@click.option("--aggregate", metavar="TYPE/ID", help="Only the rows of one aggregate, of PROJECTION or of all.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def rebuild(projection: str | None, everything: bool, aggregate: str | None, as_json: bool, where: Where) -> None:
    """Rebuild a PROJECTION's tables from the log, while the service runs.

    \b
    eskernel rebuild Balances
    eskernel rebuild --all
    eskernel rebuild --aggregate Account/alice

    The new tables are filled beside the live ones. Then the view moves to the new tables in one transaction. If the
    rebuild fails or is stopped, nothing has changed.

    The rebuild reads at the rate of the service's rebuild lane, which is slowed while the live projections are in
    distress: see `eskernel limits`.
    """
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.partitions.bucket import bucket_of
    from kernel.partitions.databases import check_database
    from kernel.projector.rebuild import Rebuild, clean_up
    from projections import SchemaError
    from projections.identity import read_identity

    if aggregate is not None:
        if everything:
            raise click.UsageError("give --all, or --aggregate")
        await _repair(aggregate, projection, as_json, where)
        return
    if bool(projection) == everything:
        raise click.UsageError("give a projection, --all, or --aggregate TYPE/ID")
    target = where.find()
    wanted = target.app.projections if everything else [target.app.projection(projection or "")]
    if not wanted:
        raise SchemaError(f"{target.app.name} has no projections")
    engine = target.engine()
    subjects = subjects_of(target.app.name, target.settings)
    async with (
        await target.client() as client,
        following(client.connection, subjects, target.settings.rates.rebuild) as pace,
    ):
        database = await asyncio.to_thread(read_identity, engine)
        await check_database(client.connection, bucket_of(client.log.stream), database, wait=LOOK_AGAIN_S)
        with progress_bar(", ".join(declared.name for declared in wanted), quiet=as_json) as show:
            limits = target.settings.dead_letters
            done = await Rebuild(target.app, client.log, engine, wanted, show, pace, limits).run()
        for declared in wanted:
            await asyncio.to_thread(clean_up, engine, declared)
    for built in [] if as_json else done:
        _print(built)
    engine.dispose()
    if as_json:
        print_json(done)


async def _repair(aggregate: str, projection: str | None, as_json: bool, where: Where) -> None:
    from kernel.projector.repairing import repair_aggregate

    type_name, slash, aggregate_id = aggregate.partition("/")
    if not slash or not aggregate_id:
        raise click.UsageError(f"--aggregate {aggregate!r}: give it as TYPE/ID, such as Account/alice")
    target = where.find()
    engine = target.engine()
    async with await target.client() as client:
        done = await repair_aggregate(target.app, client.log, engine, type_name, aggregate_id, projection)
    engine.dispose()
    if as_json:
        print_json(done)
        return
    for repaired in done:
        _print_repaired(repaired)


def _print_repaired(repaired: Repaired) -> None:
    what = "is made again" if repaired.exists else "has no row"
    was = "it was not what the log says" if repaired.changed else "as it was"
    console.print(
        f"{repaired.projection}: {repaired.aggregate} {repaired.aggregate_id} {what}, up to event "
        f"{repaired.sequence}: {was}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print(built: Rebuilt) -> None:
    console.print(
        f"{built.projection}: generation {built.generation} is live, {built.events:,} events in {built.seconds:.1f} s "
        f"({built.events / max(built.seconds, 1e-9):,.0f} events/s), up to sequence {built.sequence}",
        highlight=False,
        soft_wrap=True,
    )
    if built.parked:
        console.print(
            f"  {built.parked} aggregates are parked; see `eskernel dead-letters list`", style="yellow", highlight=False
        )
