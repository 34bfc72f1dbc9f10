"""`eskernel dead-letters`."""

from __future__ import annotations

import asyncio
import base64
import getpass
import socket
import sys
import time
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import click
import orjson
from rich.table import Table

from kernel.cli import EXIT_CODES
from kernel.cli.asking import ask_workers
from kernel.cli.common import Where, asynchronous, console, errors, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED, USAGE

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from kernel.app import App
    from projections.dead_letters import Waiting
    from projections.stored_letters import StoredLetter

MAX_ERROR = 60


@click.group(name="dead-letters", epilog=EXIT_CODES)
def dead_letters() -> None:
    """Events that a projection, a policy or an effect could not handle, and the later events of the same aggregates.

    When a handler fails, its aggregate is parked for that projection (or policy, or effect): the event and all later
    events of the aggregate become dead letters. All other aggregates and projections continue. Correct the handler and
    restart the service, or remove the cause of the failure. Then handle the dead letters again, in order:

    \b
    eskernel dead-letters list
    eskernel dead-letters show Account alice
    eskernel dead-letters retry Account alice
    eskernel dead-letters skip Account alice --projection Balances --reason "charged twice, ticket 4711"

    Messages on the stream that are not events of the app are kept in quarantine, under their stream sequence.
    Events of a newer program have not failed: they are folded as soon as a program that can read them runs.
    These commands work on the database, whether the service runs or not. What a policy or an effect has to do again is
    done by the worker that has the aggregate's partition, as soon as one runs.
    """


def _check_declared(app: App, name: str | None) -> None:
    """Raise `NotDeclared` unless it is a projection, a policy or an effect of the app, or none is given."""
    if name is not None and name not in {each.name for each in app.reactions}:
        app.projection(name)


def _open(where: Where) -> tuple[App, Engine]:
    target = where.find()
    return target.app, target.engine()


