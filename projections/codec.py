"""The form of a codec, which carries the values of one column; `codecs` makes them.

A codec brings a value to its normal form: what a SELECT would give for it. A record holds normal forms only, so that it
does not matter for a fold where a batch ended, or whether the record has been in the database meanwhile. A value that
would be changed silently has no normal form, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from sqlalchemy.engine import Dialect

from aggregates.errors import EskernelError


class Refused(EskernelError, ValueError):
    """A value that its column can't carry. The message completes a sentence about the column."""


class Unsupported(EskernelError, ValueError):
    """A column type whose values can't be carried. The message completes a sentence about the column."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How the values of one column are carried.

    Attributes:
        plain: types whose values, if `fits` agrees, are their own normal form.
        normalise: returns the normal form of a value. It raises `Refused`.
        cast: PostgreSQL's type to which the text in a statement's parameter is cast.
        wire: turns a normal form into what JSON can carry to the database; None where JSON carries it as it is.
        fits: says whether values of the types `plain` fit the column; None where all of them do.
        loaded: turns what a SELECT gives into the normal form; None where they are the same.
        lossless: two values are equal if, and only if, their normal forms are. Then it need not be known after each
            event, but only when a row is written.
        nulls: None has a normal form too, which may be another value.
        hashable: normal forms can be keys.
        blind: different values may be equal for the database, so that they can't be keys.
    """

    plain: frozenset[type]
    normalise: Callable[[Any], Any]
    cast: str
    wire: Callable[[Any], Any] | None = None
    fits: Callable[[Iterable[Any]], bool] | None = None
    loaded: Callable[[Any], Any] | None = None
    lossless: bool = True
    nulls: bool = False
    hashable: bool = True
    blind: bool = False


class SqlType(NamedTuple):
    """A column type on a database.

    Attributes:
        impl: the type as SQLAlchemy adapts it to the database.
        spelt: the type in DDL.
        postgres: the database is PostgreSQL, otherwise SQLite.
    """

    impl: Any
    dialect: Dialect
    spelt: str
    postgres: bool


def refuse(value: Any, why: str) -> NoReturn:
    """Raise `Refused` for a value."""
    try:
        shown = repr(value)
    except Exception:  # of the app's own class, or a number of too many digits
        shown = f"a value of type {type(value).__name__}"
    raise Refused(f"is {shown if len(shown) <= 80 else shown[:77] + '...'}, {why}")


def checked_text(value: Any) -> str:
    """Return the value as a text that every database can store.

    Raises:
        Refused: it is no text, or contains a zero character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        refuse(value, f"which is no text: {type(value).__name__}")
    text = str.__str__(value)
    if "\0" in text:
        refuse(value, "which contains a zero character: PostgreSQL can't store it, and SQLite would cut it there")
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(value, "which contains half of a surrogate pair")
    return text
