"""`eskernel rebuild`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, errors, print_json, target_options

if TYPE_CHECKING:
    from rich.progress import Progress

    from kernel.projector.rebuild import RebuildProgress, Rebuilt

LOOK_AGAIN_S = 0.5
"""Between two looks at a worker that uses another database: it may be dead."""


@click.command(epilog=EXIT_CODES)
@click.argument("projection", required=False)
@click.option("--all", "everything", is_flag=True, help="Every projection of the app, in one pass over the log.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def rebuild(projection: str | None, everything: bool, as_json: bool, where: Where) -> None:
    """Rebuild a PROJECTION's tables from the log, while the service runs.

    The new tables are filled beside the live ones. Then the view moves to the new tables in one transaction. If the
    rebuild fails or is stopped, nothing has changed.

    The rebuild reads at the rate of the service's rebuild lane, which is slowed while the live projections are in
    distress: see `eskernel limits`.
    """
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.partitions.databases import check_database
    from kernel.partitions.leases import bucket_of
    from kernel.projector.rebuild import Rebuild, clean_up
    from projections import SchemaError
    from projections.identity import read_identity

    if bool(projection) == everything:
        raise click.UsageError("give a projection, or --all")
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
        with _bar(as_json) as bar:
            task = bar.add_task(", ".join(declared.name for declared in wanted), total=None, rate="")

            def show(step: RebuildProgress) -> None:
                rate = f"{step.events / max(step.seconds, 1e-9):,.0f} events/s"
                bar.update(task, completed=step.done, total=step.total, rate=rate)

            done = await Rebuild(target.app, client.log, engine, wanted, show, pace).run()
        for declared in wanted:
            await asyncio.to_thread(clean_up, engine, declared)
    for built in [] if as_json else done:
        _print(built)
    engine.dispose()
    if as_json:
        print_json(done)


def _bar(quiet: bool) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=errors,
        disable=quiet,
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
