"""A compact set of the command ids that an aggregate has seen."""

from __future__ import annotations

from array import array


class Seen:
    """Command ids, kept as four bytes of their hash in tables that are at most half full: 8 to 34 bytes for an id.

    About one new id in a hundred million is mistaken for a known id, however many ids there are. A known id is never
    mistaken for a new one. After a hit the caller reads the aggregate's whole history, so false hits must be rare: with
    a Bloom filter's rate of one in a hundred, reading histories would add noticeably to the cost of an average command.
    """

    __slots__ = ("_left", "_tables")

    def __init__(self) -> None:
        self._tables: tuple[array[int], ...] = ()
        self._left = 0

    def add(self, command_id: str) -> None:
        """Add an id."""
        if not self._left:
            # add a table instead of enlarging one: no entry has to move
            size = len(self._tables[0]) * 4 if self._tables else _FIRST
            self._tables = (array("I", bytes(4 * size)), *self._tables)
            self._left = size // 2
        self._left -= 1
        value, table = hash(command_id), self._tables[0]
        mask = len(table) - 1
        place = value & mask
        while table[place]:
            place = (place + 1) & mask
        table[place] = (value >> 32) & 0xFFFFFFFF or 1  # 0 marks a free place

    def __contains__(self, command_id: str) -> bool:
        value = hash(command_id)
        mark = (value >> 32) & 0xFFFFFFFF or 1
        for table in self._tables:
            mask = len(table) - 1
            place = value & mask
            while found := table[place]:
                if found == mark:
                    return True
                place = (place + 1) & mask
        return False


_FIRST = 32
"""Number of places in the first table. Each further table has four times as many."""
