"""Finds the events that have made a row what it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from sqlalchemy import Connection, Engine, types

from aggregates import InvalidId
from kernel.app import App
from kernel.log.base import EventLog, Stored
from kernel.projector.row_history import KeyedRow, RowStep, row_steps, tally_steps
from projections import exclusions
from projections.codec import Refused
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.fold import Plan
from projections.generations import live_generation
from projections.keyed import RowsWait
from projections.naming import table_of
from projections.parked import Key

READ = 8_000


def projection_of(app: App, table: str) -> DeclaredProjection:
    """Return the projection that fills a table.

    Raises:
        SchemaError: none does, or its handlers write SQL of their own.
    """
    for declared in app.projections:
        for model in declared.models:
            if table in (table_of(model).key, table_of(model).name):
                if declared.kind == "sql":
                    raise SchemaError(
                        f"{declared.name} is an Sql projection: what its handlers write to {table}, only they know"
                    )
                return declared
    known = sorted(table_of(model).key for declared in app.projections for model in declared.models)
    raise SchemaError(f"no projection of {app.name} fills a table {table!r}; there is {', '.join(known) or 'none'}")


async def blame(
    app: App,
    log: EventLog,
    engine: Engine,
    table: str,
    key: Sequence[str],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[RowStep]:
    """Return the events that have changed a row, in order.

    Of the row of one aggregate its events are read, and for other rows the whole log.

    Args:
        table: of a `Rows` or a `Tallies` projection.
        key: the row's key, by column, as text.
        progress: called with the commits of the log that were read, and all of them.

    Raises:
        SchemaError: no such table, or a key that is none of its.
        LogError, sqlalchemy.exc.DBAPIError: the log or the database failed.
    """
    declared = projection_of(app, table)
    plan = exclusions.plan_of(app.plan(engine.dialect), declared.name)

    def load() -> None:
        with reads(engine).connect() as connection:
            _load(connection, plan, declared)

    await asyncio.to_thread(load)
    entry = _key_of(plan, key)
    if declared.keyed:
        return await _blame_keyed(log, plan.apart(), entry, progress)
    if declared.kind == "rows":
        own = declared.row_type, str(entry[0])
        stored = await log.read_subject(log.subjects.address(*own).subject)
        return [step for step in row_steps(plan, own, stored) if step.changed or step.error]
    return await _blame_tally(log, plan, declared, entry, progress)


async def _blame_tally(
    log: EventLog, plan: Plan, declared: DeclaredProjection, entry: Sequence[Any], progress: Callable[[int, int], None]
) -> list[RowStep]:
    totals: dict[str, Any] = {}
    found: list[RowStep] = []
    async for key, stored in _commits(log, progress):
        if key[0] in declared.aggregates:
            for step in tally_steps(plan, entry, key, stored):
                changed = {
                    name: (totals.get(name, 0), totals.get(name, 0) + added)
                    for name, (_, added) in step.changed.items()
                }
                totals |= {name: after for name, (_, after) in changed.items()}
                found.append(replace(step, changed=changed, row=dict(totals)))
    return found


async def _blame_keyed(
    log: EventLog, plan: Plan, entry: Sequence[Any], progress: Callable[[int, int], None]
) -> list[RowStep]:
    row = KeyedRow(plan, entry)
    try:
        return [
            step
            async for key, stored in _commits(log, progress)
            for step in row.fold(key, stored)
            if step.changed or step.error
        ]
    except RowsWait as wait:
        raise SchemaError(f"only a newer program can tell: {wait}") from wait


async def _commits(log: EventLog, progress: Callable[[int, int], None]) -> AsyncIterator[tuple[Key, Stored]]:
    """Yield the whole log's commits with the type and the id of their aggregates."""
    info = await log.info()
    reader = await log.read(0)
    done = at = 0
    try:
        while at < info.last:
            batch = await reader.next(READ, timeout=1.0)
            for stored in batch.commits:
                try:
                    address = log.subjects.parse(stored.subject)
                except InvalidId:
                    continue
                yield (address.aggregate, address.id), stored
            if batch.commits:
                at = batch.commits[-1].sequence
            done += len(batch.commits)
            progress(done, info.commits)
    finally:
        await reader.close()


def _load(connection: Connection, plan: Plan, declared: DeclaredProjection) -> None:
    exclusions.load_skipped(connection, plan)
    live = live_generation(connection, declared)
    if live is not None:
        exclusions.load_parked(connection, plan, [live])


def _key_of(plan: Plan, key: Sequence[str]) -> list[Any]:
    codec = plan.codecs[0]
    assert codec is not None, "an Sql projection was refused before"
    columns = codec.columns.columns[: codec.columns.keys]
    names = ", ".join(str(column.name) for column in columns)
    if len(key) != len(columns):
        raise SchemaError(f"the key of {codec.columns.table.key} is ({names}): give {len(columns)} values")
    entry = []
    for text, column, own in zip(key, columns, codec.codecs, strict=False):
        try:
            entry.append(own.normalise(_parsed(column.type, text)))
        except (Refused, ValueError, KeyError, TypeError, ArithmeticError, NotImplementedError) as error:
            where = f"{codec.columns.table.key}.{column.name}"
            raise SchemaError(f"{text!r} can't be {where}: {type(error).__name__}: {error}") from None
    return entry


def _parsed(type_: types.TypeEngine[Any], text: str) -> Any:
    """Return the value that a person has typed."""
    kind = type_.python_type
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if issubclass(kind, Enum):
        return kind[text]
    parse: Callable[[str], Any] = getattr(kind, "fromisoformat", kind)
    return parse(text)