@dead_letters.command(name="list", epilog=EXIT_CODES)
@click.option("--projection", help="Only the dead letters of this projection, policy or effect.")
@click.option("--skipped", is_flag=True, help="List the skipped events instead: when, by whom, and why.")
@click.option("--newer", is_flag=True, help="List what has not failed, and waits for a newer program, instead.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def list_(
    projection: str | None, skipped: bool, newer: bool, as_json: bool, where: Where
) -> None:  # fmt: skip
    """List the parked aggregates: for which projection, from which event on, and why."""
    from projections import dead_letters as letters
    from projections.row_event import is_order

    loaded, engine = _open(where)
    _check_declared(loaded, projection)
    if skipped:
        skips = await asyncio.to_thread(letters.skipped, engine)
        if as_json:
            print_json(skips)
        elif not skips:
            console.print("nothing was skipped", highlight=False)
        else:
            for row in skips:
                what = f"{row['aggregate']} {row['aggregate_id']} event {row['sequence']}"
                who = f"by {row['who']}: {row['reason']}"
                console.print(
                    f"{row['skipped']}  {row['projection'] or 'quarantine'}  {what}  {who}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
        return
    found = [row for row in await asyncio.to_thread(letters.waiting, engine, projection) if row.newer == newer]
    if as_json:
        print_json(found)
        return
    if not found:
        console.print("no dead letters", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("projection", "aggregate", "id", "from event", "waiting", "error", "next attempt"):
        table.add_column(name, overflow="fold", justify="right" if name in ("from event", "waiting") else "left")
    for parked in found:
        of_log = not parked.projection or is_order(parked.sequence, parked.stream_sequence)
        place = f"@{parked.stream_sequence}" if of_log else str(parked.sequence)
        error = parked.error if len(parked.error) <= MAX_ERROR else parked.error[: MAX_ERROR - 1] + "…"
        table.add_row(
            parked.projection or "(quarantine)",
            parked.aggregate,
            parked.aggregate_id,
            place,
            str(parked.events),
            error,
            _next(parked),
        )
    console.print(table, markup=False, highlight=False)


def _done(app: App, name: str) -> str:
    """Return what was done with an event."""
    return "done" if name in {each.name for each in app.reactions} else "folded"


def _next(parked: Waiting) -> str:
    if parked.next_attempt is None:
        return "-"
    return f"in {max(0.0, parked.next_attempt - time.time()):.0f} s"


@dead_letters.command(epilog=EXIT_CODES)
@click.argument("aggregate")
@click.argument("aggregate_id", metavar="ID")
@click.option("--projection", help="Only the dead letters of this projection, policy or effect.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def show(
    aggregate: str, aggregate_id: str, projection: str | None, as_json: bool, where: Where
) -> None:  # fmt: skip
    """Show an aggregate's dead letters: the event that failed, its error, and the events that wait behind it."""
    from projections import dead_letters as letters

    loaded, engine = _open(where)
    if not any(declared.keyed and declared.name == aggregate for declared in loaded.projections):
        loaded.type_of(aggregate)
    shown = []
    for parked in await _chosen(engine, projection, aggregate, aggregate_id):
        found = await asyncio.to_thread(letters.letters, engine, parked.projection, aggregate, aggregate_id)
        shown.append((parked, found))
    if as_json:
        print_json([{**asdict(parked), "letters": [_plain(letter) for letter in found]} for parked, found in shown])
        return
    for parked, found in shown:
        since = f"{parked.projection}: {parked.events} events wait since {parked.since}"
        console.print(since, style="bold", highlight=False)
        failed = f"failed {parked.attempts} time{'s' * (parked.attempts != 1)}"
        console.print(
            f"  {'waits for a newer program' if parked.newer else failed}: {parked.error}",
            markup=False,
            highlight=False,
        )
        for letter in found:
            event = letter.event or {}
            console.print(
                f"  {letter.sequence:>6}  {event.get('type', '?')} {orjson.dumps(event.get('data')).decode()}",
                markup=False,
                highlight=False,
            )


async def _chosen(engine: Engine, projection: str | None, aggregate: str, aggregate_id: str) -> list[Waiting]:
    from projections import dead_letters as letters

    found = await asyncio.to_thread(letters.waiting, engine, projection)
    chosen = [parked for parked in found if (parked.aggregate, parked.aggregate_id) == (aggregate, aggregate_id)]
    if not chosen:
        where = f" for {projection}" if projection else ""
        fail(
            f"there are no dead letters of {aggregate} {aggregate_id}{where}; `eskernel dead-letters list` shows all",
            FAILED,
        )
    return chosen


@dead_letters.command(epilog=EXIT_CODES)
@click.argument("aggregate", required=False)
@click.argument("aggregate_id", metavar="[ID]", required=False)
@click.option("--projection", help="Only the dead letters of this projection, policy or effect.")
@click.option("--all", "everything", is_flag=True, help="The dead letters of every aggregate.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def retry(
    aggregate: str | None, aggregate_id: str | None, projection: str | None, everything: bool, as_json: bool,
    where: Where
) -> None:  # fmt: skip
    """Handle the dead letters of an aggregate again, in order, up to the first event that fails.

    An aggregate without dead letters is no longer parked. Exits with 1 if dead letters are left. For a policy or an
    effect a running worker is asked, and the answer is waited for, up to 10 seconds.
    """
    from rich.progress import track

    from projections import dead_letters as letters
    from projections.retrying import CHUNK, retry_all

    if everything == (aggregate is not None) or (aggregate is None) != (aggregate_id is None):
        raise click.UsageError("give an aggregate and its id, or --all")
    loaded, engine = _open(where)
    _check_declared(loaded, projection)
    if aggregate is not None and aggregate_id is not None:
        chosen = await _chosen(engine, projection, aggregate, aggregate_id)
    else:
        chosen = [row for row in await asyncio.to_thread(letters.waiting, engine, projection) if not row.newer]
    asked = [parked for parked in chosen if parked.reaction]
    chosen = [parked for parked in chosen if not parked.reaction]
    plan = loaded.plan(engine.dialect)
    chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    done: list[letters.Retried] = []
    for chunk in track(chunks, "folding again", console=errors, disable=as_json or len(chunks) < 2, transient=True):
        done += await asyncio.to_thread(retry_all, engine, plan, chunk)
    done += await ask_workers(engine, asked)
    left = sum(result.left > 0 for result in done)
    if as_json:
        print_json(done)
    else:
        for result in done:
            state = "no longer parked" if not result.left else f"{result.left} still wait: {result.error}"
            what = _done(loaded, result.projection)
            console.print(
                f"{result.projection}  {result.aggregate} {result.aggregate_id}: {result.folded} {what}, {state}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        if not done:
            console.print("nothing to retry", highlight=False)
    sys.exit(FAILED if left else 0)


@dead_letters.command(epilog=EXIT_CODES)
@click.argument("aggregate", required=False)
@click.argument("aggregate_id", metavar="[ID]", required=False)
@click.option("--projection", help="The projection, policy or effect that skips the event.")
@click.option("--quarantine", type=click.IntRange(1), metavar="SEQUENCE", help="Skip this message in quarantine.")
@click.option("--reason", required=True, help="The reason, which is recorded with your name and the time.")
@click.option(
    "--who", default=lambda: f"{getpass.getuser()}@{socket.gethostname()}", help="Your name; by default USER@HOST."
)
@target_options
@asynchronous
async def skip(
    aggregate: str | None, aggregate_id: str | None, projection: str | None, quarantine: int | None, reason: str,
    who: str, where: Where
) -> None:  # fmt: skip
    """Skip the first dead letter of an aggregate for good. The dead letters behind it wait for a retry.

    The projection's tables will not contain the event, also after a rebuild; a policy sends nothing for it. The table
    eskernel_skipped_letter records who skipped it, when and why: `eskernel dead-letters list --skipped`.
    """
    from projections import dead_letters as letters

    if not reason.strip():
        raise click.UsageError("--reason is empty; give a reason")
    if (quarantine is None) != (aggregate is not None and aggregate_id is not None):
        raise click.UsageError("give an aggregate and its id, or --quarantine SEQUENCE")
    loaded, engine = _open(where)
    if quarantine is not None:
        await asyncio.to_thread(letters.skip_quarantined, engine, quarantine, who, reason)
        console.print(f"skipped stream sequence {quarantine}", highlight=False)
        return
    assert aggregate is not None
    assert aggregate_id is not None
    chosen = await _chosen(engine, projection, aggregate, aggregate_id)
    if len(chosen) > 1:
        names = ", ".join(parked.projection for parked in chosen)
        fail(f"{aggregate} {aggregate_id} is parked for {names}; choose one with --projection", USAGE)
    (parked,) = chosen
    if parked.reaction:
        from kernel.reactions.letters import skip as skip_reaction

        arguments = parked.projection, aggregate, aggregate_id, who, reason
        sequence = await asyncio.to_thread(skip_reaction, engine, *arguments)
    else:
        from projections.exclusions import plan_of

        plan = plan_of(loaded.plan(engine.dialect), loaded.projection(parked.projection).name)
        sequence = (await asyncio.to_thread(letters.skip, engine, plan, aggregate, aggregate_id, who, reason)).sequence
    console.print(f"skipped event {sequence}; {parked.events - 1} still wait", highlight=False)
    if parked.events > 1:
        console.print(f"  eskernel dead-letters retry {aggregate} {aggregate_id}", highlight=False)


@dead_letters.command(epilog=EXIT_CODES)
@click.option("--projection", help="Only the dead letters of this projection, policy or effect.")
@click.option("--output", type=click.File("wb"), default="-", help="A file instead of standard output.")
@target_options
@asynchronous
async def export(projection: str | None, output: IO[bytes], where: Where) -> None:
    """Write each dead letter as a line of JSON, with the bytes of its commit (in base64 if they are not UTF-8)."""
    from projections import dead_letters as letters

    _, engine = _open(where)
    for parked in await asyncio.to_thread(letters.waiting, engine, projection):
        key = parked.projection, parked.aggregate, parked.aggregate_id
        line = dict(zip(("projection", "aggregate", "id"), key, strict=True))
        for letter in await asyncio.to_thread(letters.letters, engine, *key):
            if parked.projection or letter.stream_sequence == parked.stream_sequence:
                output.write(orjson.dumps(line | _plain(letter), option=orjson.OPT_APPEND_NEWLINE))


def _plain(letter: StoredLetter) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "sequence": letter.sequence,
        "stream_sequence": letter.stream_sequence,
        "error": letter.error,
        "event": letter.event,
    }
    try:
        plain["payload"] = letter.payload.decode()
    except UnicodeDecodeError:
        plain["payload_base64"] = base64.b64encode(letter.payload).decode()
    return plain
