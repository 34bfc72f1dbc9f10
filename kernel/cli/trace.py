"""`eskernel trace`: what an id stands for, as a tree."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, fail, print_json, spoken_of, target_options, told_of
from kernel.cli.exit_codes import FAILED
from kernel.cli.progress import commits_bar

if TYPE_CHECKING:
    from kernel.app import App
    from kernel.projector.tracing import Projected, Trace, TracedCommand, TracedEvent

_STYLES = {"parked": "red", "waiting": "yellow", "behind": "yellow", "not built": "yellow"}


@click.command(epilog=EXIT_CODES)
@click.argument("id")
@click.option("--aggregate", metavar="TYPE/ID", help="Read the history of this aggregate only, which is much faster.")
@click.option("--since", metavar="TIME", help="Read the log from this ISO 8601 time (UTC) on.")
@click.option("--json", "as_json", is_flag=True, help="Print the commands as JSON, without a progress bar.")
@target_options
@asynchronous
async def trace(id: str, aggregate: str | None, since: str | None, as_json: bool, where: Where) -> None:
    """Find what an ID stands for: a command, an event, or a correlation or causation id.

    Prints the commands that have to do with it, the events of each, and the projections that fold these events, with
    whether readers see the event there already. Commands that name a command or an event of the tree as their cause
    stand below it.

    \b
    eskernel trace 0193f3a0-1234-7abc-8def-0123456789ab
    eskernel trace "payment 4711" --since 2026-01-31
    eskernel trace "payment 4711" --aggregate Account/bert
    eskernel trace 0193f3a0-1234-7abc-8def-0123456789ab --json

    The log has no index of ids: it is read to its end. A UUIDv7, as the client makes them, says when it was made: then
    the log is read from an hour before that time. For any other id, the whole log is read, or what --since leaves of
    it. With --aggregate, commands to other aggregates are not found.
    """
    from kernel.projector import tracing

    if not id:
        raise click.UsageError("ID is empty")
    if aggregate is not None and since is not None:
        raise click.UsageError("--aggregate reads a whole history: leave --since away")
    moment = _moment(since)
    target = where.find()
    only = None if aggregate is None else _aggregate(target.app, aggregate)
    engine = None if target.database is None else target.engine(read_only=True)
    async with await target.client() as client:
        with commits_bar(f"looking for {id}", quiet=as_json) as progress:
            found = await tracing.trace(
                target.app, client.log, engine, id, aggregate=only, since=moment, progress=progress
            )
    if engine is not None:
        engine.dispose()
    if not found.commands:
        place = f"the history of {aggregate}" if aggregate else "the log"
        place += f" since {since}" if since else ""
        fail(
            f"no command, event, correlation or causation in {place} has the id {id!r}. A command that was refused, or "
            "led to no events, leaves nothing in the log",
            FAILED,
        )
    if as_json:
        print_json(_as_json(found))
        return
    _print(found)


def _moment(since: str | None) -> datetime | None:
    if since is None:
        return None
    try:
        moment = datetime.fromisoformat(since)
    except ValueError:
        raise click.UsageError(f"--since {since!r} is not an ISO 8601 time, such as 2026-01-31T12:00") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _aggregate(app: App, text: str) -> tuple[str, str]:
    name, slash, aggregate_id = text.partition("/")
    if not slash or not aggregate_id:
        raise click.UsageError(f"--aggregate {text!r}: give it as TYPE/ID, such as Account/alice")
    if name not in app.retired:
        app.type_of(name)
    return name, aggregate_id


def _as_json(found: Trace) -> dict[str, Any]:
    from kernel.projector.tracing import TracedCommand

    commands = [(depth, item) for depth, item in found.walk() if isinstance(item, TracedCommand)]
    return {
        "id": found.id,
        "is": sorted(found.kinds),
        "commands": [_command(depth, command) for depth, command in commands],
    }


def _command(depth: int, command: TracedCommand) -> dict[str, Any]:
    """Return a command as JSON data. The list of them is flat: a chain of causes may be deeper than JSON can be."""
    first, address = command.first, command.address
    return {
        "command_id": command.id,
        "aggregate": address.aggregate,
        "aggregate_id": address.id,
        "partition": address.partition,
        "time": first.time,
        "correlation_id": first.correlation_id or command.id,
        "causation_id": first.causation_id,
        "traceparent": first.traceparent,
        **told_of(first),
        "depth": depth,
        "caused_by": command.cause and {"command_id": command.cause.id, "event_id": command.cause_event},
        "events": [_event(event) for event in command.events],
    }


def _event(event: TracedEvent) -> dict[str, Any]:
    envelope = event.envelope
    return {
        "event_id": envelope.id,
        "type": envelope.type,
        "version": envelope.dataversion,
        "sequence": envelope.sequence,
        "stream_sequence": event.stream_sequence,
        "time": envelope.time,
        "known": event.known,
        "projections": event.projections,
    }


def _print(found: Trace) -> None:
    from kernel.projector.tracing import TracedCommand

    _line(0, f"{found.id} is the id of {_spoken(found)}")
    correlations = set()
    for depth, item in found.walk():
        if isinstance(item, TracedCommand):
            _print_command(depth, item, found.id)
            correlations.add(item.first.correlation_id or item.id)
        else:
            _print_event(depth, item, found.id)
    others = sorted(correlations - {found.id, ""})
    if "correlation" not in found.kinds and len(others) == 1:
        _line(0, f"All with the same correlation: eskernel trace {shlex.quote(others[0])}", style="dim")


def _spoken(found: Trace) -> str:
    named = {"command": "a command", "event": "an event", "correlation": "a correlation", "causation": "a cause"}
    return " and ".join(text for kind, text in named.items() if kind in found.kinds)


def _print_command(depth: int, command: TracedCommand, wanted: str) -> None:
    first, address = command.first, command.address
    name = f"command {command.id}" if command.id else "no command"
    _line(depth, f"{name}  {address.aggregate} {address.id}  {first.time[:23]}", style=_style(command.id, wanted))
    if first.correlation_id not in (None, command.id):
        _line(depth + 1, f"correlation {first.correlation_id}", style="dim")
    if said := spoken_of(first):
        _line(depth + 1, said, style="dim")
    if first.causation_id is not None and command.cause is None:
        _line(depth + 1, f"caused by {first.causation_id}", style="dim")


def _print_event(depth: int, event: TracedEvent, wanted: str) -> None:
    envelope = event.envelope
    _line(
        depth,
        f"event {envelope.sequence}  {envelope.type} version {envelope.dataversion}  "
        f"stream sequence {event.stream_sequence}  {envelope.time[:23]}  {envelope.id}",
        style=_style(envelope.id, wanted),
    )
    if not event.known:
        _line(depth + 1, "this program does not declare such an event, so it can't say who folds it", style="yellow")
    elif not event.projections:
        _line(depth + 1, "no projection folds it", style="dim")
    for projected in event.projections:
        _line(depth + 1, _told(projected), style=_STYLES.get(projected.state, ""))


def _told(projected: Projected) -> str:
    version = f" version {projected.version}" if projected.version else ""
    states = {
        "included": "included",
        "behind": f"not yet included, the partition is at {projected.position}",
        "parked": f"parked since {projected.error}",
        "waiting": f"waits for a newer program since {projected.error}",
        "skipped": "skipped by an operator",
        "not built": "not built",
        "unknown": "not looked up; give --database",
    }
    return f"{projected.projection}{version}: {states[projected.state]}"


def _style(id: str, wanted: str) -> str:
    return "bold" if id == wanted else ""


def _line(depth: int, text: str, style: str = "") -> None:
    console.print("  " * depth + text, style=style, highlight=False, markup=False, soft_wrap=True)
