"""A compact set of the command ids that an aggregate has seen."""

from __future__ import annotations

from array import array
from typing import Self
from zlib import crc32

LATEST = 512
"""At least so many of the latest ids are stored with a snapshot, if there are so many."""


class Seen:
    """Command ids, kept as four bytes of their hash in tables that are at most half full: 8 to 34 bytes for an id, and
    4 more for each of the latest.

    About one new id in a hundred million is mistaken for a known id, however many ids there are; of a restored set one
    in four million. A known id is never mistaken for a new one. After a hit the caller reads the aggregate's whole
    history, so false hits must be rare: with a Bloom filter's rate of one in a hundred, reading histories would add
    noticeably to the cost of an average command.

    A set that was restored from `store` knows of its earlier ids only that none is above the `horizon`. It takes every
    id up to there for a known one. Ids that grow with time, such as UUIDv7, are above it.

    Attributes:
        horizon: the greatest of the ids that are not known one by one, or nothing.
    """

    __slots__ = ("_edge", "_greatest", "_latest", "_left", "_older", "_stored", "_tables", "horizon")

    def __init__(self) -> None:
        self._tables: tuple[array[int], ...] = ()
        self._left = 0
        self._stored: frozenset[int] = frozenset()  # digests of what was restored
        self._latest = array("I")  # digests of the latest ids
        self._greatest = ""  # of all ids
        self._edge = ""  # the greatest when the latest were half as many as they can be
        self._older = ""  # the greatest of those before the latest
        self.horizon = ""

    def add(self, command_id: str) -> None:
        """Add an id."""
        latest = self._latest
        latest.append(crc32(command_id.encode()))
        if command_id > self._greatest:  # noqa: PLR1730 - a call of max() costs more than the rest of it
            self._greatest = command_id
        if len(latest) == LATEST:
            self._edge = self._greatest
        elif len(latest) == 2 * LATEST:
            del latest[:LATEST]
            self._older, self._edge = self._edge, self._greatest
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
        return command_id <= self.horizon or (bool(self._stored) and crc32(command_id.encode()) in self._stored)

    def store(self) -> tuple[bytes, str, str]:
        """Return what `restore` takes."""
        return self._latest.tobytes(), self._greatest, self._older

    @classmethod
    def restore(cls, latest: bytes, greatest: str, older: str) -> Self:
        """Return a set of which only the latest ids are known one by one."""
        made = cls()
        made._latest.frombytes(latest)
        made._stored = frozenset(made._latest)
        made._greatest = made._edge = greatest
        made._older = made.horizon = older
        return made


_FIRST = 32
"""Number of places in the first table. Each further table has four times as many."""
