"""Reads a projection class once, at start: its tables, its handlers, and all its problems."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase

from aggregates.aggregate import Aggregate, role_of
from aggregates.declaration import AggregateType, annotated, message_classes
from aggregates.errors import DeclarationError
from aggregates.meta import Meta
from projections.codec import Unsupported
from projections.errors import SchemaError
from projections.naming import model_problems, table_of
from projections.projection import Projection, Rows, Sql, Tallies, Transaction
from projections.records import Columns
from projections.row_codec import RowCodec

MAX_NAME, MAX_VERSION = 128, 2**31 - 1
"""What the columns of the kernel's tables hold."""
_NAME = re.compile(rf"[^\W\d][\w.-]{{0,{MAX_NAME - 1}}}\Z")

ProjectionKind = Literal["rows", "tallies", "sql"]


@dataclass(slots=True)
class EventHandler:
    """A handler function, its event classes, and whether it takes a `Meta`."""

    function: Callable[..., Any]
    events: tuple[type, ...]
    wants_meta: bool


@dataclass(slots=True)
class KeyFunction:
    """The method `key` of a `Rows` projection, the event classes that it takes, and whether it takes a `Meta`."""

    function: Callable[..., Any]
    events: tuple[type, ...]
    wants_meta: bool


@dataclass(slots=True)
class DeclaredProjection:
    """A projection class as the kernel uses it. Made by `declare_projection`.

    Attributes:
        aggregates: the types whose events are projected.
        columns: columns of the only model of `Rows` and `Tallies`; None for `Sql`.
        models: every model whose table belongs to the projection.
        foreign: names of the tables of the app's other projections.
        key: says which rows an event is folded into; None: the aggregate's id does.
    """

    kind: ProjectionKind
    name: str
    version: int
    aggregates: tuple[str, ...]
    instance: Projection
    models: tuple[type, ...]
    columns: Columns | None
    handlers: list[EventHandler] = field(default_factory=list)
    foreign: frozenset[str] = frozenset()
    key: KeyFunction | None = None

    def codec(self, dialect: Dialect) -> RowCodec | None:
        """Return how the records of `Rows` and `Tallies` are carried into a database's table; None for `Sql`.

        Raises:
            SchemaError: the database can't carry a column.
        """
        if self.columns is None:
            return None
        try:
            name = self.models[0].__name__
            return RowCodec(self.columns, name, dialect, counting=self.kind == "tallies", keyed=self.keyed)
        except Unsupported as problem:
            raise SchemaError(str(problem)) from None

    @property
    def of(self) -> str:
        """The types whose events are projected, for people."""
        return ", ".join(self.aggregates)

    @property
    def row_type(self) -> str:
        """The type of what has a row each: that of its aggregates, or its own name where rows have their own key."""
        return self.name if self.keyed else self.aggregates[0]

    @property
    def keyed(self) -> bool:
        """Whether its rows have a key of their own."""
        return self.key is not None

    @property
    def units(self) -> tuple[str, ...]:
        """The types of what is folded, parked and retried by itself: aggregates, or rows with a key of their own."""
        return (self.name,) if self.keyed else self.aggregates

    @property
    def tables(self) -> set[str]:
        """Names of the tables, which exist as views."""
        return {table_of(model).key for model in self.models}


def keyword_problems(cls: object) -> list[str]:
    """Return what is wrong with a projection's class and with its `of`, `version` and `name`."""
    if not (isinstance(cls, type) and issubclass(cls, Projection)):
        return [f"{cls!r} is not a projection; list classes that derive from Rows, Tallies or Sql"]
    problems = []
    if not hasattr(cls, "of"):
        return [f"{cls.__name__}: say whose events it folds, with `of=SomeAggregate` in the class line"]
    of: object = cls.of
    if isinstance(of, list | set | frozenset) or of == ():
        problems.append(f"{cls.__name__}: of={of!r}; give one aggregate, or a tuple of several: of=(Order, Payment)")
    else:
        for each in of if isinstance(of, tuple) else (of,):
            if isinstance(each, str):
                problems.append(f"{cls.__name__}: of={each!r} is a text; give the aggregate's class itself")
            elif not (isinstance(each, type) and issubclass(each, Aggregate) and each is not Aggregate):
                problems.append(
                    f"{cls.__name__}: of={each!r} is not an aggregate; give a class that derives from Aggregate"
                )
        if isinstance(of, tuple) and len(set(map(id, of))) < len(of):
            problems.append(f"{cls.__name__}: of names an aggregate twice; name each once")
    version: object = getattr(cls, "version", None)
    if type(version) is not int or not 1 <= version <= MAX_VERSION:
        problems.append(f"{cls.__name__}: version={version!r} is not a whole number from 1 to {MAX_VERSION:,}")
    name: object = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.match(name):
        problems.append(
            f"{cls.__name__}: name={name!r} can't be a projection's name: use a letter or '_', then letters, digits, "
            f"'_', '-' or '.', at most {MAX_NAME} characters"
        )
    return problems


