"""Which command ids an aggregate has seen, in little memory."""

from __future__ import annotations

from array import array


class Seen:
    """Command ids by four bytes of their hash each, in tables that are at most half full: 8 to 34 bytes for an id.

    It may take a new id for a known one, about once in a hundred million, however many there are; never the other way
    round. Whoever asks then reads the aggregate's whole history: a Bloom filter's one in a hundred would make every
    command pay for a hundredth of it.
    """

    __slots__ = ("_left", "_tables")

    def __init__(self) -> None:
        self._tables: tuple[array[int], ...] = ()
        self._left = 0

    def add(self, command_id: str) -> None:
        """Remember an id."""
        if not self._left:
            # a further table, not a larger one: nothing has to move
            size = len(self._tables[0]) * 4 if self._tables else _FIRST
            self._tables = (array("I", bytes(4 * size)), *self._tables)
            self._left = size // 2
        self._left -= 1
        value, table = hash(command_id), self._tables[0]
        mask = len(table) - 1
        place = value & mask
        while table[place]:
            place = place + 1 & mask
        table[place] = value >> 32 & 0xFFFFFFFF or 1  # 0 is a free place

    def __contains__(self, command_id: str) -> bool:
        value = hash(command_id)
        mark = value >> 32 & 0xFFFFFFFF or 1
        for table in self._tables:
            mask = len(table) - 1
            place = value & mask
            while found := table[place]:
                if found == mark:
                    return True
                place = place + 1 & mask
        return False


_FIRST = 32
"""Places of the first table; each further one has four times as many."""
