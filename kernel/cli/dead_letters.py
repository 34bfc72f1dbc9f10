"""`eskernel dead-letters`."""

from __future__ import annotations

import asyncio
import base64
import getpass
import socket
import sys
import time
from dataclasses import asdict
from typing import IO, Any

import click
import orjson
from rich.progress import track
from rich.table import Table
from sqlalchemy import Engine

from kernel.app import App
from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, errors, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED, USAGE
from projections import dead_letters as letters
from projections.dead_letters import Waiting
from projections.errors import NoSuchLetter

MAX_ERROR = 60


@click.group(name="dead-letters", epilog=EXIT_CODES)
def dead_letters() -> None:
    """Events that a projection could not fold, and those that wait behind them.

    When a handler fails, its aggregate is parked for that projection: the event, and all that follow it, become dead
    letters, while every other aggregate and projection goes on. Mend the handler and start the service again, or mend
    what it stumbled over; then fold them again, in order:

    \b
    eskernel dead-letters list
    eskernel dead-letters show Account alice
    eskernel dead-letters retry Account alice
    eskernel dead-letters skip Account alice --projection Balances --reason "charged twice, ticket 4711"

    Bytes on the stream that are no event of the app are kept in quarantine, named by their stream sequence.
    All of this works on the database, while the service runs or not.
    """


def _open(where: Where) -> tuple[App, Engine]:
    target = where.find()
    return target.app, target.engine()


