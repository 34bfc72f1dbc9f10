"""The three kinds of projection: `Rows`, `Tallies` and `Sql`. Users derive their projections from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Final, Generic, Never, TypeVar

import msgspec
from sqlalchemy import Connection, CursorResult, Delete, Executable, Insert, Table, Update

from aggregates import Aggregate, DeclarationError
from aggregates.commit import Envelope
from aggregates.meta import Meta
from projections.errors import SchemaError
from projections.statements import named_tables

M = TypeVar("M")
E = TypeVar("E")


class Drop:
    """The type of `DROP`."""


DROP: Final = Drop()
"""A `Rows` handler returns it to delete the row. A later event starts a new row."""


class Recorded(msgspec.Struct, Generic[E], frozen=True, eq=False, gc=False):
    """An event with its metadata, as `Sql` handlers receive it.

    Attributes:
        event: the decoded event.
    """

    event: E
    _envelope: Envelope
    _aggregate: str
    _aggregate_id: str
    _stream_sequence: int
    _place: int

    @property
    def meta(self) -> Meta:
        """The event's metadata."""
        return Meta(self._envelope, self._aggregate_id, self._stream_sequence)


class Tally(dict[Any, M]):
    """The increments of one batch by key. `tally[key]` creates the entry on first use, with all counters at zero."""

    __slots__ = ("_make",)

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: Any) -> M:
        made: M = self._make(*key) if type(key) is tuple else self._make(key)
        self[key] = made
        return made


class Transaction:
    """The batch's transaction, as `Sql` handlers receive it.

    Args:
        foreign: names of the tables of other projections.
    """

    def __init__(self, connection: Connection, tables: dict[str, Table], foreign: frozenset[str] = frozenset()) -> None:
        self._connection = connection
        self._tables = tables
        self._views = {name.lower(): name for name in tables}
        self._foreign = foreign
        self._mentions = _pattern(tuple(self._views), foreign).search

    def table(self, model: type) -> Table:
        """Return the physical table of the generation being written; the name of the model itself is the view's."""
        return self._tables[model.__table__.key]  # type: ignore[attr-defined]

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """Execute a statement. Only the kernel commits and rolls back.

        Raises:
            SchemaError: the statement names a model of this projection, or its table's name: that is the view, which
                shows another generation while this one is built. Use `tx.table(Model)`. Or it names a table of another
                projection: which of its events are in it while this one is folded, or rebuilt, is not defined.
        """
        written = statement.table if isinstance(statement, Insert | Update | Delete) else None
        if isinstance(written, Table) and written.key in self._tables:
            raise _view_used(written.key)
        result = self._connection.execute(statement, parameters)
        # whatever it was made with, the text is at hand now; if it is wrong, the kernel rolls back what it did
        compiled = result.context.compiled
        made = compiled.string if compiled is not None else result.context.statement
        if self._mentions(made):
            for name in named_tables(made):
                if name in self._views:
                    raise _view_used(self._views[name])
                of_other = _GENERATION.sub("", name)
                if of_other in lowered(self._foreign):
                    raise SchemaError(
                        f"{of_other!r} is the table of another projection; how far that one is when this handler runs "
                        "differs from batch to batch, and in a rebuild: an Sql handler uses the events and its own "
                        "tables only. Fold the other's events here too, with of=(..., ...)"
                    )
        return result


_GENERATION = re.compile(r"__\d+$")


@lru_cache
def _pattern(own: tuple[str, ...], foreign: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern that a statement without these names does not contain: most statements end with this search."""
    parts = [_escaped(own)] if own else []
    if foreign:
        parts.append(f"{_escaped(sorted(foreign))}(?:__\\d+)?")
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)


def _escaped(names: Sequence[str]) -> str:
    return "(?:" + "|".join(re.escape(name.rpartition(".")[2].replace('"', '""')) for name in names) + ")"


@lru_cache
def lowered(names: frozenset[str]) -> frozenset[str]:
    """Return names as `named_tables` returns them."""
    return frozenset(map(str.lower, names))


def _view_used(name: str) -> SchemaError:
    return SchemaError(
        f"{name!r} is the view, which shows another generation while this one is built; in an Sql handler, use "
        "tx.table(Model) instead of the model or its table's name"
    )


_NOT_GIVEN: Any = object()


class Projection:
    """The common base. Derive from `Rows`, `Tallies` or `Sql` instead.

    Class keywords:
        of: the aggregate whose events are projected, or a tuple of several.
        version: raise it when a handler or a table changes; the kernel builds the new version from the log.
        name: the projection's name on the command line and in the database, by default the class name.
    """

    of: ClassVar[type[Aggregate] | tuple[type[Aggregate], ...]]
    version: ClassVar[int]
    name: ClassVar[str]

    def __init_subclass__(
        cls,
        *,
        of: type[Aggregate] | tuple[type[Aggregate], ...] = _NOT_GIVEN,
        version: int = _NOT_GIVEN,
        name: str = _NOT_GIVEN,
        **unknown: Never,
    ) -> None:
        super().__init_subclass__()
        if unknown:
            raise DeclarationError(
                [f"{cls.__name__}: a projection has no keyword {word}; it has of, version and name" for word in unknown]
            )
        # the values are checked when the app is made, so that all problems are reported at once
        given = {"of": of, "version": version, "name": name}
        given = {word: value for word, value in given.items() if value is not _NOT_GIVEN}
        for word, value in given.items():
            setattr(cls, word, value)
        if (given or "of" in vars(cls)) and "name" not in vars(cls):
            cls.name = cls.__name__
        if "of" in vars(cls) and "version" not in vars(cls):
            cls.version = 1


class Rows(Projection, Generic[M]):
    """One row per aggregate: a fold of its events, written once per batch, however many events the batch contains.

    The model's primary key is the aggregate's id. A handler takes the row and the event, and sets the row's columns.
    At the aggregate's first event the row is new and has the columns' defaults. A handler may return `DROP`. The row is
    a light record that belongs to no session.

        class Balances(Rows[Balance], of=Account, version=1):
            @applies
            def deposited(self, row: Balance, event: Deposited) -> None:
                row.cents += event.cents
    """


class Tallies(Projection, Generic[M]):
    """Counters under any key, such as sums per day. Increments commute, so partitions never wait for each other.

    A handler takes the tally and the event, and adds to the counters of a key. A key of several columns is a tuple in
    the primary key's order.

        class Daily(Tallies[Day], of=Account, version=1):
            @applies
            def deposited(self, tally: Tally[Day], event: Deposited) -> None:
                tally[event.day].deposits += 1
    """


class Sql(Projection):
    """Any statements on the batch's transaction. Handlers get the events of a batch in stream order.

    Successive events of one handler come in one call. A handler for several event classes gets longer runs.

        class Delays(Sql, of=Aircraft, version=1):
            tables = (Delay,)

            @applies
            def arrived(self, tx: Transaction, events: Sequence[Recorded[Arrived]]) -> None:
                tx.execute(insert(tx.table(Delay)), [{...} for recorded in events])

    Attributes:
        tables: the models whose tables belong to this projection.
    """

    tables: ClassVar[Sequence[type]] = ()
