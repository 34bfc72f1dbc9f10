"""The base class of aggregates, and the two decorators that mark their methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

F = TypeVar("F", bound=Callable[..., Any])
_ROLE = "__eskernel_role__"


def handles(method: F) -> F:
    """Mark a method as the handler of the command that its first parameter is annotated with.

    A handler reads state and returns events: one, a list or tuple of them, or None. It never changes state. To
    refuse, it raises `Rejected`. A second parameter annotated `Context` brings time, ids and randomness.
    """
    setattr(method, _ROLE, "handles")
    return method


def applies(method: F) -> F:
    """Mark a method that folds the event its first parameter is annotated with into state (or into a row).

    In an aggregate it is the only place where state changes, and it must not fail: what happened, happened.
    """
    setattr(method, _ROLE, "applies")
    return method


def role_of(method: object) -> str | None:
    """Return "handles", "applies" or "upcasts" for a marked function, or None."""
    return getattr(method, _ROLE, None)


@dataclass_transform(kw_only_default=True)
class _Fields:
    """Makes a dataclass of every subclass, and tells type checkers so."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(cls)


class Aggregate(_Fields):
    """A consistency boundary: state folded from its own events, and the rules for making new ones.

    Subclasses declare state as annotated fields *with defaults* (the state before the first event), command
    handlers with `@handles` and event appliers with `@applies`.

    Attributes:
        id: the aggregate's id, as the sender of commands gave it.
    """

    id: str
