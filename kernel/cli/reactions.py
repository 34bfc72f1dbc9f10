"""`eskernel policies`, `eskernel effects` and `eskernel timers`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED

if TYPE_CHECKING:
    from sqlalchemy import Engine

MAX_TEXT = 60


@click.group(epilog=EXIT_CODES)
def policies() -> None:
    """Policies: what is sent when something has happened.

    \b
    eskernel policies list
    eskernel policies rejected Fulfilment
    eskernel policies pause Fulfilment
    eskernel policies resume Fulfilment

    A policy that is paused forgets nothing: it goes on from where it was. What a policy could not do is among the dead
    letters: `eskernel dead-letters`.
    """


@click.group(epilog=EXIT_CODES)
def effects() -> None:
    """Effects: what is done outside of the app when something has happened.

    \b
    eskernel effects list
    eskernel effects pause Mails
    eskernel effects resume Mails
    eskernel effects replay Mails --from 4711

    An effect that is paused forgets nothing: it goes on from where it was. What failed is among the dead letters:
    `eskernel dead-letters`.
    """


@click.group(epilog=EXIT_CODES)
def timers() -> None:
    """Timers: commands that policies will send.

    \b
    eskernel timers list
    eskernel timers list Fulfilment --failed
    eskernel timers cancel Fulfilment order-17
    """


def _engine(where: Where, name: str | None = None, kind: str = "") -> tuple[Target, Engine]:
    target = where.find()
    engine = target.engine()
    if name is not None:
        known = {each.name: each.kind for each in _standings(engine)}
        if known.get(name) != kind:
            there = ", ".join(each for each, of in known.items() if of == kind) or "none"
            fail(f"the database knows no {kind} {name!r}; it knows {there}", FAILED)
    return target, engine


def _standings(engine: Engine) -> list[Any]:
    from kernel.reactions.standing import read_standings

    return read_standings(engine, time.time())


def _add_common(group: click.Group, kind: str) -> None:
    """Add the commands that policies and effects share."""

    @group.command(
        "list", epilog=EXIT_CODES, help=f"List every {kind}: where it stands, what waits, whether it is paused."
    )
    @click.option("--json", "as_json", is_flag=True)
    @target_options
    @asynchronous
    async def list_(as_json: bool, where: Where) -> None:
        target, engine = _engine(where)
        declared = {each.name for each in target.app.reactions}
        found = [each for each in await asyncio.to_thread(_standings, engine) if each.kind == kind]
        if as_json:
            print_json([asdict(each) | {"declared": each.name in declared} for each in found])
            return
        if not found:
            console.print(f"there is no {kind}", highlight=False)
            return
        table = Table(box=None, pad_edge=False)
        counted = ("timers", "late", "rejected") if kind == "policy" else ()
        for column in ("name", "state", "at", "parked", *counted):
            table.add_column(column, justify="left" if column in ("name", "state") else "right")
        for each in found:
            state = "paused" if each.paused else "active"
            if each.name not in declared:
                state = "not declared by the app"
            counts = [getattr(each, column) for column in ("parked", *counted)]
            table.add_row(each.name, state, str(each.lowest), *map(str, counts))
        console.print(table, markup=False, highlight=False)

    @group.command(epilog=EXIT_CODES, help=f"Have nobody work for a {kind} until it is resumed. Nothing is lost.")
    @click.argument("name")
    @target_options
    @asynchronous
    async def pause(name: str, where: Where) -> None:
        from kernel.reactions import store

        _, engine = _engine(where, name, kind)
        await asyncio.to_thread(store.pause, engine, name, True)
        console.print(f"{name} is paused; go on with: eskernel {group.name} resume {name}", highlight=False)

    @group.command(epilog=EXIT_CODES, help=f"Let a paused {kind} go on from where it was.")
    @click.argument("name")
    @target_options
    @asynchronous
    async def resume(name: str, where: Where) -> None:
        from kernel.reactions import store

        _, engine = _engine(where, name, kind)
        await asyncio.to_thread(store.pause, engine, name, False)
        console.print(f"{name} goes on", highlight=False)

    @group.command(
        epilog=EXIT_CODES,
        help=f"Forget a {kind} that the app no longer declares: where it stands, and its dead letters.",
    )
    @click.argument("name")
    @target_options
    @asynchronous
    async def drop(name: str, where: Where) -> None:
        from kernel.reactions import store

        target, engine = _engine(where, name, kind)
        if name in {each.name for each in target.app.reactions}:
            fail(f"the app declares {name}; remove it there first, or pause it", FAILED)
        await asyncio.to_thread(store.drop, engine, name)
        console.print(f"{name} is forgotten", highlight=False)


_add_common(policies, "policy")
_add_common(effects, "effect")


@policies.command(epilog=EXIT_CODES)
@click.argument("name", required=False)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Show the newest N.", metavar="N")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def rejected(name: str | None, limit: int, as_json: bool, where: Where) -> None:
    """List the commands of a policy, or of all, that an aggregate has rejected, the newest first."""
    from kernel.reactions import store

    _, engine = _engine(where, name, "policy") if name is not None else _engine(where)
    found = await asyncio.to_thread(store.rejections, engine, name, limit)
    if as_json:
        print_json(found)
        return
    for row in found:
        console.print(
            f"{row['rejected']}  {row['policy']}  {row['command']} for {row['aggregate']} {row['aggregate_id']}: "
            f"{row['reason']}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if not found:
        console.print("no command was rejected", highlight=False)


@effects.command(epilog=EXIT_CODES)
@click.argument("name")
@click.option(
    "--from", "sequence", type=click.IntRange(1), required=True, metavar="SEQUENCE",
    help="The stream sequence of the first commit that is handled again.",
)  # fmt: skip
@target_options
@asynchronous
async def replay(name: str, sequence: int, where: Where) -> None:
    """Have an effect handle again what has happened from a commit on: mails are sent again, and so on."""
    from kernel.reactions import store

    _, engine = _engine(where, name, "effect")
    await asyncio.to_thread(store.go_back, engine, name, sequence - 1)
    console.print(f"{name} handles again what has happened from stream sequence {sequence} on", highlight=False)


@timers.command("list", epilog=EXIT_CODES)
@click.argument("policy", required=False)
@click.option("--failed", is_flag=True, help="Only those whose command has failed; they are tried again.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Show the first N.", metavar="N")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def list_timers(policy: str | None, failed: bool, limit: int, as_json: bool, where: Where) -> None:
    """List the pending timers of a policy, or of all: when each is due, and what it sends."""
    from kernel.reactions import timers as stored
    from kernel.reactions.requests import restore

    _, engine = _engine(where, policy, "policy") if policy is not None else _engine(where)
    found = []
    for row in await asyncio.to_thread(stored.pending, engine, policy, failed=failed, limit=limit):
        owed, envelope = restore(row["owed"])
        found.append(
            {
                "policy": row["policy"],
                "key": row["name"],
                "due": datetime.fromtimestamp(row["due"] / stored.MICROS, UTC).isoformat(timespec="milliseconds"),
                "aggregate": owed.request["aggregate"],
                "id": owed.request["id"],
                "command": owed.request["command"],
                "data": owed.request["data"],
                "command_id": owed.request["command_id"],
                "event_id": envelope.id,
                "attempts": row["attempts"],
                "error": row["error"],
            }
        )
    if as_json:
        print_json(found)
        return
    for each in found:
        what = f"{each['command']} for {each['aggregate']} {each['id']}"
        error = f"  failed {each['attempts']} times: {each['error'][:MAX_TEXT]}" if each["attempts"] else ""
        line = f"{each['due']}  {each['policy']}  {each['key']}  {what}{error}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found:
        console.print("no timer is pending", highlight=False)
    if len(found) == limit:
        console.print(f"these are the first {limit}; others may be pending: --limit", highlight=False)


@timers.command(epilog=EXIT_CODES)
@click.argument("policy")
@click.argument("keys", nargs=-1, required=True)
@target_options
@asynchronous
async def cancel(policy: str, keys: tuple[str, ...], where: Where) -> None:
    """Cancel timers of a policy by their keys, as `eskernel timers list` shows them."""
    from kernel.reactions import timers as stored

    _, engine = _engine(where, policy, "policy")
    missing = [key for key in keys if not await asyncio.to_thread(stored.cancel, engine, policy, [key])]
    console.print(f"{len(keys) - len(missing)} of {len(keys)} timers cancelled", highlight=False)
    if missing:
        fail(f"not pending: {', '.join(missing)}", FAILED)
