"""`eskernel projections`: the projections that the database has, their versions, and what is done with them."""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.comparisons import print_table, print_verified
from kernel.cli.exit_codes import FAILED
from kernel.cli.prepare import prepare as prepare_command
from kernel.cli.progress import progress_bar
from kernel.cli.rebuild import rebuild as rebuild_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Engine

    from projections.declaration import DeclaredProjection


@click.group()
def projections() -> None:
    """List the projections of the database and their versions; build, verify, roll back, pause or drop one."""


@projections.command("list", epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def list_(as_json: bool, where: Where) -> None:
    """List every projection of the database: its versions, their tables, and which one readers see."""
    found = await asyncio.to_thread(_read, where.find())
    if as_json:
        print_json(found)
        return
    for known in found:
        _line(_title(known))
        for made in known["generations"]:
            _line(f"  {_sentence(made)}")
            for table in made["tables"]:
                _line(f"    {table['view']}: {table['table']}")


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def show(name: str, as_json: bool, where: Where) -> None:
    """Show one projection: its versions, how far each is, who keeps it up to date, and what is being built."""
    from kernel.cli.status import survey_workers

    target = where.find()
    known = next((each for each in await asyncio.to_thread(_read, target) if each["name"] == name), None)
    if known is None:
        fail(f"the database has no projection {name!r}; `eskernel projections list` lists them", FAILED)
    workers = (await survey_workers(target))["workers"]
    for made in known["generations"]:
        made["kept_by"] = [
            each["worker"] for each in workers if each["deployment"]["declares"].get(name) == made["version"]
        ]
    builds = [each["deployment"]["build"] for each in workers if each["deployment"]["build"]]
    known["builds"] = [build for build in builds if name in build["projections"]]
    if as_json:
        print_json(known)
        return
    _line(_title(known))
    for made in known["generations"]:
        _line(f"  {_sentence(made)}")
        followed = made["state"] != "building"
        if followed:
            _line(f"    kept up to date by {', '.join(made['kept_by']) or 'no service: no running one declares it'}")
        for table in made["tables"]:
            _line(f"    {table['view']}: {table['table']}")
        if made["dead_letters"]:
            _line(f"    {made['dead_letters']} dead letters: eskernel dead-letters list {name}")
    for build in known["builds"]:
        _line(f"  {build['told']}")


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@click.option("--version", type=int, help="Only this version, which readers don't see.")
@click.option("--as", "view", metavar="TABLE", help="Only this frozen table; see `eskernel projections build`.")
@target_options
@asynchronous
async def drop(name: str, version: int | None, view: str | None, where: Where) -> None:
    """Drop the projection NAME, which the app no longer declares: its views, its tables and its dead letters.

    It can be built again from the log, by an app that declares it. With --version only the tables of a version are
    dropped that readers don't see: an earlier one, or one that `eskernel prepare` has built.
    """
    from projections import freezing, schema

    if version is not None and view is not None:
        raise click.UsageError("give --version, or --as")
    target = where.find()
    engine = target.engine()
    if view is not None:
        dropped_names = await asyncio.to_thread(freezing.drop_frozen, engine, name, view)
        _line(f"{' and '.join(dropped_names)} are dropped")
    elif version is None:
        dropped = await asyncio.to_thread(schema.drop_projection, engine, name, target.app.projections)
        _line(
            f"{name} is dropped: views {', '.join(map(str, dropped.views)) or 'none'}; "
            f"tables {', '.join(dropped.tables) or 'none'}"
        )
    else:
        tables = await asyncio.to_thread(schema.drop_version, engine, name, version, target.app.projections)
        _line(f"version {version} of {name} is dropped: tables {', '.join(tables)}")
    engine.dispose()


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@click.option("--at", required=True, metavar="SEQ|TIME", help="Up to this stream sequence, or ISO 8601 time (UTC).")
@click.option("--as", "view", required=True, metavar="TABLE", help="Name under which it is queried.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def build(name: str, at: str, view: str, as_json: bool, where: Where) -> None:
    """Build the table of projection NAME as it was: folded from the log up to a moment, beside the live one.

    It never changes afterwards. The handlers are those of the app as it is now. It is listed, and dropped with
    `eskernel projections drop NAME --as TABLE`.

    \b
    eskernel projections build Balances --at 2026-01-31T23:59:59 --as balances_2026_01
    eskernel projections build Balances --at 120000 --as balances_before_the_incident
    eskernel query "select * from balances_2026_01"
    """
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.projector.freezing import freeze

    target = where.find()
    declared = target.app.projection(name)
    engine = target.engine()
    subjects, lane = subjects_of(target.app.name, target.settings), target.settings.rates.rebuild
    async with await target.client() as client, following(client.connection, subjects, lane) as pace:
        with progress_bar(view, quiet=as_json) as show_progress:
            frozen = await freeze(target.app, client.log, engine, declared, view, _moment(at), show_progress, pace)
    engine.dispose()
    if as_json:
        print_json(frozen)
        return
    _line(
        f"{frozen.view} is {frozen.projection} as of sequence {frozen.sequence}: {frozen.events:,} events in "
        f"{frozen.seconds:.1f} s"
    )


def _moment(text: str) -> int | datetime:
    if text.isdigit():
        return int(text)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(f"--at {text!r}: give a stream sequence, or a time such as 2026-01-31T12:00") from None


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@target_options
@asynchronous
async def pause(name: str, where: Where) -> None:
    """Have the service leave the projection NAME as it is, until `eskernel projections resume`.

    Readers go on seeing it, and the other projections go on. The pause outlasts restarts. It ends when a rebuild, a new
    version or a rollback takes its place.
    """
    from projections import checkpoints

    await _set_paused(name, where, checkpoints.pause, "is left as it is; go on with: eskernel projections resume")


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@target_options
@asynchronous
async def resume(name: str, where: Where) -> None:
    """Have the service fold the projection NAME again: a person has paused it, or too many aggregates failed.

    If they still fail, it is paused again. A start of the service does the same by itself, but for what a person has
    paused.
    """
    from projections import checkpoints

    await _set_paused(name, where, checkpoints.resume, "is folded again, from where it was paused")


async def _set_paused(name: str, where: Where, change: Callable[[Engine, str], bool], told: str) -> None:
    target = where.find()
    target.app.projection(name)
    engine = target.engine()
    live = await asyncio.to_thread(change, engine, name)
    engine.dispose()
    if not live:
        fail(f"{name} has not been built; start the service, or rebuild the projection", FAILED)
    _line(f"{name} {told}")


@projections.command(epilog=EXIT_CODES)
@click.argument("name")
@click.option("--to", "version", type=int, metavar="VERSION", help="The version to show.  [default: the one before]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def rollback(name: str, version: int | None, as_json: bool, where: Where) -> None:
    """Have readers see the version of projection NAME again that they saw before.

    Its tables are still there, and programs that declare the version have kept them up to date: then it takes
    milliseconds. If none runs, give the program that declares it (--app): what its tables lack is folded first.
    Programs of the newer version go on beside it, and don't take the view back. A second rollback leads back to the
    newer version.

    \b
    eskernel projections rollback Balances
    eskernel projections rollback Balances --app bank_v1:app
    """
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.projector.rollback import roll_back

    target = where.find()
    engine = target.engine()
    subjects, lane = subjects_of(target.app.name, target.settings), target.settings.rates.rebuild
    async with await target.client() as client, following(client.connection, subjects, lane) as pace:
        with progress_bar("catching up", quiet=as_json) as show_progress:
            done = await roll_back(target.app, client.log, engine, name, version, show_progress, pace)
    engine.dispose()
    if as_json:
        print_json(done)
        return
    _line(
        f"{name}: readers see version {done.version} (generation {done.generation}), after {done.seconds:.2f} s, up to "
        f"sequence {done.sequence}; version {done.before} stays beside it"
    )


@projections.command(epilog=EXIT_CODES)
@click.argument("names", nargs=-1)
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only N random rows of each Rows projection.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, without a progress bar.")
@target_options
@asynchronous
async def verify(names: tuple[str, ...], sample: int | None, as_json: bool, where: Where) -> None:
    """Compare the tables of projections with what the log leads to: those of NAMES, or all.

    The log is folded a second time into temporary tables, up to the place where the live tables are. Nothing is
    changed, and the service goes on. The command exits with 1 if a row differs, so that a regular job can run it.
    With --sample only rows that are there are compared: a row that is missing is not noticed.

    \b
    eskernel projections verify
    eskernel projections verify Balances --json
    eskernel projections verify --sample 500        reads the histories of 500 aggregates, and not the whole log
    eskernel rebuild --aggregate Account/alice      to make one aggregate's rows again
    """
    from kernel.governance.remote_pace import following
    from kernel.log.subjects import subjects_of
    from kernel.projector.verification import Verification

    target = where.find()
    wanted = [target.app.projection(name) for name in dict.fromkeys(names)] or target.app.projections
    if not wanted:
        fail(f"{target.app.name} has no projections", FAILED)
    engine = target.engine()
    if sample is not None:
        await _verify_sample(target, engine, wanted if names else [each for each in wanted if each.kind == "rows"],
                             sample, as_json)  # fmt: skip
        return
    subjects, lane = subjects_of(target.app.name, target.settings), target.settings.rates.rebuild
    async with await target.client() as client, following(client.connection, subjects, lane) as pace:
        with progress_bar("verifying", quiet=as_json) as show:
            found = await Verification(target.app, client.log, engine, wanted, show, pace).run()
    engine.dispose()
    if as_json:
        print_json(found)
    else:
        for verified in found:
            print_verified(verified)
    if any(verified.differing or verified.parked for verified in found):
        sys.exit(FAILED)


async def _verify_sample(
    target: Target, engine: Engine, wanted: Sequence[DeclaredProjection], count: int, as_json: bool
) -> None:
    from kernel.projector.sampling import verify_sample

    if not wanted:
        fail(f"{target.app.name} has no Rows projection; leave --sample away", FAILED)
    async with await target.client() as client:
        found = {each.name: await verify_sample(target.app, client.log, engine, each, count) for each in wanted}
    engine.dispose()
    if as_json:
        print_json([{"projection": name, "table": table} for name, table in found.items()])
    else:
        for name, table in found.items():
            said = f"{table.differing:,} differ" if table.differing else "all are what the log says"
            _line(f"{name}: {table.rows:,} rows of {table.view} were compared: {said}")
            print_table(table)
    if any(table.differing for table in found.values()):
        sys.exit(FAILED)


projections.add_command(rebuild_command, "rebuild")
projections.add_command(prepare_command, "prepare")


def _read(target: Target) -> list[dict[str, Any]]:
    from projections import standing
    from projections.database import reads

    engine = target.engine(read_only=True)
    declared = {known.name: known.version for known in target.app.projections}
    with reads(engine).connect() as connection:
        found = [
            {
                "name": name,
                "declared": declared.get(name),
                "live": next((each["generation"] for each in made if each["state"] == "live"), None),
                "generations": made,
            }
            for name, made in standing.read_standing(connection).items()
        ]
    engine.dispose()
    return found


def _title(known: dict[str, Any]) -> str:
    if known["declared"] is None:
        return f"{known['name']}, not in the app: eskernel projections drop {known['name']}"
    return f"{known['name']} (the app declares version {known['declared']})"


_STATES = {
    "live": "readers see it",
    "ready": "built, and shown when a service of its program starts",
    "building": "being built, or left unfinished",
    "retired": "readers saw it before",
    "frozen": "as of then; it never changes",
    "freezing": "being frozen, or left unfinished",
}


def _sentence(made: dict[str, Any]) -> str:
    paused = ", paused: eskernel projections resume" if made["paused"] else ""
    retired = f" until {made['retired']}" if made["retired"] else ""
    return (
        f"version {made['version']}, generation {made['generation']}, {made['state']} "
        f"({_STATES[made['state']]}{retired}), up to sequence {made['sequence']}{paused}"
    )


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
