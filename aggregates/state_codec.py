"""An aggregate's state as JSON, for senders who want to see what a command has made of it."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from aggregates.aggregate import Aggregate
from aggregates.encoding import difference
from aggregates.errors import InvalidMessage
from aggregates.messages import dumps

A = TypeVar("A", bound=Aggregate)


def encode_state(state: Aggregate) -> bytes:
    """Return a state as JSON.

    Raises:
        InvalidMessage: it would not come back as the same; the message says what of it.
    """
    cls = type(state)
    if more := vars(state).keys() - {field.name for field in fields(cls)}:
        raise InvalidMessage(f"{cls.__name__}.{min(more)} is not a field of the class; declare it with its type")
    try:
        data = dumps(state)
    except Exception as error:  # a value of any kind
        raise InvalidMessage(f"the state of {cls.__name__} can't be encoded: {error}") from None
    if problem := difference(state, decode_state(cls, data), cls.__name__):
        raise InvalidMessage(problem)
    return data


def decode_state(cls: type[A], data: bytes | msgspec.Raw) -> A:
    """Return the state from its JSON.

    Raises:
        InvalidMessage: there is no such state of this class.
    """
    try:
        state: A = _decoder(cls).decode(data)  # type: ignore[arg-type]
    except Exception as error:  # of a __post_init__ of the app too
        raise InvalidMessage(f"the state of {cls.__name__} can't be read back: {error}") from None
    return state


@lru_cache(maxsize=256)
def _decoder(cls: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cls)
