"""What each event has done to a row: of an aggregate, or of a tally."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aggregates import InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.log.base import Stored
from projections.comparison import RowDifference, changes
from projections.fold import Folded, Plan
from projections.parked import Key
from projections.records import SEQUENCE

Values = dict[str, Any]


def commits_of(stored: Iterable[Stored]) -> Iterator[tuple[int, list[Envelope]]]:
    """Yield stream sequence and events of commits. What is no commit is left out: it is in quarantine."""
    for commit in stored:
        try:
            yield commit.sequence, decode(commit.payload)
        except InvalidMessage:
            continue


@dataclass(frozen=True, slots=True)
class RowStep:
    """One event, and the row after it.

    Attributes:
        aggregate: type and id.
        event: as it is stored.
        stream_sequence: place of its commit in the log.
        row: values by column; None if there is no row.
        changed: value before and after, by column.
        error: why the event is not folded, and what follows it neither; empty if it is.
    """

    aggregate: Key
    event: Envelope
    stream_sequence: int
    row: Values | None
    changed: dict[str, tuple[Any, Any]]
    error: str = ""


def row_steps(plan: Plan, key: Key, stored: Iterable[Stored]) -> Iterator[RowStep]:
    """Fold the commits of one aggregate event by event, up to the first event that can't be folded; yield each step.

    Args:
        plan: of one `Rows` projection. Events that it leaves out are left out.
        key: the aggregate's type and id.
    """
    codec = plan.codecs[0]
    assert codec is not None and not codec.counting, "only Rows have a row for each aggregate"
    named = [
        (name, str(column.name))
        for name, column in zip(codec.columns.names, codec.columns.columns, strict=True)
        if name != SEQUENCE
    ]
    rows: list[Any] = [None]
    before: Values | None = None
    last: int | None = 0
    for sequence, envelopes in commits_of(stored):
        for envelope in envelopes:
            folded = Folded(plan)
            last = plan.fold(*key, rows, [(sequence, [envelope])], folded, last)
            plan_parked = plan.parked.get(key, {}).get(0)
            if plan_parked is not None and envelope.sequence >= plan_parked.since:
                yield RowStep(key, envelope, sequence, before, {}, plan_parked.error)
                return
            record = rows[0]
            row = None if record is None else {shown: copy.deepcopy(getattr(record, name)) for name, shown in named}
            yield RowStep(key, envelope, sequence, row, changes(before or {}, row or {}))
            before = row


def tally_steps(plan: Plan, entry: Sequence[Any], key: Key, stored: Stored) -> list[RowStep]:
    """Return the events of one commit that have added to an entry of a tally, with what each added.

    Args:
        plan: of one `Tallies` projection. Events that it leaves out are left out.
        entry: its key, by column, in normal form.
        key: type and id of the commit's aggregate.
    """
    codec = plan.codecs[0]
    assert codec is not None and codec.counting, "only Tallies have entries"
    columns, keys = codec.columns, codec.columns.keys
    named = [(name, str(column.name)) for name, column in zip(columns.names, columns.columns, strict=True)][keys:]
    steps: list[RowStep] = []
    for envelope in (envelope for _, envelopes in commits_of([stored]) for envelope in envelopes):
        folded = Folded(plan)
        plan.fold(*key, [None], [(stored.sequence, [envelope])], folded, envelope.sequence - 1)
        if folded.failures:
            return steps  # what the handler added before it failed does not count
        records = list(folded.tallies[0].values())
        codec.carry(records)  # brings their keys to the normal form
        for record in records:
            if [getattr(record, name) for name in columns.names[:keys]] == list(entry):
                added = {shown: (0, getattr(record, name)) for name, shown in named if getattr(record, name)}
                if added:
                    steps.append(RowStep(key, envelope, stored.sequence, None, added))
    return steps


def differs_since(difference: RowDifference, steps: Iterable[RowStep]) -> int | None:
    """Return the sequence of the first event after which a stored row is no longer what the log says.

    None if it never was: no event gives the values that the table has.
    """
    first: int | None = None
    since: int | None = None
    agreed = False
    for step in steps:
        if step.error:
            continue
        first = first or step.event.sequence
        if _agrees(difference, step):
            agreed, since = True, None
        elif agreed and since is None:
            since = step.event.sequence
    return since if agreed or difference.what != "missing" else first


def _agrees(difference: RowDifference, step: RowStep) -> bool:
    row, stored = step.row, {name: value for name, value in difference.stored.items() if name != SEQUENCE}
    if difference.what == "missing" or row is None:
        return row is None and difference.what == "missing"
    if not stored:
        return bool(step.event.sequence == difference.stored.get(SEQUENCE))
    return all(row.get(name) == value for name, value in stored.items())
