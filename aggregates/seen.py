"""Which command ids an aggregate has seen, in little memory."""

from __future__ import annotations


class Seen:
    """Every command id of an aggregate's history, in two bytes each: a Bloom filter that grows.

    It may take a new id for a known one, about once in a hundred; never the other way round.
    """

    __slots__ = ("_bits", "_left", "_mask", "_older")

    def __init__(self) -> None:
        self._older: list[tuple[bytearray, int]] = []
        self._bits = bytearray(_FIRST)
        self._mask = _FIRST * 8 - 1
        self._left = _FIRST // 2

    def add(self, command_id: str) -> None:
        """Remember an id."""
        if not self._left:
            self._older.append((self._bits, self._mask))
            size = len(self._bits) * 4
            self._bits, self._mask, self._left = bytearray(size), size * 8 - 1, size // 2
        self._left -= 1
        value, bits, mask = hash(command_id), self._bits, self._mask
        for shift in _SHIFTS:
            place = value >> shift & mask
            bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, command_id: str) -> bool:
        value = hash(command_id)
        return _all_set(self._bits, self._mask, value) or any(_all_set(*one, value) for one in self._older)


_FIRST = 32
"""Bytes of a filter's first part, room for half as many ids; each further part is four times as large."""
_SHIFTS = (0, 13, 26, 39)


def _all_set(bits: bytearray, mask: int, value: int) -> bool:
    for shift in _SHIFTS:
        place = value >> shift & mask
        if not bits[place >> 3] & 1 << (place & 7):
            return False
    return True
