"""`eskernel show`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING, Any

import click
import orjson

from aggregates.cell import Cell
from aggregates.commit import Envelope, decode
from aggregates.errors import InvalidMessage, NewerEvent, SequenceError
from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, fail, print_json, spoken_of, target_options, told_of
from kernel.cli.exit_codes import FAILED

if TYPE_CHECKING:
    from kernel.log.base import Stored

_DAMAGED = "the history is damaged"
_RESTORE = "Restore the log from a backup: docs/backup.md"
PAGE = 100
"""Events that are printed for people, unless --limit says otherwise."""
_ASK_PROGRAM = "Name the program that wrote it with --app, or add an upcaster"


@click.command(epilog=EXIT_CODES)
@click.argument("aggregate")
@click.argument("id")
@click.option("--history", is_flag=True, help="Print the events too, the newest 100.")
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="So many events.  [default: 100; all of them with --json]"
)
@click.option("--before", type=click.IntRange(1), metavar="SEQ", help="The events before this one.")
@click.option("--after", type=click.IntRange(0), metavar="SEQ", help="The events after this one, the oldest first.")
@click.option("--at", metavar="SEQ|TIME", help="State after an event (1, 2, ...), or at an ISO 8601 time (UTC).")
@click.option(
    "--diff",
    nargs=2,
    metavar="A B",
    help="What changed between two events or times, and by which events. 0 is the beginning.",
)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def show(
    aggregate: str,
    id: str,
    history: bool,
    limit: int | None,
    before: int | None,
    after: int | None,
    at: str | None,
    diff: tuple[str, str] | None,
    as_json: bool,
    where: Where,
) -> None:
    """Print an aggregate's state, folded from the log. With --at, print its state at that event or time.

    \b
    eskernel show Account alice --history
    eskernel show Account alice --history --before 901
    eskernel show Account alice --history --after 0 --limit 20
    eskernel show Account alice --at 3
    eskernel show Account alice --at 2026-01-31T12:00
    eskernel show Account alice --diff 3 5
    """
    paged = limit is not None or before is not None or after is not None
    history = history or paged
    if diff is not None and (at is not None or history):
        raise click.UsageError("--diff prints the events between two places itself: leave --at and --history away")
    target = where.find()
    declared = target.app.type_of(aggregate)
    moment = diff[1] if diff is not None else at
    last = _last(moment)
    until = _until(moment if last is None else None)
    from_, earlier = (_last(diff[0], first=0), _until(diff[0])) if diff is not None else (None, _until(None))
    async with await target.client() as client:
        subject = client.log.subjects.address(aggregate, id).subject
        stored = await client.log.read_subject(subject)
    if not stored:
        fail(f"{aggregate} {id!r} has no events", FAILED)
    cell = Cell(declared, id)
    folding = _Folding(cell, last, until)
    steps = [step for commit in stored for step in folding.fold(commit, watch=diff is not None)]
    if not steps:
        first = decode(stored[0].payload)[0].time
        fail(f"{aggregate} {id!r} had no events at {moment}; its first event happened at {first}", FAILED)
    if diff is not None:
        left = [*dropwhile(lambda s: s.sequence <= from_ if from_ is not None else earlier(s.envelope), steps)]
        _print_diff(cell, steps, left, as_json)
        return
    page = _page(steps, limit or (None if as_json else PAGE), before, after) if history else []
    state = {name: value for name, value in vars(cell.state).items() if name != "id"}
    if as_json:
        print_json({"aggregate": aggregate, "id": id, "version": cell.version, "state": state}
                   | ({"events": [_event(step) for step in page]} if history else {}))  # fmt: skip
        return
    console.print(f"{aggregate} {id}, version {cell.version}", style="bold", highlight=False, markup=False)
    for name, value in state.items():
        console.print(f"  {name} = {value!r}", highlight=False, markup=False)
    for step in page:
        _print_event(step)
    if history and (more := _other_pages(page, cell.version)):
        console.print(f"  {more}", style="dim", highlight=False, markup=False, soft_wrap=True)


def _page(steps: list[_Step], limit: int | None, before: int | None, after: int | None) -> list[_Step]:
    """Return the newest of the events, or the oldest behind `after`."""
    first = 0 if after is None else after
    chosen = [step for step in steps if step.sequence > first and (before is None or step.sequence < before)]
    if limit is None:
        return chosen
    return chosen[-limit:] if after is None else chosen[:limit]


def _other_pages(page: list[_Step], version: int) -> str:
    """Return which events are on other pages, and the options that print them; nothing if there are none."""
    if not page:
        return f"none of the events 1 to {version} is there"
    first, last = page[0].sequence, page[-1].sequence
    earlier, later = first - 1, version - last
    said = [f"{earlier:,} earlier {_events(earlier)}: --before {first}"] if earlier else []
    said += [f"{later:,} later {_events(later)}: --after {last}"] if later else []
    return "; ".join(said)


def _events(count: int) -> str:
    return "event" if count == 1 else "events"


@dataclass(frozen=True, slots=True)
class _Step:
    """One event that was folded.

    Attributes:
        before, after: the state's fields around it, if they were asked for.
    """

    envelope: Envelope
    stream_sequence: int
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def sequence(self) -> int:
        return self.envelope.sequence

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        from projections.comparison import changes

        return changes(self.before, self.after)


class _Folding:
    """Folds commits into a cell, up to an event or a time, and says where a history can't be read.

    Args:
        last: sequence of the last event; None: `until` says which events are folded.
    """

    def __init__(self, cell: Cell[Any], last: int | None, until: Callable[[Envelope], bool]) -> None:
        self._cell, self._last, self._until = cell, last, until

    def fold(self, commit: Stored, *, watch: bool) -> list[_Step]:
        """Fold a commit.

        Args:
            watch: note the state around each event.
        """
        cell = self._cell
        if cell.version == self._last:
            return []  # what follows may be damaged
        envelopes: list[Envelope] = []
        steps: list[_Step] = []
        before = cell.version
        try:
            envelopes = decode(commit.payload)
            if self._last is None:
                chosen = [*takewhile(self._until, envelopes)]
                if len(chosen) < len(envelopes):
                    # events that follow may have an earlier time, of a worker whose clock is behind
                    self._last = before + len(chosen)
            else:
                chosen = envelopes[: self._last - before]
            for part in [[envelope] for envelope in chosen] if watch else [chosen]:
                old = _fields(cell) if watch else {}
                cell.replay(part, commit.sequence)
                new = _fields(cell) if watch else {}
                steps += [_Step(envelope, commit.sequence, old, new) for envelope in part]
        except NewerEvent as error:
            sound = f". Up to event {cell.version}: --at {cell.version}" if cell.version else ""
            fail(f"{cell.declared.name} {cell.state.id!r}: {error}{sound}", FAILED)
        except InvalidMessage as error:
            place = f"at stream sequence {commit.sequence}"
            if envelopes:
                what = f"event {cell.version + 1}, {place}, is none that this program can read"
                fail(_unreadable(cell, what, str(error), _ASK_PROGRAM), FAILED)
            fail(_unreadable(cell, f"{_DAMAGED} {place}", str(error), _RESTORE), FAILED)
        except SequenceError:
            found = envelopes[cell.version - before].sequence
            reason = f"event {found} is stored where event {cell.version + 1} should be"
            fail(_unreadable(cell, f"{_DAMAGED} at stream sequence {commit.sequence}", reason, _RESTORE), FAILED)
        return steps


def _fields(cell: Cell[Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in vars(cell.state).items() if name != "id"}


def _print_diff(cell: Cell[Any], steps: list[_Step], left: list[_Step], as_json: bool) -> None:
    """Print what the last of the folded events have changed."""
    from projections.comparison import changes

    name, aggregate_id = cell.declared.name, cell.state.id
    from_ = left[0].sequence - 1 if left else cell.version
    changed = changes(left[0].before, left[-1].after) if left else {}
    if as_json:
        events = [_event(step) | {"changed": _pairs(step.changed)} for step in left]
        print_json({"aggregate": name, "id": aggregate_id, "from": from_, "to": steps[-1].sequence,
                    "changed": _pairs(changed), "events": events})  # fmt: skip
        return
    console.print(
        f"{name} {aggregate_id}, from version {from_} to {cell.version}", style="bold", highlight=False, markup=False
    )
    for field, (before, after) in changed.items():
        _line(f"  {field}: {before!r} -> {after!r}")
    if not changed:
        _line("  nothing changed")
    for step in left:
        _print_event(step)
        for field, (before, after) in step.changed.items():
            _line(f"{'':10}{field}: {before!r} -> {after!r}")


def _pairs(changed: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {field: {"before": before, "after": after} for field, (before, after) in changed.items()}


def _spoken(event: dict[str, Any]) -> str:
    return f"{event['sequence']:>6}  {event['time'][:23]}  {event['type']} {orjson.dumps(event['data']).decode()}"


def _print_event(step: _Step) -> None:
    _line(f"  {_spoken(_event(step))}")
    if said := spoken_of(step.envelope):
        console.print(f"{'':10}{said}", style="dim", highlight=False, markup=False, soft_wrap=True)


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _unreadable(cell: Cell[Any], what: str, reason: str, remedy: str) -> str:
    """Return the sentence for a history of which only the cell's events can be read."""
    sound = (
        f"up to event {cell.version} it is sound: --at {cell.version}" if cell.version else "nothing before it is left"
    )
    return f"{cell.declared.name} {cell.state.id!r}: {what}: {reason}; {sound}. {remedy}"


def _event(step: _Step) -> dict[str, Any]:
    envelope = step.envelope
    return {
        "sequence": envelope.sequence,
        "stream_sequence": step.stream_sequence,
        "time": envelope.time,
        "type": envelope.type,
        "command_id": envelope.commandid,
        **told_of(envelope),
        "data": orjson.loads(bytes(envelope.data)),
    }


def _last(at: str | None, first: int = 1) -> int | None:
    """Return the sequence of the last event that is asked for, or None if it is not given as a sequence."""
    if at is None or not at.isdecimal():
        return None
    if int(at) < first:
        raise click.UsageError("--at 0: an aggregate's first event has the number 1")
    return int(at)


def _until(at: str | None) -> Callable[[Envelope], bool]:
    """Return a function that tests whether an event is included in the state at that time."""
    if at is None or at.isdecimal():
        return lambda _: True
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise click.UsageError(f"{at!r} is neither a sequence nor an ISO 8601 time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return lambda envelope: datetime.fromisoformat(envelope.time) <= moment
