"""Folds events into rows, tallies and calls of `Sql` handlers: the part of the read side that runs once per event.

A `Plan` is compiled at start. It contains the steps of each event type, so that an event costs one dictionary look-up,
one decode, and one call per handler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy.engine import Dialect

from aggregates.commit import Envelope
from aggregates.declaration import AggregateType
from aggregates.errors import NewerEvent
from projections.codec import Refused
from projections.declaration import DeclaredProjection, keepers_of, kept_prefix
from projections.errors import FailureKind, HandlerFailed, reason
from projections.keyed import Router, fold_row
from projections.parked import EVERY, Key, Letter, Parked, ParkedAggregates
from projections.projection import Recorded, Tally
from projections.row_codec import RowCodec
from projections.steps import RowStep, Step, make_row_steps, make_step

TRANSIENT: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)
"""Exceptions of handlers that may be temporary: the event is retried automatically. Apart from them a fold is a pure
function, and a retry would fail in the same way."""
Commits = Sequence[tuple[int, Sequence[Envelope]]]
"""Stream sequence and events of each commit of one aggregate, in stream order."""


class Folded:
    """The result of folding a batch of events, in memory, by projection of the plan.

    Attributes:
        rows: changed records by projection and aggregate id; None for a dropped row.
        tallies: increments by projection and key.
        calls: events for `Sql` handlers, by projection.
        kept: sequence of the last folded event by projection and aggregate id, for aggregates without a row.
        letters: events that become dead letters.
        failures: why aggregates were parked while folding.
        undone: rows that a handler left half changed, by projection and aggregate id, with the first event that is not
            in them. They are made again from what is stored.
        recounted: `Tallies` to which a handler has added a part only.
        count: number of folded events.
    """

    __slots__ = ("calls", "count", "failures", "kept", "letters", "recounted", "rows", "tallies", "undone")

    def __init__(self, plan: Plan) -> None:
        self.rows: list[dict[str, Any]] = [{} for _ in plan.projections]
        self.tallies: list[Tally[Any]] = [Tally(make) for make in plan.makers]
        self.calls: list[list[Recorded[Any]]] = [[] for _ in plan.projections]
        self.kept: list[dict[str, int]] = [{} for _ in plan.projections]
        self.letters: list[Letter] = []
        self.failures: list[HandlerFailed] = []
        self.undone: list[dict[str, int]] = [{} for _ in plan.projections]
        self.recounted: set[int] = set()
        self.count = 0

    def written(self) -> dict[int, int]:
        """Return the number of changed rows and tallies, by projection."""
        return {
            index: len(rows) + len(self.tallies[index])
            for index, rows in enumerate(self.rows)
            if rows or self.tallies[index]
        }


class Plan:
    """All projections of an app, compiled for folding.

    A fold never stops at a failure. It parks the aggregate, for the projection that failed, and goes on.

    Args:
        dialect: the database whose columns the records are carried into.
        transient: exceptions of handlers that may be temporary.

    Attributes:
        dialect: as given.
        projections: the projections, in the order of all indexes in `Folded`.
        codecs: how the records of each projection are carried; None for `Sql`.
        makers: functions that make a new record, by projection.
        row_indexes: the `Rows` projections of each aggregate type; the projection's name is the type of rows with a
            key of their own.
        routers: find those rows.
        keepers: for each aggregate type, the projection that stores the sequence of an aggregate's last event: its
            first `Rows`, or else its first projection.
        parked: the parked aggregates. They are state, and the only part of the plan that changes.
        kept_elsewhere: aggregate types of which this plan has not the app's keeper, but is a plan of one projection.
    """

    def __init__(
        self,
        types: Sequence[AggregateType[Any]],
        projections: Sequence[DeclaredProjection],
        dialect: Dialect,
        transient: tuple[type[Exception], ...] = TRANSIENT,
    ) -> None:
        self.transient = transient
        self.dialect = dialect
        self.projections = list(projections)
        self.types = {declared.name: declared for declared in types}
        self.codecs: list[RowCodec | None] = [declared.codec(dialect) for declared in projections]
        self.makers: list[Callable[..., Any]] = [
            _no_record if codec is None else codec.new if codec.counting else codec.new_for for codec in self.codecs
        ]
        self.parked = ParkedAggregates()
        self.kept_elsewhere: frozenset[str] = frozenset()
        units = [*self.types, *(projection.name for projection in projections if projection.keyed)]
        self._indexes = {unit: [i for i, p in enumerate(projections) if unit in p.units] for unit in units}
        self.row_indexes = {
            name: [index for index in indexes if projections[index].kind == "rows"]
            for name, indexes in self._indexes.items()
        }
        self.keepers = keepers_of(projections)
        self._kept_prefixes = {
            aggregate: kept_prefix(projections[index], aggregate) for aggregate, index in self.keepers.items()
        }
        self._steps = {declared.name: self._compile(declared) for declared in types}
        self.routers: list[Router] = []
        self._row_steps: dict[str, tuple[int, dict[type, RowStep]]] = {}
        for index, (projection, codec) in enumerate(zip(projections, self.codecs, strict=True)):
            if projection.key is not None and codec is not None:
                self.routers.append(Router(index, projection, projection.key, types, codec))
                self._row_steps[projection.name] = index, make_row_steps(index, projection, codec)

    def _compile(
        self, declared: AggregateType[Any]
    ) -> dict[str, tuple[int, Callable[..., Any], Callable[..., Any] | None, tuple[tuple[int, Step], ...]]]:
        compiled = {}
        for name, event_type in declared.events.items():
            steps: list[tuple[int, Step]] = []
            for index, projection in enumerate(self.projections):
                if declared.name not in projection.units:
                    continue
                for place, handler in enumerate(projection.handlers):
                    if event_type.cls in handler.events:
                        make = self.makers[index]
                        step = make_step(index, projection, place, handler, declared.name, self.codecs[index], make)
                        steps.append((index, step))
            # most events have the current version: their decoder is called directly
            decode: Callable[..., Any] | None = msgspec.json.Decoder(event_type.cls).decode if steps else None
            compiled[name] = (event_type.version, event_type.decode, decode, tuple(steps))
        return compiled

    def fold(
        self,
        aggregate: str,
        aggregate_id: str,
        rows: list[Any],
        commits: Commits,
        folded: Folded,
        last: int | None,
        skip: frozenset[int] = frozenset(),
        kept: int | None = None,
    ) -> int:
        """Fold one aggregate's commits, up to the first event that only a newer program can read.

        Args:
            rows: the aggregate's records by projection, None where there is no row; updated in place.
            commits: stream sequence and events of each commit, in stream order.
            folded: the batch's result, to which the result is added.
            last: sequence of the last event folded before, or None if only the rows and `kept` know it.
            skip: projections that have folded these commits already.
            kept: sequence of the last event folded before, if the keeper has no row that stores it: 0 if there was
                none, None if that is unknown.

        Returns:
            sequence of the last event.
        """
        keeper = self.keepers.get(aggregate)
        key = aggregate, aggregate_id
        if keeper is None:
            index, row_steps = self._row_steps.get(aggregate, _NO_ROWS)
            if not row_steps or index in skip:
                return commits[-1][1][-1].sequence
            return fold_row(self, index, row_steps, key, rows, commits, folded, last)
        waiting = self.parked.get(key, {}) if self.parked else {}
        indexes = self.row_indexes[aggregate]
        if last is None:
            for index in indexes:
                if rows[index] is not None and index not in skip and index not in waiting:
                    last = max(last or 0, rows[index].eskernel_sequence)
            if last is None and keeper not in skip and keeper not in waiting:
                last = kept
        if skip or waiting or key in self.parked.skipped:
            self._fold_slowly(key, rows, commits, folded, last, skip)
            return self._finish(keeper, key, rows, commits, folded, skip)
        steps_by_type = self._steps[aggregate]
        index = EVERY
        envelope = commits[0][1][0]
        try:
            for stream_sequence, envelopes in commits:
                for envelope in envelopes:
                    sequence = envelope.sequence
                    if last is not None and sequence != last + 1:
                        raise _OutOfSequence(_gap(sequence, last))
                    last = sequence
                    version, decode_any, decode, steps = steps_by_type[envelope.type]
                    if decode is None:
                        continue
                    event = (
                        decode(envelope.data)
                        if envelope.dataversion == version
                        else decode_any(envelope.data, envelope.dataversion)
                    )
                    for index, step in steps:  # noqa: B007 - it is what failed
                        step(rows, aggregate_id, event, envelope, stream_sequence, folded)
                    index = EVERY
                folded.count += len(envelopes)
        except Exception as error:
            self._go_on(key, rows, commits, folded, (envelope, index, error))
            return self._finish(keeper, key, rows, commits, folded, skip)
        assert last is not None, "a batch has an event of every aggregate in it"
        for index in indexes:
            row = rows[index]
            if row is not None:
                row.eskernel_sequence = last  # once for all events
                folded.rows[index][aggregate_id] = row
        if not indexes or rows[keeper] is None:
            folded.kept[keeper][self._kept_prefixes[aggregate] + aggregate_id] = last
        return last

    def _finish(
        self, keeper: int, key: Key, rows: list[Any], commits: Commits, folded: Folded, skip: frozenset[int]
    ) -> int:
        """Note the rows that events were folded into, up to where the aggregate is parked."""
        waiting = self.parked.get(key, {})
        first, last = commits[0][1][0].sequence, commits[-1][1][-1].sequence

        def folded_to(index: int) -> int:
            return min(last, waiting[index].since - 1) if index in waiting else last

        for index in self.row_indexes[key[0]]:
            row = rows[index]
            if row is not None and index not in skip and (until := folded_to(index)) >= first:
                row.eskernel_sequence = until
                folded.rows[index][key[1]] = row
        bare = not self.row_indexes[key[0]] or rows[keeper] is None
        if bare and keeper not in skip and (until := folded_to(keeper)) >= first:
            folded.kept[keeper][self.kept_id(key)] = until
        return last

    def _go_on(
        self,
        key: Key,
        rows: list[Any],
        commits: Commits,
        folded: Folded,
        failed: tuple[Envelope, int, Exception],
    ) -> None:
        """Park the aggregate at the event that failed, and fold the rest of its events for the other projections."""
        envelope, index, error = failed
        place, number = next(
            (place, number)
            for place, (_, envelopes) in enumerate(commits)
            for number, found in enumerate(envelopes)
            if found is envelope
        )
        stream_sequence, envelopes = commits[place]
        last = envelope.sequence
        if index == EVERY:
            last -= 1
            self._park_event(key, envelope, self._indexes[key[0]], folded, error)
        else:
            self.fail_step(index, key, rows, envelope, stream_sequence, folded, error)
            event = self._decode(key[0], envelope)
            steps = [step for step in self._steps[key[0]][envelope.type][3] if step[0] > index]
            self._run(steps, key, rows, (event, envelope, stream_sequence), folded)
            number += 1
        folded.count += number
        rest = [(stream_sequence, envelopes[number:]), *commits[place + 1 :]]
        self._fold_slowly(key, rows, [commit for commit in rest if commit[1]], folded, last, frozenset())

    def _fold_slowly(
        self, key: Key, rows: list[Any], commits: Commits, folded: Folded, last: int | None, skip: frozenset[int]
    ) -> None:
        """Fold commits of a parked aggregate, or commits that some projections have folded already."""
        projections = [index for index in self._indexes[key[0]] if index not in skip]
        for stream_sequence, envelopes in commits:
            for envelope in envelopes:
                folding: Sequence[int] = projections
                if key in self.parked or key in self.parked.skipped:
                    folding = self.parked.divide(key, envelope, stream_sequence, projections, folded.letters)
                if folding:
                    try:
                        if last is not None and envelope.sequence != last + 1:
                            raise _OutOfSequence(_gap(envelope.sequence, last))
                        event = self._decode(key[0], envelope)
                    except Exception as error:
                        self._park_event(key, envelope, folding, folded, error)
                        self.parked.divide(key, envelope, stream_sequence, folding, folded.letters)
                    else:
                        steps = [step for step in self._steps[key[0]][envelope.type][3] if step[0] in folding]
                        self._run(steps, key, rows, (event, envelope, stream_sequence), folded)
                last = envelope.sequence
            folded.count += len(envelopes)

    def _decode(self, aggregate: str, envelope: Envelope) -> Any:
        version, decode_any, decode, _ = self._steps[aggregate][envelope.type]
        if decode is None:
            return None
        current = envelope.dataversion == version
        return decode(envelope.data) if current else decode_any(envelope.data, envelope.dataversion)

    def _run(
        self,
        steps: Sequence[tuple[int, Step]],
        key: Key,
        rows: list[Any],
        decoded: tuple[Any, Envelope, int],
        folded: Folded,
    ) -> None:
        """Fold one event into some projections."""
        event, envelope, stream_sequence = decoded
        for index, step in steps:
            try:
                step(rows, key[1], event, envelope, stream_sequence, folded)
            except Exception as error:
                self.fail_step(index, key, rows, envelope, stream_sequence, folded, error)

    def fail_step(
        self,
        index: int,
        key: Key,
        rows: list[Any],
        envelope: Envelope,
        stream_sequence: int,
        folded: Folded,
        error: Exception,
    ) -> None:
        """Park an aggregate for one projection, whose handler failed or made a row that can't be carried."""
        transient = isinstance(error, self.transient)
        failure = HandlerFailed(
            index,
            key,
            envelope.sequence,
            reason(error),
            "refused" if isinstance(error, Refused) else "handler",
            transient,
        )
        failure.__cause__ = error
        folded.failures.append(failure)
        self.parked.add(key, index, Parked(envelope.sequence, failure.error, transient))
        folded.letters.append(Letter(index, key, envelope.sequence, stream_sequence, failure.error, transient))
        if self.projections[index].kind == "rows":
            rows[index] = None
            folded.rows[index].pop(key[1], None)
            folded.undone[index][key[1]] = envelope.sequence
        else:
            folded.recounted.add(index)

    def _park_event(
        self, key: Key, envelope: Envelope, projections: Sequence[int], folded: Folded, error: Exception
    ) -> None:
        """Park an aggregate at an event that can't be read, or that does not follow the one before.

        If only a newer program can read it, nothing has failed: the aggregate waits.
        """
        if envelope.type not in self._steps[key[0]]:
            try:
                self.types[key[0]].stored_event(envelope.type)
            except NewerEvent as newer:
                error = newer
        if isinstance(error, NewerEvent):
            for index in projections:
                self.parked.add(key, index, Parked(envelope.sequence, str(error), waits=True))
            return
        kind: FailureKind = "event"
        if isinstance(error, _OutOfSequence):
            why, kind = f"SequenceError: {error}", "sequence"
        else:
            why = f"{type(error).__name__}: stored {envelope.type}: {error}"
        failure = HandlerFailed(EVERY, key, envelope.sequence, why, kind)
        failure.__cause__ = error
        folded.failures.append(failure)
        for index in projections:
            self.parked.add(key, index, Parked(envelope.sequence, why))

    def park(self, failure: HandlerFailed) -> None:
        """Park an aggregate, from the failed event on, for the projection that failed or for `EVERY`."""
        for index in self._indexes[failure.aggregate[0]]:
            if failure.projection in (EVERY, index):
                self.parked.add(failure.aggregate, index, Parked(failure.sequence, failure.error, failure.transient))

    def kept_id(self, key: Key) -> str:
        """Return under which id the sequence of an aggregate without a row is stored."""
        return self._kept_prefixes.get(key[0], "") + key[1]

    def keeps(self, aggregate: str) -> bool:
        """Return whether the keeper of an aggregate type is the app's."""
        return aggregate in self.keepers and aggregate not in self.kept_elsewhere

    def apart(self) -> Plan:
        """Return the same plan with no aggregate parked, to fold something again."""
        plan = copy.copy(self)
        plan.parked = ParkedAggregates(self.parked.skipped)
        return plan


class _OutOfSequence(Exception):
    """An event is missing, or is there twice."""


_NO_ROWS: tuple[int, dict[type, RowStep]] = (0, {})


def _gap(sequence: int, last: int) -> str:
    if last:
        return f"event {sequence} after {last}"
    return f"the first event is number {sequence}: the beginning was purged or removed from the log"


def _no_record(*_values: Any) -> Any:
    raise TypeError("an Sql projection has no records")
