"""Rows under a key of their own: which rows an event is folded into, and the folding of one row.

Such a row is kept, parked and retried as an aggregate is. The projection's name stands for the aggregate's type, the
row's key as a text for the id, and an event's place in the log for its sequence. Its partition is that of this id: the
owner of the partition reads the events of all partitions, and folds those of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import msgspec

from aggregates import InvalidMessage
from aggregates.commit import Envelope, decode
from aggregates.declaration import AggregateType
from aggregates.errors import NewerEvent
from aggregates.meta import Meta
from projections.codec import Refused
from projections.declaration import DeclaredProjection, KeyFunction
from projections.errors import HandlerFailed, reason
from projections.parked import Key, Letter
from projections.row_codec import RowCodec
from projections.row_event import BITS, RowEvent, parts_of
from projections.steps import RowStep

if TYPE_CHECKING:
    from projections.fold import Commits, Folded, Plan

_sequence = attrgetter("sequence")
_NOTHING: frozenset[tuple[int, int]] = frozenset()


class RowsWait(Exception):
    """Only a newer program can read an event, so that this one does not know which rows it belongs to.

    Attributes:
        projection: index of the projection, which stays where it is: all of its rows wait.
    """

    def __init__(self, projection: int, why: str) -> None:
        super().__init__(why)
        self.projection = projection


_Decoders = tuple[int, Callable[[bytes], Any], Callable[[msgspec.Raw, int], Any]]
"""The present schema version of an event, what decodes it, and what decodes the others."""


class _Origin(msgspec.Struct):
    source: str
    subject: str


_origins = msgspec.json.Decoder(list[_Origin]).decode


class Router:
    """Finds the rows of one projection that events belong to.

    Args:
        index: of the projection in its plan.
        types: the app's aggregates.

    Attributes:
        name: the projection's.
        aggregates: types whose events it folds.
        wants_meta: the key is of the event's metadata too.
    """

    def __init__(
        self,
        index: int,
        declared: DeclaredProjection,
        key: KeyFunction,
        types: Sequence[AggregateType[Any]],
        codec: RowCodec,
    ) -> None:
        self.index, self.name, self.aggregates = index, declared.name, frozenset(declared.aggregates)
        self._types = {each.name: each for each in types if each.name in self.aggregates}
        self._codec = codec
        # texts alone: values of other types may be equal, and not all be keys
        self._text_key = lru_cache(65_536)(codec.key_of)
        self._function, self._instance, self.wants_meta = key.function, declared.instance, key.wants_meta
        handled = {cls for handler in declared.handlers for cls in handler.events}
        self._events: dict[str, dict[str, _Decoders | None]] = {
            each.name: {
                name: (event.version, msgspec.json.Decoder(event.cls).decode, event.decode)
                if event.cls in handled
                else None
                for name, event in each.events.items()
            }
            for each in self._types.values()
        }

    def event_of(self, aggregate: str, envelope: Envelope) -> Any:
        """Return the decoded event; None if no handler takes it.

        Raises:
            NewerEvent: only a newer program can read it.
            InvalidMessage: it can't be read.
        """
        try:
            known = self._events[aggregate][envelope.type]
        except KeyError:
            self._types[aggregate].stored_event(envelope.type)
            raise
        if known is None:
            return None
        version, decode_present, decode_any = known
        if envelope.dataversion == version:
            return decode_present(envelope.data)
        return decode_any(envelope.data, envelope.dataversion)

    def keys_of(self, event: Any, meta: Meta | None) -> Iterable[tuple[str, tuple[Any, ...]]]:
        """Return the keys of the rows that an event belongs to: as a text, and by column.

        Raises:
            Exception: of the app's own function, or `Refused`.
        """
        if self.wants_meta:
            found = self._function(self._instance, event, meta)
        else:
            found = self._function(self._instance, event)
        if type(found) is str:
            return (self._text_key(found),)
        if found is None:
            return ()
        if isinstance(found, Iterable) and not isinstance(found, str | bytes | tuple):
            return dict(map(self._codec.key_of, found)).items()
        return (self._codec.key_of(found),)

    def restore(self, payload: bytes, order: int, key: str) -> Envelope:
        """Return the event of a stored commit that belongs to a row.

        Raises:
            InvalidMessage: it does not, with this program.
        """
        stream_sequence, place = parts_of(order)
        try:
            envelope, origin = decode(payload)[place], _origins(payload)[place]
        except (IndexError, msgspec.MsgspecError) as error:
            raise InvalidMessage(f"the commit at {stream_sequence} contains no event at {place}: {error}") from None
        aggregate = origin.source.rpartition("/")[2]
        if aggregate not in self._types:
            raise InvalidMessage(f"{self.name} does not fold events of {aggregate}")
        event = self.event_of(aggregate, envelope)
        found = {} if event is None else dict(self.keys_of(event, Meta(envelope, origin.subject, stream_sequence)))
        if key not in found:
            raise InvalidMessage(
                f"the event has no longer the key {key}; `eskernel rebuild {self.name}` folds all anew"
            )
        return cast(Envelope, RowEvent(order, event, found[key], envelope, aggregate, origin.subject))


class Routing:
    """The rows that events of one batch belong to.

    Args:
        skipped: events that a person has skipped, by aggregate: projection index and sequence.
        after: commits up to this stream sequence are passed over.
        wanted: says whether a row, given as its text, is to be folded up to a stream sequence; None: all are.

    Attributes:
        left_out: events whose rows are not known, since their key failed. They are in no row.
    """

    def __init__(
        self,
        router: Router,
        skipped: Mapping[Key, set[tuple[int, int]]],
        after: int = 0,
        wanted: Callable[[str, int], bool] | None = None,
    ) -> None:
        self._router, self._skipped, self._after, self._wanted = router, skipped, after, wanted
        self._rows: dict[str, list[RowEvent]] = {}
        self._sources: dict[str, Key] = {}
        self._mixed: set[str] = set()
        self.left_out: list[tuple[HandlerFailed, Letter]] = []

    def add(self, aggregate: Key, commits: Commits) -> None:
        """Find the rows of the commits of one aggregate.

        Raises:
            RowsWait: only a newer program can.
        """
        router, rows, wanted, (of, aggregate_id) = self._router, self._rows, self._wanted, aggregate
        event_of, keys_of, wants_meta = router.event_of, router.keys_of, router.wants_meta
        skipped = self._skipped.get(aggregate, _NOTHING) if self._skipped else _NOTHING
        for stream_sequence, envelopes in commits:
            if stream_sequence <= self._after:
                continue
            for place, envelope in enumerate(envelopes):
                try:
                    event = event_of(of, envelope)
                    if event is None or (skipped and (router.index, envelope.sequence) in skipped):
                        continue
                    keys = keys_of(event, Meta(envelope, aggregate_id, stream_sequence) if wants_meta else None)
                except NewerEvent as newer:
                    raise RowsWait(router.index, f"{of} {aggregate_id}, event {envelope.sequence}: {newer}") from newer
                except Exception as error:
                    self._leave_out(aggregate, envelope, stream_sequence, error)
                    continue
                for text, key in keys:
                    if wanted is not None and not wanted(text, stream_sequence):
                        continue
                    made = RowEvent(stream_sequence << BITS | place, event, key, envelope, of, aggregate_id)
                    events = rows.get(text)
                    if events is None:
                        rows[text] = [made]
                    else:
                        if events[-1].sequence > made.sequence:
                            self._mixed.add(text)
                        events.append(made)

    def _leave_out(self, aggregate: Key, envelope: Envelope, stream_sequence: int, error: Exception) -> None:
        name = self._router.name
        why = (
            f"its key: {reason(error)}. The event is in no row of {name}: mend the method `key`, and raise the version "
            f"or run `eskernel rebuild {name}`; or skip it"
        )
        failure = HandlerFailed(self._router.index, aggregate, envelope.sequence, why, "handler")
        failure.__cause__ = None if isinstance(error, Refused) else error
        self.left_out.append((failure, Letter(self._router.index, aggregate, envelope.sequence, stream_sequence, why)))

    def rows(self) -> Iterator[tuple[str, Commits]]:
        """Yield the key of each row as a text, and its events in stream order."""
        for text, events in self._rows.items():
            if text in self._mixed:
                events.sort(key=_sequence)
            yield text, cast("Commits", [(event.sequence >> BITS, [event]) for event in events])


def fold_row(
    plan: Plan,
    index: int,
    steps: Mapping[type, RowStep],
    key: Key,
    rows: list[Any],
    commits: Commits,
    folded: Folded,
    last: int | None,
) -> int:
    """Fold events of one row, in stream order, up to the first one that fails. Those behind it are dead letters.

    The arguments and the result are those of `Plan.fold`. There are no gaps to be seen: the checkpoint of the row's
    partition says what was folded. But an event is refused that does not come after those that are in the row.
    """
    text, own = key[1], (index,)
    careful = key in plan.parked or key in plan.parked.skipped
    if last is None and rows[index] is not None:
        last = rows[index].eskernel_sequence
    done = last
    for stream_sequence, events in commits:
        for envelope in events:
            if careful and not plan.parked.divide(key, envelope, stream_sequence, own, folded.letters):
                continue
            event = cast(RowEvent, envelope)
            try:
                if last is not None and event.sequence <= last:
                    raise _FoldedAlready
                steps[type(event.event)](rows, text, event, folded)
            except Exception as error:
                plan.fail_step(index, key, rows, envelope, stream_sequence, folded, error)
                careful = True
            else:
                done = event.sequence
            last = event.sequence
        folded.count += len(events)
    row = rows[index]
    if row is not None and done is not None:
        row.eskernel_sequence = done
        folded.rows[index][text] = row
    return commits[-1][1][-1].sequence


class _FoldedAlready(Exception):
    """An event comes a second time, or after later ones."""

    def __init__(self) -> None:
        super().__init__("the row has folded this event, or later ones, already")