def aggregates_of(cls: type[Projection]) -> tuple[type[Aggregate], ...]:
    """Return the aggregates whose events a projection folds."""
    return cls.of if isinstance(cls.of, tuple) else (cls.of,)


def declare_projection(cls: type[Projection], of: Sequence[AggregateType[Any]]) -> DeclaredProjection:
    """Read the class.

    Args:
        of: the aggregates that it names, in its order.

    Raises:
        DeclarationError: the class has problems; the error lists all of them.
    """
    problems = keyword_problems(cls)
    if problems:
        raise DeclarationError(problems)
    kind: ProjectionKind = "rows" if issubclass(cls, Rows) else "tallies" if issubclass(cls, Tallies) else "sql"
    models = _listed(cls.tables) if issubclass(cls, Sql) else _model_arguments(cls)
    if not models or not all(isinstance(model, type) and issubclass(model, DeclarativeBase) for model in models):
        needed = "`tables = (Model, ...)`" if kind == "sql" else f"{kind.title()}[Model]"
        raise DeclarationError([f"{cls.__name__} has no SQLAlchemy model; declare it with {needed}"])
    problems += model_problems(models)
    if problems:
        raise DeclarationError(problems)
    names = tuple(each.name for each in of)
    columns = None if kind == "sql" else Columns(models[0], sequenced=kind == "rows")
    if columns is not None:
        problems += columns.problems(models[0], numeric=kind == "tallies")
        keyed = kind == "rows" and hasattr(cls, "key")
        if kind == "rows" and not keyed and columns.keys != 1:
            problems.append(
                f"{cls.__name__}: the primary key of {models[0].__name__} must be the aggregate's id alone; for "
                "another key, give the projection a method `key`, from an event to the key"
            )
        if kind == "rows" and not keyed and len(of) > 1:
            problems.append(
                f"{cls.__name__}: the key of its rows is the aggregate's id, and two of "
                f"{', '.join(names)} may have the same; give the projection a method `key`, from an event to "
                "the row's key, or declare a projection for each"
            )
    declared = DeclaredProjection(kind, cls.name, cls.version, names, cls(), models, columns)
    taken: set[type] = set()
    for name, member in inspect.getmembers_static(cls):
        if role_of(member) != "applies":
            continue
        where = f"{cls.__name__}.{name}"
        if inspect.iscoroutinefunction(member):
            problems.append(f"{where}: it can't be async; make it an ordinary method")
            continue
        hints = annotated(member, skip=1, problems=problems, where=where)
        if hints is None:
            continue
        handler = _handler(kind, models, member, hints[0], where, problems)
        if handler is None:
            continue
        for event_class in handler.events:
            if not any(event_class in each.event_types for each in of):
                known = ", ".join(sorted({name for each in of for name in each.events})) or "none"
                problems.append(f"{where}: {' or '.join(names)} has no event {event_class.__name__}; it has {known}")
            if event_class in taken and kind != "sql":
                problems.append(f"{where}: {cls.__name__} already has a handler for {event_class.__name__}; keep one")
            taken.add(event_class)
        if columns is not None:
            problems += _unknown_columns(member, columns, models[0], where, kind)
        declared.handlers.append(handler)
    if kind == "rows" and hasattr(cls, "key"):
        declared.key = _key_function(cls, declared, problems)
    if not declared.handlers and not problems:
        problems.append(f"{cls.__name__} handles no event; mark its handlers with @applies")
    if problems:
        raise DeclarationError(problems)
    return declared


