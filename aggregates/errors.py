"""The errors of the domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class EskernelError(Exception):
    """The base of every exception of eskernel; `kernel.errors` draws the whole hierarchy."""

    def __reduce__(self) -> tuple[Callable[..., EskernelError], tuple[Any, ...]]:
        """Let errors cross processes: Python would call `__init__` with the message, whatever it takes."""
        return _restore, (type(self), self.args, vars(self))


def _restore(cls: type[EskernelError], args: tuple[Any, ...], attributes: dict[str, Any]) -> EskernelError:
    error = cls.__new__(cls, *args)
    vars(error).update(attributes)
    return error


class Rejected(EskernelError):
    """Raise it in a command handler to refuse the command.

    The message reaches the sender unchanged. Nothing is appended, and the aggregate keeps its state.
    """


class InvalidMessage(EskernelError, ValueError):
    """A command or an event that does not have the declared form; the message says which field and why."""


class InvalidEvent(InvalidMessage):
    """A handler returned an event that can't be stored, or not be read back as the same value; the message names it."""


class NewerEvent(InvalidMessage):
    """A stored event of a newer program: this one does not know its type, or the schema version of its fields."""


class InvalidId(EskernelError, ValueError):
    """An aggregate id that can't be addressed: it is empty, too long, or contains control characters."""


class DeclarationError(EskernelError):
    """Declarations that can't work; raised once at start with *all* the problems found.

    Attributes:
        problems: one sentence for each problem, with the class and the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} problem(s) in the declarations:\n{lines}")


class SequenceError(EskernelError):
    """The sequences of an aggregate's events are not 1, 2, 3, ...: an event is missing, or is there twice."""
