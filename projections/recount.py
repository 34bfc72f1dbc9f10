"""Folds the events of a batch again for one projection, without those of parked aggregates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aggregates.commit import Envelope
from projections.fold import Folded, Plan
from projections.parked import Key
from projections.projection import Tally

if TYPE_CHECKING:
    from projections.unit_of_work import Batch


def events_of(plan: Plan, index: int, batch: Batch) -> Iterator[tuple[Key, int, Envelope]]:
    """Yield the events of a batch that a projection folds, by aggregate: those before the aggregate was parked."""
    aggregates = plan.projections[index].aggregates
    for key, commits, skip in batch:
        if key[0] not in aggregates or index in skip:
            continue
        parked = plan.parked.get(key, {}).get(index)
        for stream_sequence, envelopes in commits:
            for envelope in envelopes:
                if parked is None or envelope.sequence < parked.since:
                    yield key, stream_sequence, envelope


def recount(plan: Plan, index: int, batch: Batch) -> Tally[Any]:
    """Return the increments of a batch without the events at which aggregates are parked, or later ones."""
    apart, others = plan.apart(), others_than(plan, index)
    folded = Folded(apart)
    rows: list[Any] = [None] * len(plan.projections)
    for key, stream_sequence, envelope in events_of(plan, index, batch):
        apart.fold(*key, rows, [(stream_sequence, [envelope])], folded, None, others)
    check_again(folded)
    return folded.tallies[index]


def check_again(folded: Folded) -> None:
    """Raise the error of a handler that has failed at an event which it had folded before.

    Only this call has its increments: the batch has to be folded again.
    """
    if folded.failures:
        raise folded.failures[0]


def others_than(plan: Plan, index: int) -> frozenset[int]:
    """Return all projections of a plan but one."""
    return frozenset(range(len(plan.projections))) - {index}
