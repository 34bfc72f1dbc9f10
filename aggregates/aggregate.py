"""The base class of aggregates, and the decorators that mark methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from aggregates.errors import DeclarationError

F = TypeVar("F", bound=Callable[..., Any])
_ROLE = "__eskernel_role__"
_NAME = "__eskernel_name__"


def handles(method: F) -> F:
    """Mark a method as the handler of the command that its first parameter is annotated with.

    A handler reads the state and returns an event, a list or tuple of events, or None. It never changes the state.
    It raises `Rejected` to refuse the command. A second parameter annotated `Context` gives it time, ids and
    randomness.
    """
    setattr(method, _ROLE, "handles")
    return method


def applies(method: F) -> F:
    """Mark a method that folds an event into the state (or into a row): the event that annotates its first parameter.

    An aggregate's state changes only in these methods. They must not fail: the event has already happened.
    """
    setattr(method, _ROLE, "applies")
    return method


def reacts(method: F) -> F:
    """Mark a method that reacts to an event: the event that annotates its first parameter.

    A policy's returns commands and timers; an effect's is async, and does something outside of the app. A second
    parameter annotated `Meta` gives it the event's metadata.
    """
    setattr(method, _ROLE, "reacts")
    return method


def role_of(method: object) -> str | None:
    """Return "handles", "applies" or "reacts" for a marked function, or None."""
    return getattr(method, _ROLE, None)


def explain_dataclass(error: Exception) -> str:
    """Return why a class can't be a dataclass, with a remedy."""
    if "use default_factory" not in str(error):
        return str(error)
    return f"{error}, such as `books: list[str] = field(default_factory=list)` with `from dataclasses import field`"


@dataclass_transform(kw_only_default=True)
class _Fields:
    """Turns every subclass into a dataclass, also for type checkers."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        try:
            dataclass(cls)
        except (TypeError, ValueError) as error:
            raise DeclarationError([f"{cls.__name__}: {explain_dataclass(error)}"]) from None


class Aggregate(_Fields):
    """A consistency boundary: state folded from the aggregate's own events, and the rules that produce new events.

    A subclass declares its state as annotated fields *with defaults* (the state before the first event), its command
    handlers with `@handles` and its event appliers with `@applies`.

    Class keywords:
        name: the aggregate's name in the log, by default the class name. Stored events keep it, so it must not change:
            give the old name when you rename the class. A subclass does not inherit it.

    Attributes:
        id: the aggregate's id, as the sender of the command gave it.

    Example:
        >>> class BankAccount(Aggregate, name="Account"):
        ...     balance: int = 0
    """

    id: str

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        super().__init_subclass__()
        setattr(cls, _NAME, cls.__name__ if name is None else name)


def name_of(cls: type) -> str:
    """Return an aggregate's name in the log: the class keyword `name`, by default the class name."""
    name: str = cls.__dict__.get(_NAME, cls.__name__)
    return name