def _handler(
    kind: ProjectionKind, models: tuple[type, ...], member: Any, hints: list[Any], where: str, problems: list[str]
) -> EventHandler | None:
    shape = {
        "rows": "(self, row: Model, event: Event) and optionally a Meta",
        "tallies": "(self, tally: Tally[Model], event: Event) and optionally a Meta",
        "sql": "(self, tx: Transaction, events: Sequence[Recorded[Event]])",
    }[kind]
    events = tuple(message_classes(hints[1], "event")) if len(hints) > 1 else ()
    first = hints[0] if hints else None
    fits = {
        "rows": first is models[0],
        "tallies": models[0] in typing.get_args(first),
        "sql": first is Transaction and len(hints) == 2,
    }[kind]
    wants_meta = len(hints) == 3 and hints[2] is Meta
    if not fits or not events or (len(hints) > 2 and not wants_meta):
        problems.append(f"{where}: a handler of this kind of projection takes {shape}")
        return None
    return EventHandler(member, events, wants_meta)


def _key_function(cls: type[Projection], declared: DeclaredProjection, problems: list[str]) -> KeyFunction | None:
    member, where = inspect.getattr_static(cls, "key"), f"{cls.__name__}.key"
    shape = "it takes (self, event: Event) and optionally a Meta, and returns the row's key, several, or None"
    if not inspect.isfunction(member) or inspect.iscoroutinefunction(member):
        problems.append(f"{where}: make it an ordinary method; {shape}")
        return None
    hints = annotated(member, skip=1, problems=problems, where=where)
    if hints is None:
        return None
    parameters, _ = hints
    events = tuple(message_classes(parameters[0], "event")) if parameters else ()
    if not events or len(parameters) > 2 or (len(parameters) == 2 and parameters[1] is not Meta):
        problems.append(f"{where}: {shape}")
        return None
    for handled in dict.fromkeys(event for handler in declared.handlers for event in handler.events):
        if handled not in events:
            problems.append(f"{where}: a handler takes {handled.__name__}, and no key is said for it; add it here")
    taken = {event for handler in declared.handlers for event in handler.events}
    for keyed in events:
        if keyed not in taken:
            problems.append(f"{where}: it says a key for {keyed.__name__}, which no handler takes; add a handler")
    return KeyFunction(member, events, len(parameters) == 2)


def _listed(tables: object) -> tuple[type, ...]:
    return tuple(tables) if isinstance(tables, tuple | list) else ()


def _model_arguments(cls: type) -> tuple[type, ...]:
    for base in getattr(cls, "__orig_bases__", ()):
        if typing.get_origin(base) in (Rows, Tallies):
            return typing.get_args(base)
    return ()


def _unknown_columns(member: Any, columns: Columns, model: type, where: str, kind: ProjectionKind) -> list[str]:
    """Find attributes of the row that are not columns, by reading the handler's source if it is available."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(member))).body[0]
    except (OSError, SyntaxError, TypeError):
        return []
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return []
    row = function.args.args[1].arg
    problems = []
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute):
            continue
        holder = node.value.value if kind == "tallies" and isinstance(node.value, ast.Subscript) else node.value
        if kind == "tallies" and holder is node.value:
            continue
        if isinstance(holder, ast.Name) and holder.id == row and node.attr not in columns.shown:
            near = difflib.get_close_matches(node.attr, columns.shown, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(columns.shown)}"
            problems.append(f"{where}: {model.__name__} has no column {node.attr!r}{hint}")
    return problems


def keepers_of(projections: Sequence[DeclaredProjection]) -> dict[str, int]:
    """Return for each aggregate type the projection that stores the sequence of an aggregate's last event, by index.

    It is the first `Rows`, or else the first projection. Rows with a key of their own keep none.
    """
    keepers: dict[str, int] = {}
    for kind in ("rows", None):
        for index, projection in enumerate(projections):
            if kind in (None, projection.kind) and not projection.keyed:
                for aggregate in projection.aggregates:
                    keepers.setdefault(aggregate, index)
    return keepers


def kept_prefix(projection: DeclaredProjection, aggregate: str) -> str:
    """Return what stands before an aggregate's id where a projection stores its sequence: two types may share ids."""
    return f"{aggregate}/" if len(projection.aggregates) > 1 else ""
