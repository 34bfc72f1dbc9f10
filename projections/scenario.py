"""Specifies a projection in three lines, without servers: given an aggregate's events, then the rows.

    projected(Balances).given("alice", Deposited(500), Withdrawn(100)).then(Balance(account="alice", cents=400))

It runs the production code, folds and statements, on an SQLite database in memory, or on the database of a URL:

    projected(Balances, database="postgresql://user@host/name").given(...).then(...)

Events are encoded and decoded. What is not as specified raises `AssertionError`, also where `python -O` removes
`assert` statements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Column, Engine, insert, select
from sqlalchemy import inspect as inspect_model
from sqlalchemy.orm import Mapper

from aggregates.commit import Decision, decode, encode
from aggregates.declaration import AggregateType, declare
from aggregates.errors import DeclarationError
from projections.declaration import DeclaredProjection, aggregates_of, declare_projection, keyword_problems
from projections.errors import HandlerFailed, SchemaError
from projections.fold import Commits, Folded, Plan
from projections.generations import create, show
from projections.keyed import Routing
from projections.parked import Key
from projections.projection import Projection
from projections.scratch import scratch
from projections.tables import metadata, stream
from projections.unit_of_work import Writer


@dataclass(frozen=True)
class ProjectionScenario:
    """A scenario. Each step returns a new scenario."""

    projection: type[Projection]
    history: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    time: str = "2013-01-01T12:00:00Z"
    database: str | None = None

    def given(self, aggregate_id: str, *events: Any) -> ProjectionScenario:
        """Add events of one aggregate. Call it again for further events, also of other aggregates.

        Where the projection has several aggregate types, the events tell which one it is.
        """
        return replace(self, history=(*self.history, (aggregate_id, events)))

    def at(self, time: str) -> ProjectionScenario:
        """Set the moment, RFC 3339, that handlers see as `meta.time`."""
        return replace(self, time=time)

    def then(self, *rows: Any) -> None:
        """Assert that the projection's tables contain exactly these rows, given as instances of their models.

        A column that isn't set in an expected row is not compared.
        """
        found = self.rows()
        unmatched = list(found)
        for row in rows:
            wanted = {name: getattr(row, name) for name in _set_columns(row)}
            match = next(
                (
                    (model, values)
                    for model, values in unmatched
                    if model is type(row) and wanted.items() <= values.items()
                ),
                None,
            )
            if match is None:
                raise AssertionError(f"no row {type(row).__name__}({wanted}); there is {_plain(unmatched)}")
            unmatched.remove(match)
        if unmatched:
            raise AssertionError(f"rows that were not expected: {_plain(unmatched)}")

    def fails(self, reason: str) -> None:
        """Assert that a handler raises with this text in its message: the kernel would park the aggregate."""
        try:
            self.rows()
        except HandlerFailed as failure:
            if reason not in failure.error:
                raise AssertionError(f"a handler failed with {failure.error!r}") from failure
        else:
            raise AssertionError("no handler failed")

    def rows(self) -> list[tuple[type, dict[str, Any]]]:
        """Return every row of the projection's tables: its model, and its values by attribute name.

        Raises:
            DeclarationError: the projection or its aggregate has problems.
            HandlerFailed: a handler raised, or the database refuses a row.
            SchemaError: the database can't be used; what to do.
            sqlalchemy.exc.DBAPIError: the database can't be reached, or refuses the tables.
        """
        if problems := keyword_problems(self.projection):
            raise DeclarationError(problems)
        aggregates = [declare(of) for of in aggregates_of(self.projection)]
        declared = declare_projection(self.projection, aggregates)
        if self.database is not None:
            for model in declared.models:
                if schema := model.__table__.schema:  # type: ignore[attr-defined]
                    raise SchemaError(
                        f"{model.__name__} is in the schema {schema!r}, where a scenario could touch what exists; "
                        "run it without `database`"
                    )
        with scratch(self.database, declared.tables) as engine:
            return self._rows(engine, aggregates, declared)

    def _rows(
        self, engine: Engine, aggregates: Sequence[AggregateType[Any]], declared: DeclaredProjection
    ) -> list[tuple[type, dict[str, Any]]]:
        plan = Plan(aggregates, [declared], engine.dialect)
        # without a look at what exists: another schema may have tables of these names
        metadata.create_all(engine, checkfirst=False)
        with engine.begin() as connection:
            connection.execute(insert(stream).values(app="scenario", created="", partitions=1, epoch=0))
            made = create(connection, declared, [0])
            show(connection, made)
        writer = Writer(engine, plan, [made], epoch=0)
        folded = Folded(plan)
        rows: dict[Key, list[Any]] = {}
        versions: dict[Key, int] = {}
        batch: list[tuple[Key, Commits, frozenset[int]]] = []
        for place, (aggregate_id, events) in enumerate(self.history, 1):
            of = _aggregate_of(events, aggregates)
            key = of.name, aggregate_id
            version = versions.get(key, 0)
            encoded = [of.event_types[type(event)].encode(event) for event in events]
            stored = encode(f"/scenario/{of.name}", aggregate_id, [Decision("", encoded)], version, self.time)
            commits = [(place, decode(stored))]
            versions[key] = version + len(events)
            for own, routed in _routed(plan, key, commits):
                batch.append((own, routed, frozenset()))
                last = version if own == key else 0
                plan.fold(*own, rows.setdefault(own, [None]), routed, folded, last or None)
        failures = folded.failures + writer.commit(writer.freeze(folded, [], lambda _: (0, b""), batch))
        if failures:
            raise failures[0] from failures[0].__cause__
        found: list[tuple[type, dict[str, Any]]] = []
        with engine.connect() as connection:
            for model in declared.models:
                columns = _columns(model)
                for row in connection.execute(select(*columns.values())):
                    found.append((model, dict(zip(columns, row, strict=True))))
        return found


def _routed(plan: Plan, key: Key, commits: Commits) -> Iterator[tuple[Key, Commits]]:
    """Yield what commits of an aggregate are folded into: its own row, or those that have a key of their own."""
    for router in plan.routers:
        routing = Routing(router, {})
        routing.add(key, commits)
        for failure, _ in routing.left_out:
            raise failure from failure.__cause__
        yield from (((router.name, text), own) for text, own in routing.rows())
    if not plan.routers:
        yield key, commits


def _aggregate_of(events: Sequence[Any], aggregates: Sequence[AggregateType[Any]]) -> AggregateType[Any]:
    """Return the first of the projection's aggregates that has all of these events."""
    for declared in aggregates:
        if all(type(event) in declared.event_types for event in events):
            return declared
    names = ", ".join(declared.name for declared in aggregates)
    raise DeclarationError([f"none of {names} has all of {', '.join(type(event).__name__ for event in events)}"])


def _columns(model: type) -> dict[str, Column[Any]]:
    mapper: Mapper[Any] = inspect_model(model)
    return {prop.key: prop.columns[0] for prop in mapper.column_attrs}  # type: ignore[misc]


def _set_columns(row: Any) -> list[str]:
    return [name for name in _columns(type(row)) if name in vars(row)]


def _plain(rows: list[tuple[type, dict[str, Any]]]) -> list[str]:
    return [f"{model.__name__}({values})" for model, values in rows]


def projected(projection: type[Projection], *, database: str | None = None) -> ProjectionScenario:
    """Start a scenario for a projection class.

    Args:
        database: URL of the database to run on; SQLite in memory by default. On PostgreSQL each step that looks at rows
            makes a schema of its own and drops it; for SQLite the URL names a file that does not exist, which is
            removed afterwards. Nothing that exists in the database is touched.
    """
    return ProjectionScenario(projection, database=database)