@dead_letters.command(name="list", epilog=EXIT_CODES)
@click.option("--projection", help="Only what waits for this one.")
@click.option("--skipped", is_flag=True, help="What was left out: when, by whom, and why.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def list_(
    projection: str | None, skipped: bool, as_json: bool, where: Where
) -> None:  # fmt: skip
    """List the aggregates that wait, for which projection, since which event, and why."""
    loaded, engine = _open(where)
    if projection is not None:
        loaded.projection(projection)
    if skipped:
        gone = await asyncio.to_thread(letters.skipped, engine)
        if as_json:
            print_json(gone)
        else:
            for row in gone:
                what = f"{row['aggregate']} {row['aggregate_id']} event {row['sequence']}"
                who = f"by {row['who']}: {row['reason']}"
                console.print(
                    f"{row['skipped']}  {row['projection'] or 'quarantine'}  {what}  {who}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
        return
    found = await asyncio.to_thread(letters.waiting, engine, projection)
    if as_json:
        print_json(found)
        return
    if not found:
        console.print("no dead letters", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("projection", "aggregate", "id", "from event", "waiting", "error", "next attempt"):
        table.add_column(name, overflow="fold", justify="right" if name in ("from event", "waiting") else "left")
    for one in found:
        place = str(one.sequence) if one.projection else f"@{one.stream_sequence}"
        error = one.error if len(one.error) <= MAX_ERROR else one.error[: MAX_ERROR - 1] + "…"
        table.add_row(
            one.projection or "(quarantine)", one.aggregate, one.aggregate_id, place, str(one.events), error, _next(one)
        )
    console.print(table, markup=False, highlight=False)


def _next(one: Waiting) -> str:
    if one.next_attempt is None:
        return "-"
    return f"in {max(0.0, one.next_attempt - time.time()):.0f} s"


@dead_letters.command(epilog=EXIT_CODES)
@click.argument("aggregate")
@click.argument("aggregate_id", metavar="ID")
@click.option("--projection", help="If it waits for several.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def show(
    aggregate: str, aggregate_id: str, projection: str | None, as_json: bool, where: Where
) -> None:  # fmt: skip
    """Show what waits of one aggregate: the event that failed, why, and those behind it."""
    loaded, engine = _open(where)
    loaded.type_of(aggregate)
    shown = []
    for one in await _chosen(engine, projection, aggregate, aggregate_id):
        found = await asyncio.to_thread(letters.letters, engine, one.projection, aggregate, aggregate_id)
        shown.append((one, found))
    if as_json:
        print_json([{**asdict(one), "letters": [_plain(letter) for letter in found]} for one, found in shown])
        return
    for one, found in shown:
        console.print(f"{one.projection}: {one.events} events wait since {one.since}", style="bold", highlight=False)
        console.print(f"  failed {one.attempts} times: {one.error}", markup=False, highlight=False)
        for letter in found:
            event = letter.event or {}
            console.print(
                f"  {letter.sequence:>6}  {event.get('type', '?')} {orjson.dumps(event.get('data')).decode()}",
                markup=False,
                highlight=False,
            )


async def _chosen(engine: Engine, projection: str | None, aggregate: str, aggregate_id: str) -> list[Waiting]:
    found = await asyncio.to_thread(letters.waiting, engine, projection)
    chosen = [one for one in found if (one.aggregate, one.aggregate_id) == (aggregate, aggregate_id)]
    if not chosen:
        where = f" for {projection}" if projection else ""
        fail(
            f"nothing waits of {aggregate} {aggregate_id}{where}; `eskernel dead-letters list` shows what does", FAILED
        )
    return chosen


@dead_letters.command(epilog=EXIT_CODES)
@click.argument("aggregate", required=False)
@click.argument("aggregate_id", metavar="[ID]", required=False)
@click.option("--projection", help="Only what waits for this one.")
@click.option("--all", "everything", is_flag=True, help="Whatever waits, of every aggregate.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def retry(
    aggregate: str | None, aggregate_id: str | None, projection: str | None, everything: bool, as_json: bool,
    where: Where
) -> None:  # fmt: skip
    """Fold what waits again, from the first event on, up to one that fails.

    An aggregate of which nothing waits any more goes on with the others. Exits with 1 if something still waits.
    """
    if everything == (aggregate is not None) or (aggregate is None) != (aggregate_id is None):
        raise click.UsageError("name one aggregate and its id, or say --all")
    loaded, engine = _open(where)
    if projection is not None:
        loaded.projection(projection)
    if aggregate is not None and aggregate_id is not None:
        chosen = await _chosen(engine, projection, aggregate, aggregate_id)
    else:
        chosen = await asyncio.to_thread(letters.waiting, engine, projection)
    plan = loaded.plan()
    known = {declared.name for declared in loaded.projections}
    work = [one for one in chosen if one.projection in known]
    done = []
    for one in track(work, "folding again", console=errors, disable=as_json or len(work) < 20, transient=True):
        own = letters.plan_of(plan, one.projection)
        try:
            result = await asyncio.to_thread(
                letters.retry, engine, own, one.projection, one.aggregate, one.aggregate_id, None
            )
        except NoSuchLetter:
            continue  # somebody was faster
        done.append(result)
    left = sum(one.left > 0 for one in done)
    if as_json:
        print_json(done)
    else:
        for result in done:
            state = "goes on" if not result.left else f"{result.left} still wait: {result.error}"
            console.print(
                f"{result.projection}  {result.aggregate} {result.aggregate_id}: {result.folded} folded, {state}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        if not done:
            console.print("nothing to retry", highlight=False)
    sys.exit(FAILED if left else 0)


@dead_letters.command(epilog=EXIT_CODES)
@click.argument("aggregate", required=False)
@click.argument("aggregate_id", metavar="[ID]", required=False)
@click.option("--projection", help="Which one is to go on without the event.")
@click.option("--quarantine", type=click.IntRange(1), metavar="SEQUENCE", help="A message in quarantine, instead.")
@click.option("--reason", required=True, help="Why; it is kept with your name and the time.")
@click.option("--who", default=lambda: f"{getpass.getuser()}@{socket.gethostname()}", help="You, by default.")
@target_options
@asynchronous
async def skip(
    aggregate: str | None, aggregate_id: str | None, projection: str | None, quarantine: int | None, reason: str,
    who: str, where: Where
) -> None:  # fmt: skip
    """Leave out the first event that waits of one aggregate, for good; those behind it wait for a retry.

    The projection will never contain it (a rebuild folds it again). What was left out, by whom and why, stays in the
    table eskernel_skipped_letter: `eskernel dead-letters list --skipped`.
    """
    if not reason.strip():
        raise click.UsageError("--reason must say something")
    if (quarantine is None) != (aggregate is not None and aggregate_id is not None):
        raise click.UsageError("name one aggregate and its id, or --quarantine SEQUENCE")
    loaded, engine = _open(where)
    if quarantine is not None:
        found = await asyncio.to_thread(letters.waiting, engine, "")
        one = next((one for one in found if one.stream_sequence == quarantine), None)
        if one is None:
            fail(f"stream sequence {quarantine} is not in quarantine", FAILED)
        plan = None
    else:
        assert aggregate is not None
        assert aggregate_id is not None
        chosen = await _chosen(engine, projection, aggregate, aggregate_id)
        if len(chosen) > 1:
            names = ", ".join(each.projection for each in chosen)
            fail(f"it waits for {names}: say which with --projection", USAGE)
        one = chosen[0]
        plan = letters.plan_of(loaded.plan(), loaded.projection(one.projection).name)
    left_out = await asyncio.to_thread(
        letters.skip, engine, plan, one.projection, one.aggregate, one.aggregate_id, who, reason, quarantine
    )
    what = f"stream sequence {left_out.stream_sequence}" if quarantine else f"event {left_out.sequence}"
    console.print(f"left out {what}; {one.events - 1} still wait", highlight=False)
    if one.events > 1:
        console.print(f"  eskernel dead-letters retry {one.aggregate} {one.aggregate_id}", highlight=False)


@dead_letters.command(epilog=EXIT_CODES)
@click.option("--projection", help="Only what waits for this one.")
@click.option("--output", type=click.File("wb"), default="-", help="A file instead of standard output.")
@target_options
@asynchronous
async def export(projection: str | None, output: IO[bytes], where: Where) -> None:
    """Write every dead letter as one line of JSON, with the bytes of its commit (base64 where they are no text)."""
    _, engine = _open(where)
    for one in await asyncio.to_thread(letters.waiting, engine, projection):
        found = await asyncio.to_thread(letters.letters, engine, one.projection, one.aggregate, one.aggregate_id)
        for letter in found:
            if one.projection or letter.stream_sequence == one.stream_sequence:
                line = {"projection": one.projection, "aggregate": one.aggregate, "id": one.aggregate_id}
                output.write(orjson.dumps(line | _plain(letter), option=orjson.OPT_APPEND_NEWLINE))


def _plain(letter: letters.Letter) -> dict[str, Any]:
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
