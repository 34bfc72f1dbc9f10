"""Savepoints: the database is asked about parts of what it refused, until it is known what in it is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection

from projections.database import is_infrastructure
from projections.faults import is_about_reference, is_about_schema

T = TypeVar("T")
BLOCK = 128
"""Rows of the first parts. It is best where about one row of a hundred is bad."""


class Savepoints:
    """Does work in a transaction in such a way that what fails leaves nothing behind."""

    def __init__(self, connection: Connection) -> None:
        self._cursor: Any = connection.connection.cursor()

    def refused(
        self,
        items: Sequence[T],
        execute: Callable[[Sequence[T]], object],
        singly: Callable[[Sequence[T]], dict[int, Exception]] | None = None,
    ) -> dict[int, Exception]:
        """Execute for all items except the refused ones. Return the database's errors by place.

        Args:
            singly: does the same for items one by one, where all of them together are refused.
        """
        if not items:
            return {}

        def find(places: Sequence[int]) -> dict[int, Exception]:
            if singly is None or len(places) == 1:
                return self._bisect(items, places, execute, len(places))
            chosen = [items[place] for place in places]
            if self.attempt(partial(execute, chosen)) is None:
                return {}
            return {places[place]: error for place, error in self._checked(singly(chosen)).items()}

        refused = find(range(len(items)))
        while again := [place for place, error in refused.items() if is_about_reference(error)]:
            # what they refer to may have been written after them
            still = find(again)
            refused = {place: error for place, error in refused.items() if place not in set(again)} | still
            if len(still) == len(again):
                break
        return refused

    def _bisect(
        self, items: Sequence[T], places: Sequence[int], execute: Callable[[Sequence[T]], object], block: int
    ) -> dict[int, Exception]:
        refused: dict[int, Exception] = {}
        for start in range(0, len(places), block):
            part = places[start : start + block]
            error = self.attempt(partial(execute, [items[place] for place in part]))
            if error is not None:
                refused |= self._divide(items, part, execute, error)
        return refused

    def _divide(
        self, items: Sequence[T], places: Sequence[int], execute: Callable[[Sequence[T]], object], error: Exception
    ) -> dict[int, Exception]:
        """Execute for items that were refused together, except for the items that are refused alone."""
        if len(places) == 1:
            return {places[0]: error}
        if len(places) > BLOCK:
            return self._bisect(items, places, execute, BLOCK)
        half = len(places) // 2
        left, right = places[:half], places[half:]
        wrong = self.attempt(partial(execute, [items[place] for place in left]))
        if wrong is None and len(right) > 1:
            return self._divide(items, right, execute, error)  # what was wrong is in there
        refused = {} if wrong is None else self._divide(items, left, execute, wrong)
        return refused | self._bisect(items, right, execute, len(right))

    @staticmethod
    def _checked(refused: dict[int, Exception]) -> dict[int, Exception]:
        for error in refused.values():
            if is_infrastructure(error) or is_about_schema(error):
                raise error
        return refused

    def attempt(self, work: Callable[[], object], *, keep: bool = True, of_kernel: bool = True) -> Exception | None:
        """Do some work. Return why it failed, if the data is to blame; then nothing is left of it.

        Args:
            keep: whether anything is left of it if it succeeds.
            of_kernel: the statements are the kernel's: if a table is gone, no data is to blame.
        """
        # by the driver: SQLAlchemy's own savepoints take longer than most of the work
        self._cursor.execute("SAVEPOINT attempt")
        try:
            work()
        except Exception as error:
            if is_infrastructure(error) or (of_kernel and is_about_schema(error)):
                raise
            self._cursor.execute("ROLLBACK TO SAVEPOINT attempt")
            self._cursor.execute("RELEASE SAVEPOINT attempt")  # otherwise the next one would lie within this one
            return error
        if not keep:
            self._cursor.execute("ROLLBACK TO SAVEPOINT attempt")
        self._cursor.execute("RELEASE SAVEPOINT attempt")
        return None
