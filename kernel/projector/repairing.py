"""Makes the rows of one aggregate again, from the log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Engine

from aggregates.commit import Envelope
from kernel.app import App
from kernel.errors import Unavailable
from kernel.log.base import EventLog, Stored
from kernel.projector.row_history import commits_of
from projections.errors import SchemaError
from projections.exclusions import plan_of
from projections.repair import Repaired, repair


async def repair_aggregate(
    app: App, log: EventLog, engine: Engine, aggregate: str, aggregate_id: str, projection: str | None = None
) -> list[Repaired]:
    """Replace an aggregate's rows by what its events lead to, while the service runs.

    Args:
        projection: only its row of this `Rows` projection; None: of all.

    Raises:
        NotDeclared: the app has no such aggregate, or no such projection.
        SchemaError: the projection folds another aggregate, is not built, or its rows are not those of aggregates.
        HandlerFailed: the program fails at an event that it has folded before.
        LogError, sqlalchemy.exc.DBAPIError: the log or the database failed. Nothing has changed.
    """
    app.type_of(aggregate)
    if projection is not None:
        declared = app.projection(projection)
        if aggregate not in declared.aggregates:
            raise SchemaError(f"{projection} folds events of {declared.of}, and not of {aggregate}")
        chosen = [declared]
    else:
        chosen = [
            each for each in app.projections if aggregate in each.aggregates and each.kind == "rows" and not each.keyed
        ]
        if not chosen:
            raise SchemaError(f"no Rows projection has a row for each {aggregate}; rebuild the others as a whole")
    address = log.subjects.address(aggregate, aggregate_id)
    before, loop = await log.read_subject(address.subject), asyncio.get_running_loop()

    def read() -> list[tuple[int, list[Envelope]]]:
        # what was appended since the first reading may be in the row already
        return list(
            commits_of(asyncio.run_coroutine_threadsafe(_read_whole(log, address.subject, before), loop).result())
        )

    plan = app.plan(engine.dialect)
    key = aggregate, aggregate_id
    return [
        await asyncio.to_thread(partial(repair, engine, plan_of(plan, each.name), key, address.partition, read))
        for each in chosen
    ]


async def _read_whole(log: EventLog, subject: str, before: Sequence[Stored]) -> list[Stored]:
    last = await log.last(subject)
    stored = await log.read_subject(subject, known=before)
    if last is not None and (not stored or stored[-1].sequence < last.sequence):
        raise Unavailable(f"reading {subject}: the server's replica is behind its leader")
    return stored
