"""Steps: what one handler does with one event. A `Plan` compiles them at start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aggregates.commit import Envelope
from aggregates.meta import Meta
from projections.declaration import DeclaredProjection, EventHandler
from projections.projection import DROP, Recorded
from projections.row_codec import RowCodec

if TYPE_CHECKING:
    from projections.fold import Folded
    from projections.row_event import RowEvent

Step = Callable[[list[Any], str, Any, Envelope, int, "Folded"], None]
RowStep = Callable[[list[Any], str, "RowEvent", "Folded"], None]


def make_step(
    index: int,
    projection: DeclaredProjection,
    place: int,
    handler: EventHandler,
    aggregate: str,
    codec: RowCodec | None,
    make: Callable[..., Any],
) -> Step:
    """Return the step of a handler for the events of an aggregate type.

    Args:
        index, place: of the projection in its plan, and of the handler in the projection.
        make: makes a new record for an aggregate's id.
    """
    function, instance, wants_meta = handler.function, projection.instance, handler.wants_meta
    settle = codec.settle if codec is not None else None

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
        elif settle is not None:
            settle(row)

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
        folded.calls[index].append(Recorded(event, envelope, aggregate, aggregate_id, stream_sequence, place))

    return {"rows": fold_row, "tallies": fold_tally, "sql": collect}[projection.kind]


def make_row_steps(index: int, projection: DeclaredProjection, codec: RowCodec) -> dict[type, RowStep]:
    """Return the steps of a projection whose rows have a key of their own, by event class."""
    return {
        cls: _row_step(index, projection, handler, codec) for handler in projection.handlers for cls in handler.events
    }


def _row_step(index: int, projection: DeclaredProjection, handler: EventHandler, codec: RowCodec) -> RowStep:
    function, instance, wants_meta = handler.function, projection.instance, handler.wants_meta
    make, settle = codec.new, codec.settle

    def fold_row(rows: list[Any], key: str, event: RowEvent, folded: Folded) -> None:
        row = rows[index]
        if row is None:
            row = rows[index] = make(*event.key)
        result = (
            function(instance, row, event.event, event.meta) if wants_meta else function(instance, row, event.event)
        )
        if result is DROP:
            rows[index] = folded.rows[index][key] = None
        elif settle is not None:
            settle(row)

    return fold_row
