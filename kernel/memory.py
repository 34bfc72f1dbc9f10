"""How much memory objects take, roughly and fast: never more than so many objects are looked at."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterable
from enum import Enum
from itertools import chain, islice
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

MOST = 500
"""Objects looked at; what is left is taken to be like them."""
SAMPLE = 50
"""Members of one container that are looked at; the others are taken to be like them."""
_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, MappingProxyType, Enum, bool, type(None))
_ATOMS = (str, bytes, int, float, complex, bytearray, range, memoryview)


def size_of(roots: Iterable[Any], most: int = MOST) -> int:
    """Return about how many bytes these objects and all that they lead to take, each object once.

    What programs share is not counted: types, functions, modules, enum members, small numbers.
    """
    left: list[tuple[Any, float]] = [(root, 1.0) for root in roots]
    seen: set[int] = set()
    total = weights = 0.0
    sizeof = sys.getsizeof
    while left:
        one, weight = left.pop()
        kind = type(one)
        if id(one) in seen or isinstance(one, _SHARED) or (kind is int and -5 <= one <= 256):
            continue
        if len(seen) == most:
            left.append((one, weight))
            return round(total + total / weights * sum(each for _, each in left))
        seen.add(id(one))
        weights += weight
        total += weight * sizeof(one)
        members: Iterable[Any]
        if kind in _ATOMS:
            continue
        if isinstance(one, dict):
            members = chain.from_iterable(islice(one.items(), SAMPLE))
            share = weight * max(1.0, len(one) / SAMPLE)
        elif isinstance(one, list | tuple | set | frozenset | deque):
            members = islice(one, SAMPLE)
            share = weight * max(1.0, len(one) / SAMPLE)
        else:
            # asking an object for its __dict__ would make one, which stays
            members, share = gc.get_referents(one), weight
        left += ((member, share) for member in members)
    return round(total)
