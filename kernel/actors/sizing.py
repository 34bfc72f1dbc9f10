"""How much memory objects take, roughly and fast: only so many objects are looked at."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Sequence
from enum import Enum
from itertools import chain, islice
from math import isqrt
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

MOST = 500
"""Objects looked at, about."""
FEWEST = 4
"""Members of a container that are looked at in any case; the others are taken to be like them."""
_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, MappingProxyType, Enum, bool, type(None))
_ATOMS = (str, bytes, int, float, complex, bytearray, range, memoryview)


def size_of(roots: Sequence[Any], most: int = MOST) -> int:
    """Return about how many bytes these objects and all that they lead to take, each object once.

    What programs share is not counted: types, functions, modules, enum members, small numbers. Of a large container
    some members are looked at, and of what lies deep in a large structure only the top.
    """
    return round(_members(list(roots), len(roots), most, set())[0])


def _members(members: list[Any], count: int, budget: int, seen: set[int]) -> tuple[float, int]:
    """Return the bytes of `count` members like these, and how many objects were looked at."""
    total, used = 0.0, 0
    for place, member in enumerate(members):
        # what one leaves of its share is for the others
        size, looked = _size(member, (budget - used) // (len(members) - place), seen)
        total += size
        used += looked
    return total * count / max(1, len(members)), used


def _size(one: Any, budget: int, seen: set[int]) -> tuple[float, int]:
    kind = type(one)
    if id(one) in seen or issubclass(kind, _SHARED) or (kind is int and -5 <= one <= 256):
        return 0.0, 0
    seen.add(id(one))
    size = sys.getsizeof(one)
    if kind in _ATOMS or budget <= 1:
        return size, 1
    few = max(FEWEST, isqrt(budget))
    if issubclass(kind, dict):
        members, count = list(chain.from_iterable(islice(one.items(), few))), 2 * len(one)
    elif issubclass(kind, list | tuple | set | frozenset | deque):
        members, count = list(islice(one, few)), len(one)
    else:
        # asking an object for its __dict__ would make one, which stays
        members = gc.get_referents(one)
        count = len(members)
    more, used = _members(members, count, budget - 1, seen)
    return size + more, used + 1
