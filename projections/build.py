"""Folds a whole log into a new generation, with a dictionary of records instead of actors and with large windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy import Connection

from aggregates.commit import Envelope
from projections.database import reads
from projections.errors import HandlerFailed
from projections.fold import Folded, Plan
from projections.parked import Key
from projections.unit_of_work import Unreadable, Writer

MAX_CACHED = 500_000
"""Most aggregates whose rows are kept in memory between windows. Beyond it, rows are read back from the table."""
MAX_CACHED_BYTES = 512_000_000
"""Most bytes of commits whose content may be in the rows in memory."""

Groups = Mapping[Key, Sequence[tuple[int, Sequence[Envelope]]]]


class Build:
    """The rows of one generation while it is built.

    Args:
        plan: plan of this one projection.
        writer: writer of the new generation.
        empty: nothing has been folded into it yet.
    """

    def __init__(self, plan: Plan, writer: Writer, empty: bool = True) -> None:
        self.plan, self.writer = plan, writer
        self._cache: dict[tuple[str, str], tuple[list[Any], int, int | None]] = {}
        self._complete = empty
        self._size = 0
        self.unreadable: list[Unreadable] = []

    def missing(self, keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the aggregates whose stored rows must be loaded before `fold`."""
        if self._complete:
            return []
        return [key for key in keys if key not in self._cache]

    def load(self, keys: Sequence[tuple[str, str]], connection: Connection | None = None) -> None:
        """Read the stored rows of these aggregates back into memory.

        Args:
            connection: read on this connection, to see the uncommitted writes of its transaction.
        """
        by_aggregate: dict[str, list[str]] = {}
        for aggregate, aggregate_id in keys:
            by_aggregate.setdefault(aggregate, []).append(aggregate_id)
        if not by_aggregate:
            return
        with nullcontext(connection) if connection else reads(self.writer.engine).connect() as reading:
            for aggregate, ids in by_aggregate.items():
                loaded, unreadable = self.writer.load_rows(reading, aggregate, ids)
                kept = self.writer.load_kept(reading, aggregate, loaded)
                self.unreadable += unreadable
                for aggregate_id, rows in loaded.items():
                    self._cache[aggregate, aggregate_id] = (rows, -1, kept.get(aggregate_id))

    def note_read(self, size: int) -> None:
        """Note that so many bytes of commits are going to be folded: the records may hold as much of them."""
        self._size += size

    def fold(self, groups: Groups) -> Folded:
        """Fold a window, sorted by aggregate. Aggregates that fail are parked in the plan, and folded no further."""
        plan, cache = self.plan, self._cache
        folded = Folded(plan)
        width = len(plan.projections)
        unreadable, self.unreadable = self.unreadable, []
        for row in unreadable:
            if row.aggregate in groups:
                first = groups[row.aggregate][0][1][0]
                failure = HandlerFailed(row.index, row.aggregate, first.sequence, row.error)
                plan.park(failure)
                folded.failures.append(failure)
        for key, commits in groups.items():
            known = cache.get(key)
            # a build begins with the first event of every aggregate
            rows, last, kept = known if known is not None else ([None] * width, -1, 0)
            last = plan.fold(key[0], key[1], rows, commits, folded, None if last < 0 else last, kept=kept)
            cache[key] = (rows, last, None)
        return folded

    def trim(self) -> None:
        """Keep memory bounded. Call it only when all folded rows are written."""
        if len(self._cache) > MAX_CACHED or self._size > MAX_CACHED_BYTES:
            self.forget()

    def forget(self, keys: Iterable[Key] | None = None) -> None:
        """Forget the cached rows of these aggregates, or of all. From now on they are read back from the table."""
        if keys is None:
            self._cache.clear()
            self._size = 0
        else:
            for key in keys:
                self._cache.pop(key, None)
        self._complete = False
