"""Snapshots: an aggregate's cell as bytes, so that its history need not be read from the beginning.

A snapshot is a cache. It is taken only of a state that comes back as exactly the same, and used only with the code that
made it.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from aggregates.aggregate import Aggregate
from aggregates.cell import Cell
from aggregates.declaration import AggregateType
from aggregates.fingerprint import fingerprint
from aggregates.seen import Seen

A = TypeVar("A", bound=Aggregate)
FORMAT = 2


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """What is stored of a cell.

    Attributes:
        format: of this structure.
        code: fingerprint of the aggregate's code.
        commit: digest of the last commit in it.
        aggregate_id: of the aggregate.
        version, position, trail: as in `Cell`.
        commands: receipts of the latest commands: id, version, stream sequence.
        seen: the ids of earlier commands, as `Seen.store` returns them.
        state: the state, encoded.
    """

    format: int
    code: bytes
    commit: bytes
    aggregate_id: str
    version: int
    position: int
    trail: list[int]
    commands: list[tuple[str, int, int]]
    seen: tuple[bytes, str, str]
    state: bytes


class Restored(NamedTuple, Generic[A]):
    """A cell from a snapshot.

    Attributes:
        commit: digest of the last commit in it.
    """

    cell: Cell[A]
    commit: bytes

    def is_of(self, commit: bytes) -> bool:
        """Return whether this is the last commit in the cell, and not one that took its place in the log."""
        return _digest(commit) == self.commit


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Snapshot).decode


class SnapshotCodec(Generic[A]):
    """Turns cells of one aggregate type into bytes and back.

    Attributes:
        problem: why there can be no snapshots of this type, or nothing.
        code: fingerprint of the type's code.
    """

    def __init__(self, declared: AggregateType[A]) -> None:
        self._declared = declared
        self.problem = ""
        self.code = fingerprint(declared) or b""
        self._names = {field.name for field in fields(declared.cls)}
        self._decode_state: Callable[[bytes], A] | None = None
        if not self.code:
            self.problem = "the source of its module can't be found"
            return
        try:
            self._decode_state = msgspec.msgpack.Decoder(declared.cls).decode
        except Exception as error:  # of any kind: an annotation may be anything
            self.problem = f"its state has a type that can't be stored: {error}"

    def take(self, cell: Cell[A], commit: bytes) -> bytes | None:
        """Return a snapshot of a cell, or None if its state would not come back as exactly the same.

        Args:
            commit: the last commit in the cell, as it is stored.
        """
        if self._decode_state is None or set(vars(cell.state)) != self._names:
            return None
        try:
            state = _encode(cell.state)
            if not identical(cell.state, self._decode_state(state)):
                return None
        except Exception:  # of the app's own types
            return None
        return _encode(
            Snapshot(
                FORMAT,
                self.code,
                _digest(commit),
                cell.state.id,
                cell.version,
                cell.position,
                cell.trail.tolist(),
                [(command_id, *receipt) for command_id, receipt in cell.commands.items()],
                cell.seen.store(),
                state,
            )
        )

    def restore(self, data: bytes, aggregate_id: str) -> Restored[A] | None:
        """Return what a snapshot holds, or None if it is of other code, of another aggregate, or damaged."""
        if self._decode_state is None:
            return None
        try:
            found = _decode(data)
            if (found.format, found.code, found.aggregate_id) != (FORMAT, self.code, aggregate_id):
                return None
            state = self._decode_state(found.state)
            seen = Seen.restore(*found.seen)
        except Exception:  # of the app's own types, or of bytes that are no snapshot
            return None
        if state.id != aggregate_id:
            return None
        cell = Cell(self._declared, aggregate_id)
        cell.state, cell.version, cell.position = state, found.version, found.position
        cell.trail, cell.seen = array("Q", found.trail), seen
        cell.commands = {command_id: (version, position) for command_id, version, position in found.commands}
        return Restored(cell, found.commit)


def _digest(commit: bytes) -> bytes:
    return blake2b(commit, digest_size=16).digest()


def identical(one: Any, other: Any) -> bool:
    """Return whether two values are of the same types throughout, and equal, and hold no object twice.

    Containers keep their order. An object that a state holds in two places would come back as two objects.
    """
    return _identical(one, other, set())


def _identical(one: Any, other: Any, held: set[int]) -> bool:
    kind = type(one)
    if kind is not type(other):
        return False
    if kind in _ATOMS:
        return bool(one == other) or one != one  # noqa: PLR0124 - NaN
    if isinstance(one, enum.Enum):
        return one is other
    if _is_mutable(one):
        if id(one) in held:
            return False
        held.add(id(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_identical, one, other, [held] * len(one)))
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            _identical(key, key_, held) and _identical(value, value_, held)
            for (key, value), (key_, value_) in zip(one.items(), other.items(), strict=True)
        )
    if isinstance(one, set | frozenset):
        kinds = set(map(type, one))
        return bool(one == other) and kinds == set(map(type, other)) and kinds <= _ATOMS
    if is_dataclass(kind) or isinstance(one, msgspec.Struct):
        names = [field.name for field in fields(one)] if is_dataclass(one) else list(kind.__struct_fields__)
        if hasattr(one, "__dict__") and set(vars(one)) - set(names):
            return False
        return all(_identical(getattr(one, name), getattr(other, name), held) for name in names)
    # a moment, a decimal and the like
    return kind.__module__ in _PLAIN_MODULES and bool(one == other) and repr(one) == repr(other)


def _is_mutable(value: Any) -> bool:
    kind = type(value)
    if is_dataclass(kind):
        return not kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if isinstance(value, msgspec.Struct):
        return not kind.__struct_config__.frozen
    return isinstance(value, list | dict | set)


_ATOMS = {bool, int, float, str, bytes, type(None)}
_PLAIN_MODULES = {"datetime", "decimal", "uuid"}
