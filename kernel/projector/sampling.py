"""Compares single rows with the events of their aggregates: a sample of a table, or some rows again and again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from aggregates.commit import Envelope
from kernel.app import App
from kernel.log.base import EventLog, Stored
from kernel.projector.row_history import commits_of, differs_since, row_steps
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import ROWS_COMPARED
from projections import exclusions
from projections.bulk import Bulk
from projections.comparison import RowDifference, TableComparison, changed_row
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError, reason
from projections.fold import Folded, Plan
from projections.generations import live_generation
from projections.records import SEQUENCE
from projections.row_codec import RowCodec

logger = logging.getLogger("eskernel.projector")
MOST_EVENTS = 2_000
"""Rows with more events are passed over by the regular comparison."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Some rows of one table.

    Attributes:
        view: name of the view that shows the table.
        records: the rows.
        last: key of the last one; None if there is none.
        unreadable: why rows can't be read, by aggregate id.
    """

    view: str
    records: list[Any]
    last: Any
    unreadable: dict[str, str]


class RowSample:
    """Rows of one `Rows` projection, read and compared.

    Args:
        plan: of this one projection.
    """

    def __init__(self, log: EventLog, engine: Engine, plan: Plan) -> None:
        (self.declared,) = plan.projections
        codec = plan.codecs[0]
        if codec is None or codec.counting or codec.keyed:
            kind = f"is a {self.declared.kind.title()} projection"
            what = "has rows with a key of their own" if self.declared.keyed else kind
            raise SchemaError(
                f"{self.declared.name} {what}: events of many aggregates are in "
                "each row of such tables; verify it as a whole, without --sample"
            )
        self._log, self._engine, self._plan, self._codec = log, engine, plan, codec

    async def read(self, count: int, after: Any = None, *, anywhere: bool = False) -> Sampled:
        """Read rows in the order of their keys.

        Args:
            after: key of the row before the first one; None for the first rows of the table.
            anywhere: read random rows of the whole table instead.

        Raises:
            SchemaError: the projection has not been built.
        """

        def load() -> Sampled:
            with reads(self._engine).connect() as connection:
                return self._load(connection, count, after, anywhere, None)

        return await asyncio.to_thread(load)

    def key_of(self, record: Any) -> Any:
        """Return the key of a row, for `read`."""
        return getattr(record, self._codec.columns.names[0])

    def events_of(self, record: Any) -> int:
        """Return how many events a row was folded from."""
        return int(getattr(record, SEQUENCE))

    async def compare(self, records: Sequence[Any]) -> list[RowDifference]:
        """Compare rows with what their events lead to, each at its own place. Return the differences."""
        found = []
        for record in records:
            if await self._difference(record) is None:
                continue
            # the row may have been read before an event was skipped, or while it was replaced
            again = await self._again(record)
            difference = await self._difference(again) if again is not None else None
            if difference is not None:
                found.append(difference)
        return found

    async def _again(self, record: Any) -> Any:
        key = self.key_of(record)

        def load() -> Any:
            with reads(self._engine).connect() as connection:
                sampled = self._load(connection, 1, None, anywhere=False, key=key)
                return sampled.records[0] if sampled.records else None

        return await asyncio.to_thread(load)

    def _load(self, connection: Connection, count: int, after: Any, anywhere: bool, key: Any) -> Sampled:
        live = live_generation(connection, self.declared)
        if live is None:
            raise SchemaError(f"{self.declared.name} version {self.declared.version} has not been built")
        self._plan.parked.skipped.clear()
        exclusions.load_skipped(connection, self._plan)
        ((view, table),) = live.views.items()
        own = table.c[self._codec.columns.columns[0].name]
        query = select(own).limit(count).order_by(func.random() if anywhere else own)
        if key is not None:
            query = query.where(own == key)
        elif after is not None:
            query = query.where(own > after)
        keys = list(connection.scalars(query))
        bulk = Bulk(self._codec, table, connection.dialect)
        found, failed = bulk.load(connection, list(map(str, keys)))
        unreadable = {aggregate_id: reason(error) for aggregate_id, error in failed.items()}
        return Sampled(str(view), list(found.values()), keys[-1] if keys else None, unreadable)

    async def _difference(self, record: Any) -> RowDifference | None:
        aggregate = self.declared.row_type, self._codec.id_of(record)
        stored = await self._log.read_subject(self._log.subjects.address(*aggregate).subject)
        return await asyncio.to_thread(self._compare, record, aggregate, stored)

    def _compare(self, record: Any, key: tuple[str, str], stored: Sequence[Stored]) -> RowDifference | None:
        until, plan = self.events_of(record), self._plan.apart()
        rows: list[Any] = [None]
        commits = _commits(stored, until)
        if commits:
            plan.fold(*key, rows, commits, Folded(plan), 0)
        if any(parked.waits for parked in plan.parked.get(key, {}).values()):
            return None  # a newer program has folded the row: this one can't tell
        if _carried(self._codec, record) == _carried(self._codec, rows[0]):
            return None
        names = [
            (name, str(column.name))
            for name, column in zip(self._codec.columns.names, self._codec.columns.columns, strict=True)
        ]
        there = {shown: getattr(record, name) for name, shown in names}
        own = {names[0][1]: there.pop(names[0][1])}
        if rows[0] is None:
            return RowDifference("extra", own, there, {})
        made = {shown: getattr(rows[0], name) for name, shown in names[1:]}
        difference = changed_row(own, there, made)
        steps = [step for step in row_steps(self._plan.apart(), key, stored) if step.event.sequence <= until]
        return replace(difference, since=differs_since(difference, steps))


def _commits(stored: Sequence[Stored], until: int) -> list[tuple[int, list[Envelope]]]:
    parts = (
        (sequence, [envelope for envelope in envelopes if envelope.sequence <= until])
        for sequence, envelopes in commits_of(stored)
    )
    return [(sequence, envelopes) for sequence, envelopes in parts if envelopes]


def _carried(codec: RowCodec, record: Any) -> object:
    return None if record is None else [list(row) for row in codec.carry([record])[0]]


async def verify_sample(
    app: App, log: EventLog, engine: Engine, declared: DeclaredProjection, count: int
) -> TableComparison:
    """Compare random rows of a `Rows` projection with their aggregates' events.

    Raises:
        SchemaError: the projection has not been built, or its rows are not those of aggregates.
        LogError, sqlalchemy.exc.DBAPIError: the log or the database failed.
    """
    sample = RowSample(log, engine, exclusions.plan_of(app.plan(engine.dialect), declared.name))
    sampled = await sample.read(count, anywhere=True)
    for aggregate_id, why in sampled.unreadable.items():
        raise SchemaError(
            f"{declared.name}: the row of {declared.row_type} {aggregate_id} can't be read: {why}; "
            f"`eskernel rebuild --aggregate {declared.row_type}/{aggregate_id}` makes it again"
        )
    found = await sample.compare(sampled.records)
    changed = sum(difference.what == "changed" for difference in found)
    columns: dict[str, int] = {}
    for difference in found:
        for name in difference.stored if difference.what == "changed" else ():
            columns[name] = columns.get(name, 0) + 1
    return TableComparison(
        sampled.view, len(sampled.records), changed, 0, len(found) - changed, columns, examples=found
    )


class TablePatrol:
    """Compares some rows after the others, of all `Rows` projections, for as long as the service runs.

    Args:
        rows: number of rows at a time.
    """

    def __init__(self, app: App, log: EventLog, engine: Engine, rows: int) -> None:
        self._rows = rows
        plan = app.plan(engine.dialect)
        self._samples = [
            RowSample(log, engine, exclusions.plan_of(plan, declared.name))
            for declared in app.projections
            if declared.kind == "rows" and not declared.keyed
        ]
        # workers, and starts of one worker, begin at different tables
        random.shuffle(self._samples)
        self._after: dict[str, Any] = {}

    async def compare_rows(self) -> None:
        """Compare the next rows of the next projection; log and count the differences."""
        if not self._samples:
            return
        sample = self._samples.pop(0)
        self._samples.append(sample)
        name = sample.declared.name
        try:
            sampled = await sample.read(self._rows, self._after.get(name))
        except SchemaError:
            return  # it is being built
        read = len(sampled.records) + len(sampled.unreadable)
        self._after[name] = sampled.last if read == self._rows else None
        short = [record for record in sampled.records if sample.events_of(record) <= MOST_EVENTS]
        differing = await sample.compare(short)
        ROWS_COMPARED.labels(projection=name, outcome="same").inc(len(short) - len(differing))
        ROWS_COMPARED.labels(projection=name, outcome="differs").inc(len(differing) + len(sampled.unreadable))
        for aggregate_id, why in sampled.unreadable.items():
            logger.error(
                "%s: the row of %s %s can't be read: %s; `eskernel rebuild --aggregate %s/%s` makes it again",
                name, sample.declared.row_type, aggregate_id, why, sample.declared.row_type, aggregate_id,
                extra=about(sample.declared.row_type, aggregate_id, projection=name),
            )  # fmt: skip
        for difference in differing:
            (aggregate_id,) = map(str, difference.key.values())
            logger.error(
                "%s: the row of %s %s is not what the log says%s%s. See all with `eskernel projections verify %s`; "
                "`eskernel rebuild --aggregate %s/%s` makes this row again",
                name, sample.declared.row_type, aggregate_id,
                f" since event {difference.since}" if difference.since else "",
                f", in {', '.join(difference.folded)}" if difference.folded else "",
                name, sample.declared.row_type, aggregate_id,
                extra=about(sample.declared.row_type, aggregate_id, projection=name),
            )  # fmt: skip
