"""The app: everything a user declared, checked once at start."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Dialect

from aggregates import Aggregate, DeclarationError
from aggregates.aggregate import name_of
from aggregates.declaration import AggregateType, declare, name_problem
from aggregates.policies import Policy, Reacting
from aggregates.reacting import DeclaredReaction, declare_reaction
from kernel.effect import Effect, effect_problems
from kernel.errors import AppNotFound, NotDeclared
from kernel.log.subjects import APP_NAME
from kernel.packages import namesake
from projections.declaration import DeclaredProjection, aggregates_of, declare_projection, keyword_problems
from projections.fold import TRANSIENT, Plan
from projections.naming import name_problems, table_of
from projections.projection import Projection

if TYPE_CHECKING:
    from kernel.alerts import OnAlert


class App:
    """An application: a name, its aggregate classes, its projections, and how it reacts to events.

    Args:
        name: names the stream, the subjects and the data directory: a letter, then letters, digits, `-`, `_`; at
            most 32 characters.
        policies: from events to commands. Classes, or objects of them.
        effects: what is done outside of the app when something has happened. Classes, or objects of them.
        retired: names of aggregates that the app no longer has. Their events stay in the log, and are passed over.
            Without being named here, events of an aggregate that the app doesn't have lead to a warning.
        transient: exceptions of projection handlers that a retry may cure. The service folds such an event again
            later; after any other exception the event waits for an operator.
        rate_key: whose rate a command counts for: called with the aggregate's name, its id and the command, for each
            command while `rates.per_key` is set. None, or an exception, counts for no key. Without a function a command
            counts for the tenant that its sender names.
        on_alert: called with an `Alert` when a backlog, a component's health, or the pressure of publishing changes.
            Sync or async; each runs in a thread of its own, so that one that raises or hangs harms nothing.

    Raises:
        DeclarationError: once, with everything that is wrong in any of the classes.
    """

    def __init__(
        self,
        name: str,
        *,
        aggregates: Sequence[type[Aggregate]],
        projections: Sequence[type[Projection]] = (),
        policies: Sequence[type[Policy] | Policy] = (),
        effects: Sequence[type[Effect] | Effect] = (),
        retired: Sequence[str] = (),
        transient: Sequence[type[Exception]] = TRANSIENT,
        rate_key: Callable[[str, str, object], str | None] | None = None,
        on_alert: Sequence[OnAlert] = (),
    ) -> None:
        self.on_alert = tuple(on_alert)
        self.transient = tuple(transient)
        self.rate_key = rate_key
        problems: list[str] = []
        if not APP_NAME.match(name):
            problems.append(f"app name {name!r}: use a letter, then letters, digits, '-' or '_', at most 32 characters")
        self.name = name
        self.types: dict[str, AggregateType[Any]] = {}
        self.projections: list[DeclaredProjection] = []
        for cls in aggregates:
            try:
                declared = declare(cls)
            except DeclarationError as error:
                problems += error.problems
                continue
            if declared.name in self.types:
                problems.append(f"two aggregates are named {declared.name}; give one of the classes another name=...")
            self.types[declared.name] = declared
        self.retired = self._check_retired(retired, problems)
        for projection in projections:
            self._add_projection(projection, aggregates, problems)
        for each in self.projections:
            others = (other.tables for other in self.projections if other is not each)
            each.foreign = frozenset[str]().union(*others) - each.tables
        self.reactions: list[DeclaredReaction] = []
        for base, listed in ((Policy, policies), (Effect, effects)):
            for given in listed:
                self._add_reaction(given, base, problems)
        problems += name_problems(self.projections)
        if not aggregates:
            problems.append(f"app {name!r} has no aggregates; list their classes in aggregates=[...]")
        if problems:
            raise DeclarationError(problems)

    def _check_retired(self, retired: Sequence[str], problems: list[str]) -> frozenset[str]:
        if isinstance(retired, str):
            problems.append(f"retired={retired!r} is one text; give a list of names, retired=[{retired!r}]")
            return frozenset()
        for name in retired:
            if problem := name_problem(name):
                problems.append(f"retired: {name!r} {problem}")
            elif name in self.types:
                problems.append(
                    f"{name} is both an aggregate of the app and retired; remove it from aggregates=[...] or from "
                    "retired=[...]"
                )
        return frozenset(name for name in retired if isinstance(name, str))

    def _add_projection(
        self, cls: type[Projection], aggregates: Sequence[type[Aggregate]], problems: list[str]
    ) -> None:
        if found := keyword_problems(cls):
            problems += found
            return
        named = aggregates_of(cls)
        if strange := [of.__name__ for of in named if of not in aggregates]:
            problems.append(f"{cls.__name__} is of {strange[0]}, which is not among the app's aggregates")
            return
        by_class = {declared.cls: declared for declared in self.types.values()}
        if any(of not in by_class for of in named):
            return  # the aggregate's own problems are listed already
        try:
            declared = declare_projection(cls, [by_class[of] for of in named])
        except DeclarationError as error:
            problems += error.problems
            return
        for other in self.projections:
            if other.name == declared.name:
                problems.append(f"two projections are named {declared.name}; give one another name=...")
            for table in other.tables & declared.tables:
                problems.append(
                    f"{declared.name} and {other.name} both fill {table!r} ({_model(declared, table)}); "
                    "a table has one projection"
                )
        if declared.keyed and (declared.name in self.types or declared.name in self.retired):
            problems.append(
                f"{declared.name}: its rows have a key of their own, and are parked under its name, which is also that "
                "of an aggregate; give the projection another name=..."
            )
        self.projections.append(declared)

    def _add_reaction(self, given: type[Reacting] | Reacting, base: type[Reacting], problems: list[str]) -> None:
        try:
            declared = declare_reaction(given, base, self.types)
        except DeclarationError as error:
            problems += error.problems
            return
        if isinstance(declared.instance, Effect):
            problems += effect_problems(declared.instance)
        # they share dead letters, and the verbs for them
        taken = [each.name for each in self.projections] + [each.name for each in self.reactions]
        if declared.name in taken:
            problems.append(
                f"two projections, policies or effects are named {declared.name}; give one another name=..."
            )
        self.reactions.append(declared)

    def type_of(self, aggregate: type[Aggregate] | str) -> AggregateType[Any]:
        """Return the declared aggregate.

        Raises:
            NotDeclared: it is not one of the app's; the message lists those.
        """
        name = aggregate if isinstance(aggregate, str) else name_of(aggregate)
        if name not in self.types:
            raise NotDeclared(f"{self.name} has no aggregate {name!r}; it has {', '.join(sorted(self.types))}")
        return self.types[name]

    def projection(self, name: str) -> DeclaredProjection:
        """Return the declared projection. Raises `NotDeclared` with a list of those there are."""
        for declared in self.projections:
            if declared.name == name:
                return declared
        raise NotDeclared(
            f"{self.name} has no projection {name!r}; it has {', '.join(p.name for p in self.projections) or 'none'}"
        )

    def plan(self, dialect: Dialect) -> Plan:
        """Compile all projections for folding into a database.

        Raises:
            SchemaError: the database can't carry a column.
        """
        return Plan(list(self.types.values()), self.projections, dialect, self.transient)


def load_app(spec: str) -> App:
    """Import an app named as `package.module:variable`.

    Its module is looked for on `sys.path`, which stays as it is. `eskernel` itself puts the current folder there.

    Raises:
        AppNotFound: no such module or variable, or it is no App; or the app's own module can't be imported because it
            has the name of one of eskernel's packages.
        DeclarationError: the app's declarations are wrong.
    """
    module_name, _, variable = spec.partition(":")
    if not module_name or not variable:
        raise AppNotFound(f"{spec!r} does not name an app; write it as package.module:variable, like examples.bank:app")
    try:
        module = importlib.import_module(module_name)
    except DeclarationError:
        raise
    except Exception as error:
        for concerned in _modules_concerned(error):
            _refuse_namesake(concerned, f"can't import {module_name!r}: {error}")
        if isinstance(error, ModuleNotFoundError):
            raise AppNotFound(f"can't import {module_name!r}: {error}; run from the folder that holds it") from None
        place = traceback.extract_tb(error.__traceback__)
        where = next((frame for frame in reversed(place) if "importlib" not in frame.filename), None)
        at = f" ({where.filename}, line {where.lineno})" if where is not None else ""
        raise AppNotFound(f"importing {module_name} failed{at}: {type(error).__name__}: {error}") from error
    found = getattr(module, variable, None)
    if not isinstance(found, App):
        _refuse_namesake(module_name, f"{module_name} has no App named {variable!r}")
        raise AppNotFound(f"{module_name} has no App named {variable!r}")
    return found


def _modules_concerned(error: Exception) -> Iterator[str]:
    """Yield the names of modules that an import may have taken for others."""
    if isinstance(error, ImportError) and error.name:
        yield error.name
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        yield error.obj.__name__
    running = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    if running:
        yield running[-1].f_globals["__name__"]  # the module whose import failed first


def _refuse_namesake(module: str, failure: str) -> None:
    """Raise `AppNotFound` if a module has the name of one of eskernel's, and the user has one of that name too."""
    if (place := namesake(module)) is not None:
        kind = "folder" if place.is_dir() else "file"
        raise AppNotFound(
            f"{failure}; {place.stem!r} is a package of eskernel, which hides your {kind} {place}: rename your {kind}, "
            "or move it into a package of yours"
        ) from None


def _model(declared: DeclaredProjection, table: str) -> str:
    return next(model.__name__ for model in declared.models if table_of(model).key == table)
