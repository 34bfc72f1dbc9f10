"""Sorting a batch of commits by aggregate, leaving out what is another worker's, folded already, or no commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

from aggregates import InvalidId, InvalidMessage
from aggregates.commit import Envelope, decode
from kernel.log.base import Stored
from kernel.log.subjects import Address, Subjects
from projections.checkpoints import Position
from projections.unit_of_work import Batch

Commits = list[tuple[int, list[Envelope]]]
Garbage = Callable[[int, str, int, bytes, str], None]
"""Told of bytes that are no commit of this app: stream sequence, subject, partition, payload, and why."""
_ALL_NEW: frozenset[int] = frozenset()


@dataclass(slots=True)
class Group:
    """The commits of one aggregate in a batch that the same projections, perhaps all, have folded already.

    Attributes:
        skip: the projections that have folded them, by index.
        done: no projection of this worker needs them.
    """

    address: Address
    skip: frozenset[int]
    done: bool
    commits: Commits

    @property
    def key(self) -> tuple[str, str]:
        """Type and id of the aggregate."""
        return self.address.aggregate, self.address.id


class Sorter:
    """Sorts the batches of one session.

    Args:
        types: names of the app's aggregates.
        position: where the projections stand; it notes which partitions a batch touches.
        projections: how many there are.
        note_unknown: called for each commit of an aggregate that the app doesn't have: its name and stream sequence.
    """

    def __init__(
        self,
        subjects: Subjects,
        types: Collection[str],
        position: Position,
        projections: int,
        garbage: Garbage,
        note_unknown: Callable[[str, int], None],
    ) -> None:
        self._subjects, self._types, self._owned = subjects, types, position.owned
        self._position, self._projections, self._garbage = position, projections, garbage
        self._note_unknown = note_unknown

    async def sort(self, commits: list[Stored]) -> list[Group]:
        """Decode a batch and sort it by aggregate; gives the loop a turn now and then."""
        highest, paused = self._position.highest, self._position.paused
        # a subject alone is the key where nothing has been folded before, which is nearly always
        groups: dict[str | tuple[str, frozenset[int]], Group] = {}
        for number, (sequence, subject, payload) in enumerate(commits):
            if number % 2_000 == 1_999:
                await asyncio.sleep(0)
            try:
                key = subject if sequence > highest and not paused else (subject, self._folded(subject, sequence))
                group = groups.get(key)
                if group is None:
                    group = groups[key] = self._new_group(key)
                if not group.done:
                    group.commits.append((sequence, decode(payload)))
                elif group.address.aggregate not in self._types:
                    self._pass_over(group.address, sequence)
            except (InvalidMessage, InvalidId) as error:
                self._put_aside(sequence, subject, payload, str(error))
        found = [group for group in groups.values() if group.commits]
        for group in found:
            self._position.touch(group.address.partition)
        return found

    def _folded(self, subject: str, sequence: int) -> frozenset[int]:
        partition = self._subjects.parse(subject).partition
        return self._position.folded(partition, sequence) if partition in self._owned else _ALL_NEW

    def _new_group(self, key: str | tuple[str, frozenset[int]]) -> Group:
        subject, skip = (key, None) if isinstance(key, str) else key
        address = self._subjects.parse(subject)
        if skip is None:
            skip = self._position.elsewhere(address.partition) if address.partition in self._owned else _ALL_NEW
        if address.partition not in self._owned or address.aggregate not in self._types:
            return Group(address, skip, True, [])
        return Group(address, skip, len(skip) == self._projections, [])

    def _pass_over(self, address: Address, sequence: int) -> None:
        self._note_unknown(address.aggregate, sequence)
        if address.partition in self._owned:
            # otherwise a query that waits for the commit's sequence waits until the partition is quiet
            self._position.touch(address.partition)

    def _put_aside(self, sequence: int, subject: str, payload: bytes, why: str) -> None:
        partition = self._subjects.partition_of(subject)
        if partition in self._owned and sequence > self._position.least(partition):
            self._position.touch(partition)
            self._garbage(sequence, subject, partition, payload, why)


def batch_of(groups: list[Group]) -> Batch:
    """Return the batch as the writer knows it."""
    return [(group.key, group.commits, group.skip) for group in groups]
