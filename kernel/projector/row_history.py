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
from projections.keyed import Routing
from projections.parked import Key
from projections.records import SEQUENCE
from projections.row_codec import RowCodec

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
            row = values_of(codec, rows[0])
            yield RowStep(key, envelope, sequence, row, changes(before or {}, row or {}))
            before = row


class KeyedRow:
    """One row with a key of its own, folded event by event.

    Args:
        plan: of the one projection. Events that it leaves out are left out.
        key: the row's, by column in normal form.
    """

    def __init__(self, plan: Plan, key: Sequence[Any]) -> None:
        (self._router,) = plan.routers
        codec = plan.codecs[0]
        assert codec is not None, "Rows have a codec"
        self._plan, self._codec = plan, codec
        self._key, _ = codec.key_of(tuple(key))
        self._rows: list[Any] = [None]
        self._before: Values | None = None

    def fold(self, aggregate: Key, stored: Stored) -> Iterator[RowStep]:
        """Fold one commit; yield the steps of those of its events that belong to the row.

        Raises:
            RowsWait: only a newer program can tell.
        """
        routing = Routing(self._router, self._plan.parked.skipped)
        if aggregate[0] in self._router.aggregates:
            routing.add(aggregate, list(commits_of([stored])))
        own = self._router.name, self._key
        for event in (event for key, commits in routing.rows() if key == self._key for _, (event,) in commits):
            folded = Folded(self._plan)
            self._plan.fold(*own, self._rows, [(stored.sequence, [event])], folded, None)
            parked = self._plan.parked.get(own, {}).get(0)
            if parked is not None and event.sequence >= parked.since:
                if event.sequence == parked.since:
                    yield RowStep(aggregate, event.source, stored.sequence, None, {}, parked.error)  # type: ignore[attr-defined]
                return
            row = values_of(self._codec, self._rows[0])
            yield RowStep(aggregate, event.source, stored.sequence, row, changes(self._before or {}, row or {}))  # type: ignore[attr-defined]
            self._before = row


def values_of(codec: RowCodec, record: Any) -> Values | None:
    """Return the values of a record by column; None where there is no row."""
    if record is None:
        return None
    named = zip(codec.columns.names, codec.columns.columns, strict=True)
    return {str(column.name): copy.deepcopy(getattr(record, name)) for name, column in named if name != SEQUENCE}


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
