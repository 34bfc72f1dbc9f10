"""Upcasters: they convert events that were stored under an older schema version to the current version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Fields = dict[str, Any]
U = TypeVar("U", bound=Callable[..., Fields])
_UPCASTS = "__eskernel_upcasts__"


class Upcast(NamedTuple):
    """One step: the event's class, the version that it starts from, and the function that returns the next version."""

    event: type
    version: int
    function: Callable[[Fields], Fields]


def upcasts(event: type, *, version: int) -> Callable[[U], U]:
    """Mark a static method that turns the stored fields of `version` into those of `version + 1`.

    Example:
        >>> class Account(Aggregate):
        ...     @staticmethod
        ...     @upcasts(Deposited, version=1)
        ...     def cents_not_dollars(fields: dict[str, Any]) -> dict[str, Any]:
        ...         return {"cents": fields["dollars"] * 100}
    """

    def mark(function: U) -> U:
        setattr(function, _UPCASTS, (event, version))
        return function

    return mark


def upcast_of(member: object) -> Upcast | None:
    """Return the record that `@upcasts` left on a (static) method, or None."""
    function = member.__func__ if isinstance(member, staticmethod) else member
    found = getattr(function, _UPCASTS, None)
    return None if found is None else Upcast(found[0], found[1], function)  # type: ignore[arg-type]
