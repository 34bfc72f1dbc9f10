"""`eskernel rehearse`: what a new program would do to the tables, before it is deployed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.comparisons import print_parked, print_table
from kernel.cli.exit_codes import FAILED
from kernel.cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernel.client import Client
    from kernel.governance.pace import Pace
    from kernel.projector.replay import RebuildProgress
    from kernel.projector.states import Comparison
    from kernel.projector.verification import Verified


@click.command(epilog=EXIT_CODES)
@click.argument("program", metavar="NEW:APP")
@click.option(
    "--projection", "names", multiple=True, metavar="NAME", help="Only this projection; repeat the option for more."
)
@click.option(
    "--expect",
    metavar="same|changed:COLUMN,...",
    help="Fail if more than this differs: nothing, or these columns (COLUMN or TABLE.COLUMN).",
)
@click.option(
    "--save-states",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Only write digests of all aggregates' states to this file: with the old program.",
)
@click.option(
    "--compare-states",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Compare the aggregates' states too, with those of the old program in this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def rehearse(
    program: str,
    names: tuple[str, ...],
    expect: str | None,
    save_states: Path | None,
    compare_states: Path | None,
    as_json: bool,
    where: Where,
) -> None:
    """Replay the log through the program NEW:APP, and compare the result with the tables that readers see now.

    The service goes on, and nothing is touched: the new program fills temporary tables, up to the place where the live
    tables are. Rows and columns that differ are counted and shown, and so are aggregates at which the new program fails
    and events that it can't read. Columns that only one of the programs has are named, and not compared.

    The command exits with 1 if the new program fails at an aggregate, or if more differs than --expect allows. Without
    --expect, rows may differ.

    The states of aggregates are compared after each event, where the old program has saved theirs: with
    --expect same, none may differ.

    \b
    eskernel rehearse bank:app
    eskernel rehearse bank:app --expect same
    eskernel rehearse bank:app --expect changed:balances.cents --json
    eskernel rehearse old_bank:app --save-states states.gz    then: rehearse bank:app --compare-states states.gz
    """
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.projector.verification import Verification

    allowed = _allowed(expect)
    target = replace(where, app=program).find()
    if save_states is not None:
        if compare_states is not None:
            raise click.UsageError("give --save-states with the old program, and --compare-states with the new one")
        await _save_states(target, save_states, as_json)
        return
    wanted = [target.app.projection(name) for name in dict.fromkeys(names)] or target.app.projections
    if not wanted:
        fail(f"{target.app.name} has no projections", FAILED)
    engine = target.engine()
    subjects, lane = subjects_of(target.app.name, target.settings), target.settings.rates.rebuild
    async with await target.client() as client, following(client.connection, subjects, lane) as pace:
        with progress_bar("rehearsing", quiet=as_json) as show:
            found = await Verification(target.app, client.log, engine, wanted, show, pace, same=False).run()
            states = None
            if compare_states is not None:
                states = await _compare_states(target, client, compare_states, show, pace)
    engine.dispose()
    problems = [problem for each in found for problem in _problems(each, allowed)]
    if states is not None:
        problems += _state_problems(states, allowed)
    if as_json:
        print_json({"projections": found, "states": states, "problems": problems})
    else:
        for each in found:
            _print(each)
        if states is not None:
            _print_states(states)
        for problem in problems:
            _line(problem, "red")
    if problems:
        sys.exit(FAILED)


async def _save_states(target: Target, path: Path, quiet: bool) -> None:
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.projector.states import digest_states, save

    subjects, lane = subjects_of(target.app.name, target.settings), target.settings.rates.rebuild
    async with await target.client() as client, following(client.connection, subjects, lane) as pace:
        with progress_bar("digesting", quiet=quiet) as show:
            states = await digest_states(target.app, client.log, show, pace)
    save(states, path)
    if quiet:
        print_json({"aggregates": len(states.digests), "failures": len(states.failures), "sequence": states.sequence})
    else:
        _line(f"{path}: the states of {len(states.digests):,} aggregates up to sequence {states.sequence}")


async def _compare_states(
    target: Target, client: Client, path: Path, show: Callable[[RebuildProgress], None], pace: Pace
) -> Comparison:
    from kernel.projector.states import compare_states, digest_states, load

    try:
        before = load(path, target.app.name)
    except ValueError as error:
        fail(str(error), FAILED)
    return compare_states(before, await digest_states(target.app, client.log, show, pace, before.sequence))


def _state_problems(states: Comparison, allowed: set[str] | None) -> list[str]:
    failed = [parting for parting in states.examples if parting.error]
    problems = [
        f"the new program does not fold {parting.aggregate} {parting.aggregate_id} from event {parting.sequence} on: "
        f"{parting.error}"
        for parting in failed[:1]
    ]
    if allowed is not None and not allowed and states.differing:
        problems.append(f"not expected: the states of {states.differing:,} aggregates differ")
    return problems


def _print_states(states: Comparison) -> None:
    _line(f"states: {states.same:,} aggregates are the same after each event, {states.differing:,} differ", "bold")
    for parting in states.examples:
        why = f": {parting.error}" if parting.error else ""
        _line(f"  {parting.aggregate} {parting.aggregate_id}: from event {parting.sequence} on{why}")


def _allowed(expect: str | None) -> set[str] | None:
    """Return the columns that may differ; None: all, and rows may be more or fewer."""
    if expect is None:
        return None
    if expect == "same":
        return set()
    kind, colon, columns = expect.partition(":")
    named = {name.strip() for name in columns.split(",")} - {""}
    if kind != "changed" or not colon or not named:
        raise click.UsageError(f"--expect {expect!r}: give `same`, or columns as in changed:total,name")
    return named


def _problems(found: Verified, allowed: set[str] | None) -> list[str]:
    """Return a sentence for each thing that must not be."""
    problems = []
    if found.parked:
        first = found.parked[0]
        problems.append(
            f"{found.projection}: the new program does not fold {len(found.parked):,} aggregates to the end, such as "
            f"{first.aggregate} {first.aggregate_id} from event {first.sequence} on: {first.error}"
        )
    if allowed is None:
        return problems
    for table in found.tables:
        more = [name for name in table.columns if name not in allowed and f"{table.view}.{name}" not in allowed]
        if more:
            problems.append(f"{table.view}: not expected to change: {', '.join(more)}")
        if table.missing or table.extra:
            problems.append(
                f"{table.view}: not expected: {table.missing:,} rows more and {table.extra:,} rows fewer than now"
            )
    return problems


def _print(found: Verified) -> None:
    rate = found.events / max(found.seconds, 1e-9)
    now = f"readers see version {found.live_version}" if found.live_version else "not built yet"
    _line(
        f"{found.projection} version {found.version} ({now}): {found.events:,} events in {found.seconds:.1f} s "
        f"({rate:,.0f} events/s), up to sequence {found.sequence}",
        "bold",
    )
    for table in found.tables:
        if not found.live_version:
            _line(f"  {table.view}: {table.folded:,} rows")
            continue
        if not table.differing:
            _line(f"  {table.view}: all {table.rows:,} rows are the same", "green")
        print_table(table, rehearsal=True)
        if table.added:
            _line(f"    columns that it adds: {', '.join(table.added)}")
        if table.removed:
            _line(f"    columns that it no longer has: {', '.join(table.removed)}")
    print_parked(found, "is not folded from event")


def _line(text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
