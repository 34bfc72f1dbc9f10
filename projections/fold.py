"""Folding events into rows, tallies and statements: the part of the read side that runs once per event.

A `Plan` is compiled at start. For each event type it holds the steps to run, so that an event costs one dictionary
look-up, one decode, and one call per handler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from aggregates.commit import Envelope
from aggregates.declaration import AggregateType
from projections.declaration import DeclaredProjection, EventHandler
from projections.errors import HandlerFailed
from projections.projection import DROP, Meta, Recorded, Tally

TRANSIENT: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)
"""Exceptions of handlers that time may mend: the event is folded again by and by. A fold is otherwise a pure function,
and would only fail again."""
EVERY = -1
"""In a `HandlerFailed`: the event itself is to blame, so every projection of its aggregate parks it."""
Step = Callable[[list[Any], str, Any, Envelope, int, "Folded"], None]


class Parked(NamedTuple):
    """Since which event an aggregate waits, and why."""

    since: int
    error: str
    transient: bool = False


class Letter(NamedTuple):
    """One event on its way to the dead letters: of which projection, aggregate (type, id), where, and why.

    Attributes:
        transient: it is to be folded again by and by; never so for those that only wait behind it.
    """

    projection: int
    aggregate: tuple[str, str]
    sequence: int
    stream_sequence: int
    error: str
    transient: bool = False


class Folded:
    """What a batch of events amounts to, per projection of the plan; still in memory.

    Attributes:
        rows: by projection, then by aggregate id: the record, or None where it was dropped.
        tallies: by projection: increments by key.
        events: by projection and handler: what `Sql` handlers will receive.
        kept: by projection, then by aggregate id: the last event folded, where no row keeps it.
        letters: events that could not be folded, with those behind them.
        count: events folded.
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
        """Return how many rows and tallies it amounts to, by projection."""
        return {
            index: len(rows) + len(self.tallies[index])
            for index, rows in enumerate(self.rows)
            if rows or self.tallies[index]
        }


class Plan:
    """All projections of an app, compiled for folding.

    Args:
        transient: exceptions of handlers after which trying again by itself may help.

    Attributes:
        projections: in the order that indexes everything in `Folded`.
        makers: how a record is made, by projection.
        keepers: by aggregate type, the projection that keeps the sequence of the last event: its first `Rows`, if any.
        parked: by projection and aggregate (type, id): the sequence from which on events wait behind a dead letter.
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
        self.parked: dict[tuple[str, str], dict[int, Parked]] = {}
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
            # most events have the present version: their decoder is called without a detour
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
        """Fold one aggregate's commits.

        Args:
            rows: the aggregate's records by projection, None where there is no row yet; updated in place.
            commits: (stream sequence, envelopes) in stream order.
            last: the sequence folded before, or None if it isn't known but from the rows.
            skip: projections that have folded these commits already.
            kept: the sequence folded before, as the database keeps it where the keeper has no row.

        Returns:
            the sequence of the last event.

        Raises:
            HandlerFailed: park the aggregate and fold the whole batch again, from stored rows.
        """
        keeper = self.keepers.get(aggregate)
        if keeper is None:
            return commits[-1][1][-1].sequence
        steps_by_type = self._steps[aggregate]
        key = (aggregate, aggregate_id)
        parked = self.parked.get(key) if self.parked else None
        odd = bool(skip or parked)
        indexes = self.row_indexes[aggregate]
        if last is None:
            for index in indexes:
                if rows[index] is not None and index not in skip and not (parked and index in parked):
                    last = max(last or 0, rows[index].eskernel_sequence)
            if last is None and keeper not in skip and not (parked and keeper in parked):
                last = kept
        for stream_sequence, envelopes in commits:
            for envelope in envelopes:
                sequence = envelope.sequence
                if parked and self._wait(key, parked, envelope, stream_sequence, skip, folded):
                    last = sequence
                    continue
                if last is not None and sequence != last + 1:
                    why = f"SequenceError: event {sequence} after {last}"
                    raise HandlerFailed(EVERY, key, sequence, why, "sequence")
                last = sequence
                entry = steps_by_type.get(envelope.type)
                if entry is None:
                    raise HandlerFailed(
                        EVERY, key, sequence, f"InvalidMessage: no event named {envelope.type!r}", "event"
                    )
                version, decode_any, decode, steps = entry
                if decode is None:
                    continue
                try:
                    event = (
                        decode(envelope.data)
                        if envelope.dataversion == version
                        else decode_any(envelope.data, envelope.dataversion)
                    )
                except Exception as error:
                    why = f"{type(error).__name__}: stored {envelope.type}: {error}"
                    raise HandlerFailed(EVERY, key, sequence, why, "event") from error
                index = EVERY
                try:
                    for index, step in steps:
                        if odd and (index in skip or (parked and index in parked and sequence >= parked[index].since)):
                            continue
                        step(rows, aggregate_id, event, envelope, stream_sequence, folded)
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
                    transient = isinstance(error, self.transient)
                    raise HandlerFailed(index, key, sequence, why, "handler", transient) from error
            folded.count += len(envelopes)
        for index in indexes:
            # once for all its events
            row = rows[index]
            if row is None or index in skip:
                continue
            if parked and index in parked:
                since = parked[index].since
                done = [one.sequence for _, envelopes in commits for one in envelopes if one.sequence < since]
                row.eskernel_sequence = max([*done, row.eskernel_sequence])
            elif last:
                row.eskernel_sequence = last
            folded.rows[index][aggregate_id] = row
        if (self.row_indexes[aggregate] and rows[keeper] is not None) or keeper in skip:
            return last or 0
        if parked and keeper in parked:
            since = parked[keeper].since
            done = [one.sequence for _, envelopes in commits for one in envelopes if one.sequence < since]
            last_kept = max(done, default=0)
        else:
            last_kept = last or 0
        if last_kept:
            folded.kept[keeper][aggregate_id] = last_kept
        return last or 0

    def _wait(
        self,
        key: tuple[str, str],
        parked: dict[int, Parked],
        envelope: Envelope,
        stream_sequence: int,
        skip: frozenset[int],
        folded: Folded,
    ) -> bool:
        """Put an event behind the dead letters of its aggregate; say whether no projection is left to fold it."""
        left = False
        for index, projection in enumerate(self.projections):
            if projection.aggregate != key[0] or index in skip:
                continue
            since = parked.get(index)
            if since is None or envelope.sequence < since.since:
                left = True
            else:
                head = envelope.sequence == since.since
                folded.letters.append(
                    Letter(index, key, envelope.sequence, stream_sequence, since.error, head and since.transient)
                )
        return not left

    def park(self, failure: HandlerFailed) -> None:
        """Let this aggregate's events wait, for this projection, from the failed one on."""
        waiting = self.parked.setdefault(failure.aggregate, {})
        for index, projection in enumerate(self.projections):
            if projection.aggregate == failure.aggregate[0] and failure.projection in (EVERY, index):
                known = waiting.get(index)
                if known is None or known.since > failure.sequence:
                    waiting[index] = Parked(failure.sequence, failure.error, failure.transient)


def _no_record(*_values: Any) -> Any:
    raise TypeError("an Sql projection has no records")
