"""Folds events into rows, tallies and calls of `Sql` handlers: the part of the read side that runs once per event.

A `Plan` is compiled at start. It contains the steps of each event type, so that an event costs one dictionary look-up,
one decode, and one call per handler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from aggregates.commit import Envelope
from aggregates.declaration import AggregateType
from aggregates.errors import NewerEvent
from projections.declaration import DeclaredProjection, EventHandler
from projections.errors import HandlerFailed
from projections.projection import DROP, Meta, Recorded, Tally

TRANSIENT: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)
"""Exceptions of handlers that may be temporary: the event is retried automatically. Apart from them a fold is a pure
function, and a retry would fail in the same way."""
EVERY = -1
"""Projection index in a `HandlerFailed` that the event itself causes: every projection of its aggregate parks it."""
Key = tuple[str, str]
"""Aggregate type and id."""
Step = Callable[[list[Any], str, Any, Envelope, int, "Folded"], None]


class Parked(NamedTuple):
    """The state of a parked aggregate for one projection.

    Attributes:
        since: sequence of the first waiting event.
        error: error of this event.
        transient: this event is retried automatically.
        waits: this event has not failed: it waits for a program that can read it.
    """

    since: int
    error: str
    transient: bool = False
    waits: bool = False


class Letter(NamedTuple):
    """An event that becomes a dead letter.

    Attributes:
        projection: index of the projection in its plan.
        aggregate: aggregate type and id.
        sequence: the event's place in its aggregate.
        stream_sequence: the event's place in the stream.
        error: error of the event, or of the event that it waits behind.
        transient: the event is retried automatically; False for an event that waits behind another one.
        waits: neither the event nor one before it has failed; it waits for a program that can read it.
    """

    projection: int
    aggregate: Key
    sequence: int
    stream_sequence: int
    error: str
    transient: bool = False
    waits: bool = False


class ParkedAggregates(dict[Key, dict[int, Parked]]):
    """The aggregates that wait behind a dead letter, by aggregate and projection index."""

    def add(self, aggregate: Key, index: int, parked: Parked) -> None:
        """Park an aggregate for one projection, unless it is parked from an earlier event on already."""
        waiting = self.setdefault(aggregate, {})
        if index not in waiting or parked.since < waiting[index].since:
            waiting[index] = parked

    def divide(
        self, key: Key, envelope: Envelope, stream_sequence: int, projections: Sequence[int], letters: list[Letter]
    ) -> list[int]:
        """Add an event to the dead letters of those projections that its aggregate is parked for.

        Returns:
            the other projections, which fold the event.
        """
        waiting = self[key]
        folding = []
        for index in projections:
            parked = waiting.get(index)
            if parked is None or envelope.sequence < parked.since:
                folding.append(index)
            else:
                head = envelope.sequence == parked.since
                retried = head and parked.transient
                letters.append(
                    Letter(index, key, envelope.sequence, stream_sequence, parked.error, retried, parked.waits)
                )
        return folding


class Folded:
    """The result of folding a batch of events, in memory, by projection of the plan.

    Attributes:
        rows: changed records by projection and aggregate id; None for a dropped row.
        tallies: increments by projection and key.
        events: events for `Sql` handlers, by projection and handler.
        kept: sequence of the last folded event by projection and aggregate id, for aggregates without a row.
        letters: events that become dead letters.
        count: number of folded events.
    """

    __slots__ = ("count", "events", "kept", "letters", "rows", "tallies")

    def __init__(self, plan: Plan) -> None:
        self.rows: list[dict[str, Any]] = [{} for _ in plan.projections]
        self.tallies: list[Tally[Any]] = [Tally(make) for make in plan.makers]
        self.events: list[list[list[Recorded[Any]]]] = [[[] for _ in p.handlers] for p in plan.projections]
        self.kept: list[dict[str, int]] = [{} for _ in plan.projections]
        self.letters: list[Letter] = []
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

    Args:
        transient: exceptions of handlers that may be temporary.

    Attributes:
        projections: the projections, in the order of all indexes in `Folded`.
        makers: functions that make a record, by projection.
        row_indexes: the `Rows` projections of each aggregate type.
        keepers: for each aggregate type, the projection that stores the sequence of an aggregate's last event: its
            first `Rows`, or else its first projection.
        keeps: the keepers are those of the app; not so in a plan of one projection, where the app has another keeper.
        parked: the parked aggregates. They are state, and the only part of the plan that changes.
    """

    def __init__(
        self,
        types: Sequence[AggregateType[Any]],
        projections: Sequence[DeclaredProjection],
        transient: tuple[type[Exception], ...] = TRANSIENT,
    ) -> None:
        self.transient = transient
        self.projections = list(projections)
        self.types = {declared.name: declared for declared in types}
        self.makers: list[Callable[..., Any]] = [
            p.columns.factory(numeric=p.kind == "tallies") if p.columns else _no_record for p in projections
        ]
        self.parked = ParkedAggregates()
        self.keeps = True
        self._indexes = {
            declared.name: [i for i, p in enumerate(projections) if p.aggregate == declared.name] for declared in types
        }
        self.row_indexes = {
            declared.name: [i for i, p in enumerate(projections) if p.kind == "rows" and p.aggregate == declared.name]
            for declared in types
        }
        self.keepers: dict[str, int] = {}
        for kind in ("rows", None):
            for index, projection in enumerate(projections):
                if kind in (None, projection.kind):
                    self.keepers.setdefault(projection.aggregate, index)
        self._steps = {declared.name: self._compile(declared) for declared in types}

    def _compile(
        self, declared: AggregateType[Any]
    ) -> dict[str, tuple[int, Callable[..., Any], Callable[..., Any] | None, tuple[tuple[int, Step], ...]]]:
        compiled = {}
        for name, event_type in declared.events.items():
            steps: list[tuple[int, Step]] = []
            for index, projection in enumerate(self.projections):
                if projection.aggregate != declared.name:
                    continue
                for place, handler in enumerate(projection.handlers):
                    if event_type.cls in handler.events:
                        steps.append((index, self._step(index, place, handler)))
            # most events have the current version: their decoder is called directly
            decode: Callable[..., Any] | None = msgspec.json.Decoder(event_type.cls).decode if steps else None
            compiled[name] = (event_type.version, event_type.decode, decode, tuple(steps))
        return compiled

    def _step(self, index: int, place: int, handler: EventHandler) -> Step:
        projection = self.projections[index]
        function, instance, make = handler.function, projection.instance, self.makers[index]
        wants_meta = handler.wants_meta

        def fold_row(
            rows: list[Any], aggregate_id: str, event: Any, envelope: Envelope, stream_sequence: int, folded: Folded
        ) -> None:
            row = rows[index]
            if row is None:
                row = rows[index] = make(aggregate_id)
            if wants_meta:
                result = function(instance, row, event, Meta(envelope, aggregate_id, stream_sequence))
            else:
                result = function(instance, row, event)
            if result is DROP:
                rows[index] = folded.rows[index][aggregate_id] = None

        def fold_tally(
            _rows: list[Any], aggregate_id: str, event: Any, envelope: Envelope, stream_sequence: int, folded: Folded
        ) -> None:
            if wants_meta:
                function(instance, folded.tallies[index], event, Meta(envelope, aggregate_id, stream_sequence))
            else:
                function(instance, folded.tallies[index], event)

        def collect(
            _rows: list[Any], aggregate_id: str, event: Any, envelope: Envelope, stream_sequence: int, folded: Folded
        ) -> None:
            folded.events[index][place].append(Recorded(event, envelope, aggregate_id, stream_sequence))

        return {"rows": fold_row, "tallies": fold_tally, "sql": collect}[projection.kind]

    def fold(
        self,
        aggregate: str,
        aggregate_id: str,
        rows: list[Any],
        commits: Sequence[tuple[int, Sequence[Envelope]]],
        folded: Folded,
        last: int | None,
        skip: frozenset[int] = frozenset(),
        kept: int | None = None,
    ) -> int:
        """Fold one aggregate's commits, up to the first event that only a newer program can read.

        That event and those behind it become dead letters that wait. Nothing has failed: no handler has seen them.

        Args:
            rows: the aggregate's records by projection, None where there is no row; updated in place.
            commits: stream sequence and events of each commit, in stream order.
            folded: the batch's result, to which the result is added.
            last: sequence of the last event folded before, or None if only the rows and `kept` know it.
            skip: projections that have folded these commits already.
            kept: sequence of the last event folded before, if the keeper has no row that stores it.

        Returns:
            sequence of the last event.

        Raises:
            HandlerFailed: park the aggregate, and fold the whole batch again from the stored rows.
        """
        keeper = self.keepers.get(aggregate)
        if keeper is None:
            return commits[-1][1][-1].sequence
        if skip or (self.parked and (aggregate, aggregate_id) in self.parked):
            return self._fold_partly(keeper, (aggregate, aggregate_id), rows, commits, folded, last, skip, kept)
        key = aggregate, aggregate_id
        end = sequence = 0
        steps_by_type = self._steps[aggregate]
        indexes = self.row_indexes[aggregate]
        if last is None:
            for index in indexes:
                if rows[index] is not None:
                    last = max(last or 0, rows[index].eskernel_sequence)
            if last is None:
                last = kept
        try:
            for stream_sequence, envelopes in commits:
                for envelope in envelopes:
                    sequence = envelope.sequence
                    if last is not None and sequence != last + 1:
                        raise _out_of_sequence(key, sequence, last)
                    last = sequence
                    entry = steps_by_type.get(envelope.type)
                    if entry is None:
                        self.types[aggregate].stored_event(envelope.type)
                        continue
                    version, decode_any, decode, steps = entry
                    if decode is None:
                        continue
                    try:
                        event = (
                            decode(envelope.data)
                            if envelope.dataversion == version
                            else decode_any(envelope.data, envelope.dataversion)
                        )
                    except NewerEvent:
                        raise
                    except Exception as error:
                        raise _unreadable_event(key, envelope, error) from error
                    index = EVERY
                    try:
                        for index, step in steps:  # noqa: B007 - the error names the step that failed
                            step(rows, aggregate_id, event, envelope, stream_sequence, folded)
                    except Exception as error:
                        raise self._failed_handler(index, key, sequence, error) from error
                folded.count += len(envelopes)
        except NewerEvent as newer:
            last, end = sequence - 1, self._wait(key, sequence, newer, commits, folded.letters)
        if not last:
            return end
        for index in indexes:
            row = rows[index]
            if row is not None:
                row.eskernel_sequence = last  # once for all events
                folded.rows[index][aggregate_id] = row
        if not indexes or rows[keeper] is None:
            folded.kept[keeper][aggregate_id] = last
        return end or last

    def _wait(
        self,
        key: Key,
        since: int,
        newer: NewerEvent,
        commits: Sequence[tuple[int, Sequence[Envelope]]],
        letters: list[Letter],
    ) -> int:
        """Have an aggregate wait, from an event on that this program can't read. Return the last event's sequence."""
        projections = self._indexes[key[0]]
        for index in projections:
            self.parked.add(key, index, Parked(since, str(newer), waits=True))
        for stream_sequence, envelopes in commits:
            for envelope in envelopes:
                self.parked.divide(key, envelope, stream_sequence, projections, letters)
        return commits[-1][1][-1].sequence

    def _fold_partly(
        self,
        keeper: int,
        key: Key,
        rows: list[Any],
        commits: Sequence[tuple[int, Sequence[Envelope]]],
        folded: Folded,
        last: int | None,
        skip: frozenset[int],
        kept: int | None,
    ) -> int:
        """Fold commits of a parked aggregate, or commits that some projections have folded already."""
        waiting = self.parked.get(key)
        projections = [index for index in self._indexes[key[0]] if index not in skip]
        indexes = [index for index in self.row_indexes[key[0]] if index not in skip]
        if last is None:
            for index in indexes:
                if rows[index] is not None and not (waiting and index in waiting):
                    last = max(last or 0, rows[index].eskernel_sequence)
            if last is None and keeper not in skip and not (waiting and keeper in waiting):
                last = kept
        for stream_sequence, envelopes in commits:
            for envelope in envelopes:
                sequence = envelope.sequence
                folding = projections
                if waiting:
                    folding = self.parked.divide(key, envelope, stream_sequence, projections, folded.letters)
                    if not folding:
                        last = sequence
                        continue
                if last is not None and sequence != last + 1:
                    raise _out_of_sequence(key, sequence, last)
                last = sequence
                try:
                    self._fold_event(key, rows, envelope, stream_sequence, folded, folding)
                except NewerEvent as newer:
                    for index in folding:
                        self.parked.add(key, index, Parked(sequence, str(newer), waits=True))
                    waiting = self.parked[key]
                    self.parked.divide(key, envelope, stream_sequence, folding, folded.letters)
            folded.count += len(envelopes)
        for index in indexes:
            row = rows[index]
            if row is not None:
                if waiting and index in waiting:
                    row.eskernel_sequence = max(_last_before(waiting[index], commits), row.eskernel_sequence)
                elif last:
                    row.eskernel_sequence = last
                folded.rows[index][key[1]] = row
        if keeper in skip or (self.row_indexes[key[0]] and rows[keeper] is not None):
            return last or 0
        last_kept = _last_before(waiting[keeper], commits) if waiting and keeper in waiting else last
        if last_kept:
            folded.kept[keeper][key[1]] = last_kept
        return last or 0

    def _fold_event(
        self,
        key: Key,
        rows: list[Any],
        envelope: Envelope,
        stream_sequence: int,
        folded: Folded,
        projections: Sequence[int],
    ) -> None:
        """Fold one event into some projections."""
        entry = self._steps[key[0]].get(envelope.type)
        if entry is None:
            self.types[key[0]].stored_event(envelope.type)
            return
        version, decode_any, decode, steps = entry
        if decode is None:
            return
        try:
            current = envelope.dataversion == version
            event = decode(envelope.data) if current else decode_any(envelope.data, envelope.dataversion)
        except NewerEvent:
            raise
        except Exception as error:
            raise _unreadable_event(key, envelope, error) from error
        for index, step in steps:
            if index in projections:
                try:
                    step(rows, key[1], event, envelope, stream_sequence, folded)
                except Exception as error:
                    raise self._failed_handler(index, key, envelope.sequence, error) from error

    def _failed_handler(self, index: int, key: Key, sequence: int, error: Exception) -> HandlerFailed:
        why, transient = f"{type(error).__name__}: {error}", isinstance(error, self.transient)
        return HandlerFailed(index, key, sequence, why, "handler", transient)

    def park(self, failure: HandlerFailed) -> None:
        """Park an aggregate, from the failed event on, for the projection that failed or for `EVERY`."""
        for index in self._indexes[failure.aggregate[0]]:
            if failure.projection in (EVERY, index):
                self.parked.add(failure.aggregate, index, Parked(failure.sequence, failure.error, failure.transient))


def _out_of_sequence(key: Key, sequence: int, last: int) -> HandlerFailed:
    return HandlerFailed(EVERY, key, sequence, f"SequenceError: event {sequence} after {last}", "sequence")


def _unreadable_event(key: Key, envelope: Envelope, error: Exception) -> HandlerFailed:
    why = f"{type(error).__name__}: stored {envelope.type}: {error}"
    return HandlerFailed(EVERY, key, envelope.sequence, why, "event")


def _last_before(parked: Parked, commits: Sequence[tuple[int, Sequence[Envelope]]]) -> int:
    """Return the sequence of the last event that comes before the waiting ones, 0 if there is none."""
    sequences = (envelope.sequence for _, envelopes in commits for envelope in envelopes)
    return max((sequence for sequence in sequences if sequence < parked.since), default=0)


def _no_record(*_values: Any) -> Any:
    raise TypeError("an Sql projection has no records")
